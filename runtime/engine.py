"""What is said of TensorRT engines: where they were built, from which graphs, with which hashes.

An engine runs on the very kind of machine that built it, so engines lie beside the bundle's own
files, in ``engines/<target>/<plan>/``: ``<part>.engine`` as the builder gave it, and
``engines.json``, this record. It carries a digest of its own bytes and the SHA-256 of every
engine, so that nothing is deserialised that the builder did not write. The bundle's manifest does
not change when engines are built.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..errors import EngineError
from .sealed import BLANK, broken, seal

SCHEMA = 1
RECORD = "engines.json"
FOLDER = "engines"


@dataclass(frozen=True)
class Target:
    """What an engine is bound to.

    tensorrt: full version, ``10.3.0.30``.
    sm:       compute capability times ten: 87 for 8.7.
    device:   the GPU's name, ``Orin``.
    cuda:     ``12.6``, the driver's or, on Jetson, the toolkit's.
    system:   ``linux``; machine: ``aarch64`` or ``x86_64``.
    """

    tensorrt: str
    sm: int
    device: str
    cuda: str
    system: str
    machine: str

    @property
    def name(self) -> str:
        """A folder's name: ``trt10.3.0.30-sm87-orin-cuda12.6-linux-aarch64``."""
        device = re.sub(r"[^a-z0-9]+", "", self.device.lower()) or "gpu"
        return (
            f"trt{self.tensorrt}-sm{self.sm}-{device}-cuda{self.cuda}-{self.system}-{self.machine}"
        )

    def differences(self, other: Target) -> list[str]:
        """What differs, field by field, in words; empty where engines of one run on the other."""
        return [
            f"{key} {mine} here, {theirs} there"
            for key in ("tensorrt", "sm", "device", "cuda", "system", "machine")
            if (mine := getattr(self, key)) != (theirs := getattr(other, key))
        ]


@dataclass(frozen=True)
class Timed:
    """An engine that was built for a part and timed beside another one (``engines/race.py``).

    dialect, graph: name, and SHA-256 of the graph file.
    milliseconds:   median of a run at the usual shapes, inputs on the device; None where no other
                    one could be built, or the two not be timed.
    """

    dialect: str
    graph: str
    milliseconds: float | None


@dataclass(frozen=True)
class EngineSpec:
    """The engine of one part.

    file:    its name beside the record.
    graph:   SHA-256 of the dialect's graph file that it was built from.
    profile: the least, usual and largest batch, as in the manifest, or as it was built.
    largest: largest size of each dynamic dimension, by its symbol; the profile's where it is not.
    memory:  bytes of device memory that a context takes besides the weights.
    layers:  what the inspector said after the build (``docs/engines.md``); not needed to run.
    stripped: its weights were left out; it does not run until they are put in.
    timed:   all that were built for the part, where one had to be chosen; this is the fastest.
    """

    file: str
    graph: str
    bytes: int
    sha256: str
    profile: tuple[int, int, int]
    memory: int
    layers: dict[str, Any] = field(default_factory=dict)
    stripped: bool = False
    timed: tuple[Timed, ...] = ()
    largest: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineSet:
    """The engines of one plan for one target.

    dialect: whose graphs they were built from, but for parts where another one's was faster.
    bundle:  digest of the manifest of the bundle they were built from.
    plugins: libraries that must be loaded first: name to SHA-256.
    flags:   builder flags and options, as they were set.
    """

    plan: str
    dialect: str
    bundle: str
    target: Target
    parts: dict[str, EngineSpec]
    plugins: dict[str, str] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA
    digest: str = BLANK


def encode_engines(record: EngineSet) -> bytes:
    """Indented JSON with its own digest filled in."""
    return seal(record)


def decode_engines(raw: bytes) -> EngineSet:
    """Check the digest, then parse and validate; raises EngineError ``engine-damaged``."""
    if why := broken(raw):
        raise _damaged(why)
    try:
        record = msgspec.json.decode(raw, type=EngineSet)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(str(error)) from error
    if record.schema != SCHEMA:
        raise _damaged(f"it has schema {record.schema}, this version reads {SCHEMA}")
    for spec in record.parts.values():
        if not re.fullmatch(r"[A-Za-z0-9_.-]+\.engine", spec.file):
            raise _damaged(f"it names the file {spec.file!r}")
    return record


def _damaged(why: str) -> EngineError:
    return EngineError(
        "engine-damaged",
        f"the engines' {RECORD} is damaged",
        why=why,
        fix="build the engines again: refedge build",
    )
