"""The pickles inside PyTorch's weight files, read without calling or importing anything.

Every global is a name here, never the thing itself: tensors become records of where their numbers
are, all other objects become ``Thing``s that hold what was put into them. Names that no public
weight file has are refused, and so is every opcode that PyTorch does not write.

``torch.load(weights_only=True)`` calls nothing harmful either. But it hashes what it is given and
builds what it is asked for: with torch 2.13, 3 MB of nested tuples as a key overflow its stack and
end the process, and a file of a few hundred bytes makes it allocate 8 GB.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

_PLAIN = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.POP, pickle.GLOBAL, pickle.BINPERSID),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.BINSTRING),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
)
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_WRAPPERS = (  # what they return is their first argument
    "torch._utils._rebuild_parameter",
    *(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")),
    "torch.jit._pickle.restore_type_tag",
)
# settings, counters and optimizer states that training code saves beside the weights
_BESIDE = (
    *("argparse.Namespace", "collections.Counter", "collections.defaultdict"),
    *("torch.Size", "torch.device", "_codecs.encode", "__builtin__.set", "builtins.set"),
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
)
_KNOWN = {*_DTYPES, *_TENSORS, *_WRAPPERS, *_BESIDE, "collections.OrderedDict"}
SCRIPTED = "__torch__"  # first name of every class of a TorchScript archive


class RefusedError(Exception):
    """Something that no weight file needs; its text names it."""


class Readable(Protocol):
    """What a pickle is read from."""

    def read(self, n: int, /) -> bytes:
        """At most n bytes."""

    def readline(self) -> bytes:
        """Up to the end of a line."""


@dataclass(frozen=True, eq=False)
class Global:
    """The name of a class or function."""

    name: str


@dataclass(eq=False)
class Thing:
    """An object of a class that is not imported, and its attributes."""

    name: str
    state: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of ``count`` numbers, kept in the file under ``key``."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that is still in the file: a view of a storage, in numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, opcode: int) -> Callable[[Any], None]:
        if opcode in _NAMES:
            raise RefusedError(f"the opcode {_NAMES[opcode]}")
        raise pickle.UnpicklingError(f"byte {opcode:#04x} is no pickle opcode")


class Unpickler(pickle._Unpickler):
    """One pickle; ``storages`` are those it speaks of, by key."""

    def __init__(self, file: Readable) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Storage] = {}

    # of the base class, which typeshed does not know
    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[Any], None]
    dispatch = _Opcodes({op[0]: pickle._Unpickler.dispatch[op[0]] for op in _PLAIN})

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in _KNOWN and module.split(".")[0] != SCRIPTED:
            raise RefusedError(full[:100])
        return Global(full)

    def persistent_load(self, pid: Any) -> Any:
        """A storage: its kind, its key, its device, how many numbers, perhaps no view."""
        _, kind, key, _, count, *view = pid
        if pid[0] != "storage" or type(kind) is not Global or kind.name not in _DTYPES:
            raise RefusedError(f"a {pid[0]!r} of {getattr(kind, 'name', kind)!r}"[:100])
        if type(key) is not str or not _natural(count) or any(v is not None for v in view):
            raise ValueError(f"storage {key!r:.20} of {count!r:.20} numbers")
        storage = Storage(_DTYPES[kind.name], key, count)
        known = self.storages.setdefault(key, storage)
        if (known.dtype, known.count) != (storage.dtype, storage.count):
            raise ValueError(f"storage {key} is of two kinds")
        return known

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        name = _name(self.stack.pop())
        if name in _TENSORS:
            self.stack.append(_stored(*arguments[:4]))
        elif name in _WRAPPERS:
            self.stack.append(arguments[0])
        elif name == "collections.OrderedDict":
            pairs = arguments[0] if arguments else ()
            self.stack.append({_key(k): v for k, v in pairs})
        else:
            self.stack.append(Thing(name))

    def load_newobj(self) -> None:
        self.stack.pop()
        self.stack.append(Thing(_name(self.stack.pop())))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Thing:
            target.state = state if type(state) is dict else {}
        elif type(target) is not dict:  # a dict's attributes, such as _metadata, are not kept
            raise ValueError(f"BUILD of a {type(target).__name__}")

    def load_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        items, self.stack = self.stack, self.metastack.pop()
        self.append = self.stack.append
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise ValueError(f"SETITEM of a {type(target).__name__}")
        target.update((_key(k), v) for k, v in zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _name(found: Any) -> str:
    if type(found) is not Global:
        raise RefusedError(f"a {type(found).__name__} as a class")
    return found.name


def _key(key: Any) -> str | int:
    """Keys are hashed, which for a deep tuple overflows the stack."""
    if type(key) is not str and type(key) is not int:
        raise RefusedError(f"a {type(key).__name__} as a key")
    return key


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _stored(storage: Any, offset: Any, shape: Any, strides: Any) -> Stored:
    sizes = (*shape, *strides, offset)
    if type(storage) is not Storage or not all(map(_natural, sizes)) or len(shape) != len(strides):
        raise ValueError("a tensor of impossible sizes")
    count = 1
    for n in shape[:64]:
        count = min(count * n, 1 << 62)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    inside = offset <= storage.count if count == 0 else last < storage.count
    if len(shape) > 64 or count > storage.count or not inside:
        raise ValueError(f"a tensor of {count} numbers from {offset} of {storage.count}")
    return Stored(storage, offset, tuple(shape), tuple(strides))
