"""Bundles that several tests use are exported once and kept under build/, by the hash of what
they are made from, so that two workers, a second run and the Python 3.10 run share them."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUNDLES = ROOT / "build" / "test-bundles"
SOURCES = ("models/**/*.py", "models/**/*.json", "export/*.py", "runtime/manifest.py")


def _key() -> str:
    total = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:16]


def exported(name: str, size: int | None = None) -> Path:
    """The bundle of a model, exported now if nobody did yet."""
    given = os.environ.get("REFEDGE_TEST_BUNDLES")
    stem = f"{name.replace(':', '-')}-{size or 'own'}"
    if given:
        return Path(given) / f"{stem}.refedge"
    folder = BUNDLES / _key()
    bundle = folder / f"{stem}.refedge"
    if not bundle.is_dir():
        from filelock import FileLock
        from refedge.data.refshapes.expressions import words
        from refedge.export.export import export
        from refedge.models.checkpoint import open_model

        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{stem}.lock"):
            if not bundle.is_dir():
                export(open_model(name, words(), size=size), bundle, say=lambda _: None)
    return bundle


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The shipped tiny SLViT at 96 pixels; never changed."""
    return exported("slvit-tiny")


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "own.refedge"))
