"""Write a bundle: everything into a folder beside the target, then one rename."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from ..errors import BundleError
from ..runtime.engine import FOLDER
from ..runtime.manifest import MANIFEST, FileSpec, Manifest, encode_manifest


class BundleWriter:
    """A bundle in the making; nothing is seen at the target before ``commit``.

    Use as a context manager: leaving it without a commit removes what was written.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._files: dict[str, FileSpec] = {}

    def __enter__(self) -> BundleWriter:
        target = self.target
        if target.exists() and not (target / MANIFEST).is_file():
            raise BundleError(
                "bundle-target",
                f"{target} is there already and is no bundle",
                why="only bundles are replaced",
                fix="choose another name, or move it away",
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        except OSError as error:
            raise BundleError(
                "bundle-target",
                f"{target} cannot be written",
                why=str(error),
                fix="choose a folder you may write to",
            ) from error
        return self

    def add(self, name: str, content: bytes) -> Path:
        """Write one file; the same name twice must have the same content."""
        spec = FileSpec(len(content), hashlib.sha256(content).hexdigest())
        path = self.folder / name
        if self._files.setdefault(name, spec) != spec:
            raise ValueError(f"{name} was added before with other content")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def copy(self, name: str, source: Path, spec: FileSpec) -> None:
        """Take over a verified file of another bundle.

        A copy, not a link: onnx and ONNX Runtime refuse weights that have two names.
        """
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        self._files[name] = spec

    def commit(self, manifest: Manifest) -> Manifest:
        """Write the manifest with the hashes of all files and put the bundle in its place.

        Engines that were built from the bundle before stay: each names the graph it is of.
        """
        manifest = replace(manifest, files=dict(sorted(self._files.items())))
        (self.folder / MANIFEST).write_bytes(encode_manifest(manifest))
        self.folder.chmod(0o755)
        if self.target.exists():
            old = self.folder.with_name(self.folder.name + ".old")
            os.rename(self.target, old)
            try:
                os.rename(self.folder, self.target)
            except OSError:
                os.rename(old, self.target)
                raise
            if (old / FOLDER).is_dir():
                os.rename(old / FOLDER, self.target / FOLDER)
            shutil.rmtree(old)
        else:
            os.rename(self.folder, self.target)
        return manifest

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
