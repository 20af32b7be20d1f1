"""Files of weights as plain ``dict[str, Tensor]``s, under the file's own names.

Read are PyTorch's archives of ``torch.save`` (the zip of today and the format before 1.6), those of
``torch.jit.save`` (whose ``code/`` is not looked at) and safetensors. Numbers come as float32,
whatever float the file has; integers as they are. Nothing of a file is executed (``pickles``), and
what it makes us allocate is bounded by its own size.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...errors import CheckpointError
from .pickles import SCRIPTED, RefusedError, Storage, Stored, Thing, Unpickler
from .refused import damaged, other_layout, runs_code

State = dict[str, Tensor]

_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER, of the format before 1.6
_MOST_NAMES = 100_000
_LONGEST_NAME = 1000
_SHARED = 4  # how much larger the tensors may be than the file: BERT's output layer is its input's


@dataclass(frozen=True)
class _File:
    """What a file's pickle says, and the bytes of a storage."""

    path: Path
    size: int
    content: Any
    numbers: Callable[[Storage], bytes]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                found.update(chunk)
    except OSError as error:
        raise missing(path, error) from error
    return found.hexdigest()


def read_weights(path: Path, *groups: str) -> dict[str, State]:
    """The named groups of a checkpoint, such as ``model`` and ``bert_model``, that it has.

    A bare state dict is given as the first group; the rest of the file is not read.
    """
    if path.suffix == ".safetensors":
        return {groups[0]: _read_safetensors(path)}
    with _opened(path) as file:
        content = file.content
        if type(content) is Thing and content.name.split(".")[0] == SCRIPTED:
            found = {groups[0]: _attributes(path, content)}
        elif type(content) is dict and any(type(content.get(g)) is dict for g in groups):
            found = {g: content[g] for g in groups if type(content.get(g)) is dict}
        elif type(content) is dict and any(type(v) is Stored for v in content.values()):
            found = {groups[0]: content}
        else:
            raise other_layout(
                path,
                f"it holds {_held(content)}",
                f"give a file with {' or '.join(repr(g) for g in groups)} or a state dict",
            )
        _check_budget(file, found)
        return {g: _state(file, records) for g, records in found.items()}


def _held(content: Any) -> str:
    if type(content) is dict:
        return ", ".join(map(str, content))[:200] or "nothing"
    return "a bare tensor" if type(content) is Stored else f"a {type(content).__name__}"


def missing(path: Path, error: OSError) -> CheckpointError:
    """The file cannot be opened."""
    return CheckpointError(
        "weights-missing",
        f"{path} cannot be opened",
        why=error.strerror or str(error),
        fix="give the path of a file that you have downloaded",
    )


def _read_safetensors(path: Path) -> State:
    try:
        found = load_file(path)
    except OSError as error:
        raise missing(path, error) from error
    except (SafetensorError, ValueError) as error:
        raise damaged(path, str(error)) from error
    return {name: as_float32(tensor) for name, tensor in found.items()}


def as_float32(tensor: Tensor) -> Tensor:
    """Floats of any width as float32; anything else as it is."""
    return tensor.float() if tensor.is_floating_point() else tensor


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    """A file of torch; every error inside names it."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise missing(path, error) from error
    with file:
        try:
            zipped = file.read(4) == b"PK\x03\x04"
            yield _zipped(path, file) if zipped else _legacy(path, file)
        except CheckpointError:
            raise
        except RefusedError as error:
            raise runs_code(path, str(error)) from error
        except Exception as error:  # the bytes choose the exception
            raise damaged(path, f"{type(error).__name__}: {error}"[:300]) from error


def _zipped(path: Path, file: IO[bytes]) -> _File:
    """``name/data.pkl`` and ``name/data/KEY``, as torch writes them: not compressed."""
    size = os.fstat(file.fileno()).st_size
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    pickles = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(pickles) != 1 or len(set(names)) < len(names):
        raise damaged(path, "a zip, but not one that torch has written")
    prefix = pickles[0].removesuffix("data.pkl")
    ours = (pickles[0], f"{prefix}data/", f"{prefix}byteorder")
    kept = [e for e in entries if e.filename.startswith(ours)]
    packed = any(e.compress_type != zipfile.ZIP_STORED for e in kept)
    if packed or sum(e.file_size for e in kept) > size:
        raise damaged(path, "its tensors are compressed or overlap, which torch never writes")
    if ours[2] in names and archive.read(ours[2]) != b"little":
        raise damaged(path, "its bytes are in big-endian order")
    reader = Unpickler(io.BytesIO(archive.read(pickles[0])))
    return _File(path, size, reader.load(), lambda s: archive.read(f"{prefix}data/{s.key}"))


def _legacy(path: Path, file: IO[bytes]) -> _File:
    """Five pickles, then the storages in the order of the last pickle: a count, the numbers."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    bounded = _Bounded(file, size)
    magic, protocol, system = (Unpickler(bounded).load() for _ in range(3))
    if magic != _MAGIC or protocol != 1001 or not system.get("little_endian"):
        raise damaged(path, "it is no file of torch.save")
    reader = Unpickler(bounded)
    content = reader.load()
    places: dict[str, int] = {}
    for key in Unpickler(bounded).load():
        storage = reader.storages[key]
        (count,) = struct.unpack("<q", file.read(8))
        places[key] = file.tell()
        end = places[key] + count * storage.dtype.itemsize
        if count != storage.count or end > size:
            raise damaged(path, f"storage {key} is cut short")
        file.seek(end)

    def numbers(storage: Storage) -> bytes:
        file.seek(places[storage.key])
        return file.read(storage.count * storage.dtype.itemsize)

    return _File(path, size, content, numbers)


class _Bounded:
    """A file that is never asked for more than it has: asking alone would allocate."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size

    def read(self, n: int, /) -> bytes:
        return self.file.read(min(n, self.size - self.file.tell()))

    def readline(self) -> bytes:
        line = self.file.readline(_LONGEST_NAME)
        if not line.endswith(b"\n"):
            raise EOFError("a name does not end")
        return line


def _attributes(path: Path, module: Thing) -> dict[str, Stored]:
    """The tensors of a TorchScript module and of the modules in it, by dotted name."""
    found: dict[str, Stored] = {}
    waiting = [("", module)]
    seen = 0
    while waiting:
        prefix, thing = waiting.pop()
        for name, value in thing.state.items():
            seen += 1
            if seen > _MOST_NAMES or len(prefix) > _LONGEST_NAME:
                raise damaged(path, "its modules hold one another without end")
            if type(value) is Stored:
                found[f"{prefix}{name}"] = value
            elif type(value) is Thing:
                waiting.append((f"{prefix}{name}.", value))
    return found


def _check_budget(file: _File, groups: Mapping[str, Mapping[str, Any]]) -> None:
    """Views may share a storage, but not make ever more of it."""
    records = [v for group in groups.values() for v in group.values() if type(v) is Stored]
    total = sum(math.prod(r.shape) * r.storage.dtype.itemsize for r in records)
    if total > _SHARED * file.size:
        raise damaged(file.path, f"a file of {file.size} bytes claims tensors of {total}")


def _state(file: _File, records: Mapping[Any, Any]) -> State:
    """The tensors themselves; a state dict holds nothing else."""
    odd = [str(name) for name, v in records.items() if type(v) is not Stored]
    if odd:
        raise other_layout(
            file.path,
            f"{', '.join(odd[:5])} of its state dict is no tensor",
            "give the file of a model's weights",
        )
    storages: dict[str, Tensor] = {}
    state: State = {}
    for name, record in records.items():
        storage = record.storage
        if storage.key not in storages:
            storages[storage.key] = _numbers(file, storage)
        view = storages[storage.key].as_strided(record.shape, record.strides, record.offset)
        state[str(name)] = as_float32(view).contiguous()
    return state


def _numbers(file: _File, storage: Storage) -> Tensor:
    raw = bytearray(file.numbers(storage))
    if len(raw) != storage.count * storage.dtype.itemsize or sys.byteorder != "little":
        raise damaged(file.path, f"storage {storage.key} has {len(raw)} bytes")
    if not raw:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(raw, dtype=storage.dtype)
