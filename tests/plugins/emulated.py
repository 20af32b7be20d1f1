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
GUARD = 64  # elements around an output that nothing may write


class Call(ctypes.Structure):
    """``refedge::Call`` of ``plugins/kernels/call.h``."""

    _fields_ = (
        ("inputs", ctypes.c_void_p * 6),
        ("outputs", ctypes.c_void_p * 2),
        ("work", ctypes.c_void_p),
        ("parts", ctypes.c_void_p * 6),
        *((name, ctypes.c_int) for name in (
            "batch", "pixels", "channels", "words", "heads", "width", "chunks", "span", "fits",
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


def offset(values: np.ndarray, elements: int) -> np.ndarray:
    """The same array, ``elements`` past an address that is a multiple of 64 bytes."""
    room = np.zeros(values.size + elements + 64, values.dtype)
    start = -room.ctypes.data % 64 // values.itemsize + elements
    placed = room[start : start + values.size].reshape(values.shape)
    placed[...] = values
    return placed


def emulate(
    operator: str,
    feeds: list[np.ndarray],
    dtype: str = "float32",
    *,
    epsilon: float = 1e-5,
    order: int = 0,
    shift: int = 0,
) -> list[np.ndarray]:
    """Run the kernels; outputs and workspace start as NaN, outputs have guards around them.

    shift: elements by which all pointers miss an aligned address.
    """
    sizes, shapes = shape_of(operator, feeds)
    given = [offset(v if v.dtype == bool else to_bits(v, dtype), shift) for v in feeds]
    call = Call(**sizes, epsilon=epsilon)
    for i, values in enumerate(given):
        call.inputs[i] = values.ctypes.data
    kinds = [np.dtype(np.uint16 if dtype == "bfloat16" else dtype), np.dtype(np.float32)]
    rooms = []
    for i, shape in enumerate(shapes):
        size = int(np.prod(shape))
        blank = np.full((size + 2 * GUARD) * kinds[i].itemsize, 0xFF, np.uint8).view(kinds[i])
        rooms.append(offset(blank, shift))
        call.outputs[i] = rooms[i].ctypes.data + GUARD * kinds[i].itemsize
    which = OPERATORS.index(operator), TYPES.index(dtype)
    size = library().refedge_workspace(*which, ctypes.byref(call))
    if size < 0:
        raise ValueError(f"refused: {sizes}")
    work = offset(np.full(size + 256, 0xFF, np.uint8), 0)
    call.work = work.ctypes.data
    status = library().refedge_emulate(*which, ctypes.byref(call), order)
    assert status == 0, status
    assert (work[size:] == 0xFF).all(), "wrote past the workspace"
    found = []
    for room, shape in zip(rooms, shapes, strict=True):
        raw = room.view(np.uint8)
        edge = GUARD * room.itemsize
        assert (raw[:edge] == 0xFF).all()
        assert (raw[-edge:] == 0xFF).all()
        found.append(from_bits(room[GUARD:-GUARD]).reshape(shape))
    return found


def run_pass(
    one: Pass,
    tensors: dict[str, np.ndarray],
    dtype: str,
    *,
    order: int = 0,
    shift: Mapping[str, int] = {},
) -> dict[str, np.ndarray]:
    """What a pass of ``plugins/quick.py`` makes of its inputs; outputs as those of ``emulate``.

    shift: as there, of an output by its name.
    """
    kind = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
    lengths = one.lengths({name: tensors[name].shape for name in one.inputs})
    grid, shared = one.launch(lengths, kind.itemsize)
    arguments: list[Any] = [ctypes.c_void_p(tensors[n].ctypes.data) for n in one.inputs]
    arguments += [ctypes.c_int(lengths[letter]) for letter in one.integers]
    rooms, made = {}, {}
    for name, letters in one.outputs.items():
        form = np.dtype(np.float32) if name in FLOAT32 else kind
        shape = tuple(lengths[letter] for letter in letters)
        blank = np.full((int(np.prod(shape)) + 2 * GUARD) * form.itemsize, 0xFF, np.uint8)
        rooms[name] = offset(blank.view(form), shift.get(name, 0))
        made[name] = rooms[name][GUARD:-GUARD].reshape(shape)
        arguments.append(ctypes.c_void_p(made[name].ctypes.data))
    pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    size = (ctypes.c_int * 3)(*grid)
    entry = f"{one.kernel}_{dtype}".encode()
    assert library().refedge_quick(entry, pointers, size, shared, order) == 0
    for name, room in rooms.items():
        raw, edge = room.view(np.uint8), GUARD * room.itemsize
        assert (raw[:edge] == 0xFF).all(), name
        assert (raw[-edge:] == 0xFF).all(), name
    return made


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
