"""Open a bundle: check every file against the manifest before anything is parsed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import BundleError
from .manifest import MANIFEST, DialectSpec, FileSpec, Manifest, decode_manifest

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Where a file that the manifest lists, and that was therefore verified, lies."""
        if name not in self.manifest.files:
            raise _changed(self.path, name, "the manifest does not list it")
        return self.path / name

    def dialect(self, names: Sequence[str], plan: str) -> DialectSpec:
        """The first of the named dialects that the bundle holds for a plan.

        ``canonical`` is one of them, in fp32. Graphs of ``trt8`` in fp16 are in float32 until a
        flag of the builder says otherwise, so they are those of fp32 too.
        """
        for name in names:
            plans = (plan, "fp16") if (name, plan) == ("trt8", "fp32") else (plan,)
            for wanted in plans:
                for dialect in (self.manifest.canonical, *self.manifest.dialects):
                    if (dialect.name, dialect.plan) == (name, wanted):
                        return dialect
        held = ", ".join(f"{d.plan} ({d.name})" for d in self.manifest.dialects)
        raise BundleError(
            "plan-missing",
            f"{self.path.name} has no plan {plan!r} for {' or '.join(names)}",
            why=f"it holds {held}",
            fix=f"choose a plan it holds, or `refedge quantize` with --dialect {names[0]}",
        )


def open_bundle(path: str | Path) -> Bundle:
    """Read and verify the bundle in a folder."""
    folder = Path(path)
    manifest_file = folder / MANIFEST
    if not manifest_file.is_file():
        raise BundleError(
            "bundle-missing",
            f"{folder} is not a bundle",
            why=f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder",
            fix="give the folder that `refedge export` has written",
        )
    manifest = decode_manifest(manifest_file.read_bytes())
    for name, spec in manifest.files.items():
        _verify(folder, name, spec)
    return Bundle(folder, manifest)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            total.update(piece)
    return total.hexdigest()


def _verify(folder: Path, name: str, spec: FileSpec) -> None:
    parts = PurePosixPath(name).parts
    path = folder / name
    if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name:
        raise _changed(folder, name, "its name leads out of the bundle")
    if not path.is_file() or path.is_symlink():
        raise _changed(folder, name, "it is missing")
    size = path.stat().st_size
    if size != spec.bytes:
        raise _changed(folder, name, f"it has {size} bytes, the manifest says {spec.bytes}")
    if sha256_of(path) != spec.sha256:
        raise _changed(folder, name, "its sha256 is not the manifest's")


def _changed(folder: Path, name: str, why: str) -> BundleError:
    return BundleError(
        "bundle-damaged",
        f"{name} in {folder} is not the file that was exported",
        why=why,
        fix="copy the bundle again, or export it anew",
    )
