"""The CUDA kernels' source, compiled for this machine and called with NumPy arrays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from refedge.plugins import reference
from refedge.plugins.quick import FLOAT32, Pass

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).parent / "emulation" / "emulate.cpp"
OPERATORS = ("CrossAttention", "NormAttention", "MutualAttention")
TYPES = ("float32", "float16", "bfloat16")
GUARD = 256  # bytes around an array that nothing may write


Place = Callable[[int, int], np.ndarray]  # so many bytes, for elements of so many


class Call(ctypes.Structure):
    """``refedge::Call`` of ``plugins/kernels/call.h``."""

    _fields_ = (
        ("inputs", ctypes.c_void_p * 6),
        ("outputs", ctypes.c_void_p * 2),
        ("work", ctypes.c_void_p),
        ("parts", ctypes.c_void_p * 6),
        *((name, ctypes.c_int) for name in (
            "batch", "pixels", "channels", "words", "heads", "width", "word", "chunks", "span",
            "fits",
        )),
        ("epsilon", ctypes.c_float),
    )  # fmt: skip


class Launch(ctypes.Structure):
    """``refedge::Launch``."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_int * 3),
        ("shared", ctypes.c_int),
    )


class Plan(ctypes.Structure):
    """``refedge::Plan``."""

    _fields_ = (
        ("launch", Launch * 4),
        ("launches", ctypes.c_int),
        ("workspace", ctypes.c_ulonglong),
    )


@cache
def library() -> ctypes.CDLL:
    """Compile once per source; skips without a compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        import pytest  # not on every GPU host, whose checks use what is below

        pytest.skip("no g++ to compile the kernels' source for this machine")
    parts = [SOURCE, *sorted((ROOT / "plugins" / "kernels").glob("*.[hc]*"))]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in parts if p.is_file())).hexdigest()
    found = Path(tempfile.gettempdir()) / f"refedge-emulation-{os.getuid()}-{digest[:16]}.so"
    if not found.exists():
        made = found.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w"]
        flags += ["-fsanitize=alignment,bounds,signed-integer-overflow,shift,null"]
        flags += ["-fsanitize-undefined-trap-on-error"]
        subprocess.run([compiler, *flags, "-o", str(made), str(SOURCE), "-ldl"], check=True)
        made.rename(found)
    loaded = ctypes.CDLL(str(found))
    loaded.refedge_workspace.restype = ctypes.c_longlong
    return loaded


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values in an operator's type; bfloat16 as its bits, rounded to nearest even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(values, dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def shape_of(operator: str, feeds: list[np.ndarray]) -> tuple[dict[str, int], list[Any]]:
    """The call's sizes and the outputs' shapes."""
    if operator == "CrossAttention":
        (b, n, c), (_, h, t, d) = feeds[0].shape, feeds[2].shape
        sizes = {"batch": b, "pixels": n, "channels": c, "words": t, "heads": h, "width": d}
        return sizes, [(b, n, d)]
    if operator == "NormAttention":
        (b, c, n), t = feeds[0].shape, feeds[1].shape[1]
        sizes = {"batch": b, "pixels": n, "channels": c, "words": t, "heads": 1, "width": 1}
        return sizes, [(b, c, n), (b, n)]
    (b, h, t, d), n = feeds[0].shape, feeds[3].shape[3]
    sizes = {"batch": b, "pixels": n, "channels": 1, "words": t, "heads": h, "width": d}
    return sizes, [(b, t, n), (b, t, n)]


def kinds_of(dtype: str) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """What holds an operator's type, bfloat16 as bits, and what is float32 in any."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype), np.dtype(np.float32)


def placed(values: np.ndarray, place: Place) -> np.ndarray:
    """The same array, in bytes that ``place`` gives."""
    found = place(values.nbytes, values.itemsize).view(values.dtype).reshape(values.shape)
    found[...] = values
    return found


def run_call(
    operator: str,
    feeds: list[np.ndarray],
    dtype: str,
    place: Place,
    work: Place,
    *,
    epsilon: float = 1e-5,
    order: int = 0,
) -> list[np.ndarray]:
    """Run the kernels; ``place`` gives inputs and outputs their bytes, ``work`` the workspace."""
    sizes, shapes = shape_of(operator, feeds)
    call, kept, found = Call(**sizes, epsilon=epsilon), [], []
    for i, values in enumerate(feeds):
        whole = values.dtype in (bool, np.int32)  # the words
        kept.append(placed(values if whole else to_bits(values, dtype), place))
        call.word = values.itemsize if whole else call.word
        call.inputs[i] = kept[i].ctypes.data
    for i, (shape, kind) in enumerate(zip(shapes, kinds_of(dtype), strict=False)):
        size = int(np.prod(shape)) * kind.itemsize
        found.append(place(size, kind.itemsize).view(kind).reshape(shape))
        call.outputs[i] = found[i].ctypes.data
    which = OPERATORS.index(operator), TYPES.index(dtype)
    size = library().refedge_workspace(*which, ctypes.byref(call))
    if size < 0:
        raise ValueError(f"refused: {sizes}")
    room = work(size, 1)
    call.work = room.ctypes.data
    status = library().refedge_emulate(*which, ctypes.byref(call), order)
    assert status == 0, status
    return [from_bits(values.copy()) for values in found]


def run_pass(
    one: Pass,
    tensors: Mapping[str, np.ndarray],
    dtype: str,
    place: Callable[[str, int, int], np.ndarray],
    *,
    order: int = 0,
) -> dict[str, np.ndarray]:
    """What a pass of ``plugins/quick.py`` makes of its inputs, in bytes that ``place`` gives."""
    kind, single = kinds_of(dtype)
    lengths = one.lengths({name: tensors[name].shape for name in one.inputs})
    grid, shared = one.launch(lengths, kind.itemsize)
    made = {}
    for name, letters in one.outputs.items():
        form = single if name in FLOAT32 else kind
        shape = tuple(lengths[letter] for letter in letters)
        size = int(np.prod(shape)) * form.itemsize
        made[name] = place(name, size, form.itemsize).view(form).reshape(shape)
    arguments: list[Any] = [ctypes.c_void_p(tensors[n].ctypes.data) for n in one.inputs]
    arguments += [ctypes.c_int(lengths[letter]) for letter in one.integers]
    arguments += [ctypes.c_void_p(values.ctypes.data) for values in made.values()]
    pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    entry, blocks = f"{one.kernel}_{dtype}".encode(), (ctypes.c_int * 3)(*grid)
    assert library().refedge_quick(entry, pointers, blocks, shared, order) == 0
    return made


class Fences:
    """Places for arrays: bytes full of ones, with more of them on both sides, which ``check`` sees.

    shift: elements by which places miss a multiple of 64 bytes.
    """

    def __init__(self, shift: int = 0) -> None:
        self._shift = shift
        self._rooms: list[tuple[np.ndarray, int, int]] = []

    def place(self, size: int, item: int) -> np.ndarray:
        room = np.full(size + 2 * GUARD, 0xFF, np.uint8)
        first = GUARD // 2 + -(room.ctypes.data + GUARD // 2) % 64 + self._shift * item
        self._rooms.append((room, first, first + size))
        return room[first : first + size]

    def check(self) -> None:
        for room, first, end in self._rooms:
            assert (room[:first] == 0xFF).all()
            assert (room[end:] == 0xFF).all()


def emulate(
    operator: str,
    feeds: list[np.ndarray],
    dtype: str = "float32",
    *,
    epsilon: float = 1e-5,
    order: int = 0,
    shift: int = 0,
) -> list[np.ndarray]:
    """Run the kernels between fences.

    shift: elements by which all pointers but the workspace's miss an aligned address.
    """
    fences, work = Fences(shift), Fences()
    places = {"place": fences.place, "work": work.place}
    found = run_call(operator, feeds, dtype, **places, epsilon=epsilon, order=order)
    fences.check()
    work.check()
    return found


REFERENCES: dict[str, Callable[..., Any]] = {
    "CrossAttention": reference.cross_attention,
    "NormAttention": reference.norm_attention,
    "MutualAttention": reference.mutual_attention,
}
# norms of differences over norms: a few roundings of the type's significand (2^-24, 2^-11, 2^-8)
BARS = {"float32": 2e-6, "float16": 1.5e-3, "bfloat16": 1.2e-2}
Feeds = list[np.ndarray]


def make(operator: str, sizes: tuple[int, ...], seed: int = 0, padded: bool = True) -> Feeds:
    """Random inputs for batch, pixels, channels, words, heads, width; scores of order one."""
    b, n, c, t, h, d = sizes
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    words = np.arange(t)[None] < (rng.integers(1, t + 1, (b, 1)) if padded else t)
    if operator == "CrossAttention":
        keys, values = normal(b, c, h, t) / c**0.5, normal(b, h, t, d)
        return [normal(b, n, c), keys, values, words, normal(b, h, t)]
    if operator == "NormAttention":
        gate = [normal(c, c) / c**0.5 for _ in range(2)]
        return [normal(b, c, n), normal(b, t, c) / c**0.5, normal(b, c, t), words, *gate]
    keys = normal(b, h, t, d) / d**0.5
    return [keys, normal(b, h, t, d), words, normal(b, h, d, n), normal(b, h, n, d)]


def wanted(operator: str, feeds: Feeds, dtype: str) -> list[np.ndarray]:
    """The definition, on inputs rounded to the type."""
    rounded = [v if v.dtype == bool else from_bits(to_bits(v, dtype)) for v in feeds]
    found = REFERENCES[operator](*rounded)
    return list(found) if isinstance(found, tuple) else [found]
