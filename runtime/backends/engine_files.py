"""Engines of a bundle for a machine: found, refused or verified before anything is deserialised."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ...errors import EngineError
from ..bundle import Bundle
from ..engine import FOLDER, RECORD, EngineSet, Target, decode_engines

_FIX = "build engines on this machine: refedge build"


@dataclass(frozen=True)
class Engines:
    """The engines of one plan that fit a machine, and the folder they lie in."""

    folder: Path
    record: EngineSet

    def graph(self, bundle: Bundle, part: str) -> str:
        """SHA-256 of what the engine of a part should be built from: of the dialect that won."""
        spec = self.record.parts.get(part)
        won = [] if spec is None else [t.dialect for t in spec.timed if t.graph == spec.graph]
        dialect = bundle.dialect([*won, self.record.dialect], self.record.plan)
        return bundle.manifest.files[dialect.graphs[part]].sha256

    def read(self, part: str, graph: str) -> bytes:
        """An engine whose size and SHA-256 are the record's, built from a graph of that SHA-256."""
        spec = self.record.parts.get(part)
        if spec is None:
            raise EngineError(
                "engine-missing",
                f"there is no engine of the part {part!r}",
                why=f"there are those of {', '.join(self.record.parts) or 'no part'}",
                fix=_FIX,
            )
        if spec.graph != graph:
            raise EngineError(
                "engine-stale",
                f"the engine of the part {part!r} was built from another graph",
                why="the bundle was exported or quantized again since",
                fix=_FIX,
            )
        if spec.stripped:
            raise EngineError(
                "engine-stripped",
                f"the engine of the part {part!r} has no weights",
                why="it was built with --strip",
                fix="put them in, on this machine: refedge build, without --strip",
            )
        return _read(self.folder / spec.file, spec.sha256, spec.bytes)

    def plugin(self, name: str) -> Path:
        """A plugin library that lies beside the record and has the SHA-256 that it lists."""
        path = self.folder / name
        if Path(name).name != name:
            raise _damaged(path, "its name leads out of the folder")
        _read(path, self.record.plugins[name])
        return path


def find_engines(bundle: Bundle, plan: str, target: Target) -> Engines:
    """The engines of a plan for a machine; EngineError ``engine-missing`` or ``engine-target``.

    A record that names another machine is refused by what differs, wherever it lies.
    """
    folder = bundle.path / FOLDER / target.name / plan
    if (folder / RECORD).is_file():
        record = decode_engines((folder / RECORD).read_bytes())
        differences = target.differences(record.target)
        if differences or record.plan != plan:
            raise _foreign(bundle, plan, differences or [f"plan {plan} here, {record.plan} there"])
        return Engines(folder, record)
    others = sorted((bundle.path / FOLDER).glob(f"*/{plan}/{RECORD}"))
    if not others:
        raise EngineError(
            "engine-missing",
            f"{bundle.path.name} has no engines of the plan {plan!r}",
            why=f"there is none in {FOLDER}/",
            fix=f"{_FIX} {bundle.path.name} --plan {plan}",
        )
    # the record that differs least says the most
    records = [decode_engines(path.read_bytes()) for path in others]
    raise _foreign(bundle, plan, min((target.differences(r.target) for r in records), key=len))


def _foreign(bundle: Bundle, plan: str, differences: list[str]) -> EngineError:
    return EngineError(
        "engine-target",
        f"the engines of {bundle.path.name} were built on another machine",
        why="; ".join(differences),
        fix=f"{_FIX} {bundle.path.name} --plan {plan}",
    )


def _read(path: Path, sha256: str, size: int | None = None) -> bytes:
    try:
        data = b"" if path.is_symlink() else path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    if size is not None and len(data) != size:
        raise _damaged(path, f"it has {len(data)} bytes, the record says {size}")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _damaged(path, "its sha256 is not the record's")
    return data


def _damaged(path: Path, why: str) -> EngineError:
    return EngineError(
        "engine-damaged",
        f"{path.name} is not the file that the builder wrote",
        why=why,
        fix=_FIX,
    )
