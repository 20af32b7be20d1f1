"""Bundles that several tests use are exported once and kept under build/, by the hash of what
they are made from, so that two workers, a second run and the Python 3.10 run share them."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

# two workers share two cores: torch with a thread per core in each would wait for itself
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
CALIBRATION = "refshapes:calibration"
BUNDLES = ROOT / "build" / "test-bundles"
SOURCES = (
    "models/**/*.py",
    "models/**/*.json",
    "export/*.py",
    "calibration/*.py",
    "runtime/manifest.py",
    "runtime/plan.py",
)


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


@pytest.fixture(scope="session")
def quantized(bundle: Path) -> Path:
    """The same with the plans fp16, int8 and naive, each in all dialects; never changed."""
    path = bundle.with_name("quantized.refedge")
    if not path.is_dir():
        from filelock import FileLock
        from refedge.calibration.quantize import quantize
        from refedge.export.dialects import DIALECTS

        with FileLock(bundle.with_name("quantized.lock")):
            if not path.is_dir():
                half_done = Path(shutil.copytree(bundle, path.with_name("half-done")))
                quantize(half_done, "fp16", dialects=DIALECTS)
                for plan in ("int8", "naive"):
                    quantize(half_done, plan, data=CALIBRATION, samples=48, spare=0.0,
                             dialects=DIALECTS)  # fmt: skip
                half_done.rename(path)
    return path


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "own.refedge"))
