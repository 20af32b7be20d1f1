"""Random calls of the kernels' source whose arrays lie between pages that nobody may touch.

    python -m refedge.tests.plugins.guarded CALLS SEED

Ends with the first call whose results are wrong or not finite, or by a signal where a kernel leaves
an array, the workspace or its shared memory; the call is the last line that was written.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys

import numpy as np
from refedge.plugins.quick import CHAINS, FLOAT32

from .emulated import (
    BARS,
    OPERATORS,
    REFERENCES,
    TYPES,
    Call,
    from_bits,
    library,
    make,
    shape_of,
    to_bits,
    wanted,
)

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PIXELS = (1, 2, 31, 32, 33, 63, 64, 65, 96, 100, 225)
CHANNELS = (1, 3, 8, 24, 31, 32, 33, 40, 64, 65, 96, 104, 128, 136, 160, 256, 264, 384, 392)
WORDS = (1, 2, 3, 7, 15, 17, 20, 29, 30, 31, 32, 33, 34, 36, 40, 64, 65, 100, 127, 128)
WIDTHS = (1, 3, 8, 16, 24, 32, 33, 40, 64, 72, 96, 136)


class Guarded:
    """Bytes that end, or begin, at a page without access."""

    def __init__(self, size: int, ends: bool, fill: int = 0xFF) -> None:
        whole = -(-size // PAGE) * PAGE
        self.map = mmap.mmap(-1, whole + 2 * PAGE)
        start = np.frombuffer(self.map, np.uint8).ctypes.data
        first = PAGE + (whole - size if ends else 0)
        self.bytes = np.frombuffer(self.map, np.uint8, size, first)
        self.bytes[:] = fill
        for edge in (start, start + PAGE + whole):
            assert LIBC.mprotect(edge, PAGE, 0) == 0
        self.edges = start, start + PAGE + whole

    def free(self) -> None:
        for edge in self.edges:
            LIBC.mprotect(edge, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)


def called(
    operator: str, feeds: list[np.ndarray], dtype: str, ends: bool, order: int
) -> list[np.ndarray]:
    """Outputs of an emulated call between guards."""
    sizes, shapes = shape_of(operator, feeds)
    call, rooms = Call(**sizes, epsilon=1e-5), []
    for i, values in enumerate(feeds):
        given = np.ascontiguousarray(values if values.dtype == bool else to_bits(values, dtype))
        rooms.append(Guarded(given.nbytes, ends))
        rooms[-1].bytes[:] = given.reshape(-1).view(np.uint8)
        call.inputs[i] = rooms[-1].bytes.ctypes.data
    kinds = [np.dtype(np.uint16 if dtype == "bfloat16" else dtype), np.dtype(np.float32)]
    made = []
    for i, shape in enumerate(shapes):
        made.append(Guarded(int(np.prod(shape)) * kinds[i].itemsize, ends))
        call.outputs[i] = made[-1].bytes.ctypes.data
    which = OPERATORS.index(operator), TYPES.index(dtype)
    work = Guarded(library().refedge_workspace(*which, ctypes.byref(call)), ends)
    call.work = work.bytes.ctypes.data
    assert library().refedge_emulate(*which, ctypes.byref(call), order) == 0
    found = [
        from_bits(room.bytes.copy().view(kind)).reshape(shape)
        for room, kind, shape in zip(made, kinds, shapes, strict=False)
    ]
    for room in (*rooms, *made, work):
        room.free()
    return found


def passed(
    operator: str, feeds: list[np.ndarray], dtype: str, ends: bool, order: int
) -> list[np.ndarray]:
    """The same by the passes of the ahead-of-time plugins, each tensor of theirs so placed."""
    chain, rooms = CHAINS[operator], []
    kind = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
    tensors: dict[str, np.ndarray] = {}

    def place(name: str, shape: tuple[int, ...], form: np.dtype) -> None:
        rooms.append(Guarded(int(np.prod(shape)) * form.itemsize, ends))
        tensors[name] = rooms[-1].bytes.view(form).reshape(shape)

    given = [v if v.dtype == bool else to_bits(v, dtype) for v in feeds]
    known = dict(zip(chain.inputs, given, strict=True), epsilon=np.float32([1e-5]))
    for name, value in known.items():
        place(name, value.shape, value.dtype)
        tensors[name][...] = value
    for one in chain.passes.values():
        lengths = one.lengths({name: tensors[name].shape for name in one.inputs})
        for name, letters in one.outputs.items():
            form = np.dtype(np.float32) if name in FLOAT32 else kind
            place(name, tuple(lengths[letter] for letter in letters), form)
        arguments: list[ctypes.c_void_p | ctypes.c_int] = [
            *(ctypes.c_void_p(tensors[name].ctypes.data) for name in one.inputs),
            *(ctypes.c_int(lengths[letter]) for letter in one.integers),
            *(ctypes.c_void_p(tensors[name].ctypes.data) for name in one.outputs),
        ]
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        grid, shared = one.launch(lengths, kind.itemsize)
        entry, size = f"{one.kernel}_{dtype}".encode(), (ctypes.c_int * 3)(*grid)
        assert library().refedge_quick(entry, pointers, size, shared, order) == 0
    found = [from_bits(tensors[name].copy()) for name in chain.outputs]
    for room in rooms:
        room.free()
    return found


def chosen(draw: random.Random, operator: str) -> tuple[int, ...]:
    """Batch, pixels, channels, words, heads, width: edges of everything, and some between."""
    pixels = draw.choice([*PIXELS, draw.randint(1, 150), draw.randint(1, 40) * 4])
    channels = draw.choice([*CHANNELS, draw.randint(1, 130), draw.randint(1, 20) * 8])
    words, heads = draw.choice(WORDS), draw.choice([1, 2, 3, 4, 8, 9, 11])
    width = draw.choice([*WIDTHS, draw.randint(1, 100)])
    if draw.random() < 0.05:
        pixels = min(pixels, 40)
        if operator == "NormAttention":
            channels = draw.choice([512, 520, 544, 640, 1000, 1024])
        else:
            width, heads = draw.choice([512, 520, 600, 1024]), min(heads, 3)
    if words > 40:
        pixels, channels, heads = min(pixels, 70), min(channels, 136), min(heads, 4)
    return draw.choice([1, 1, 2]), pixels, channels, words, heads, width


def main(calls: int, seed: int) -> None:
    draw = random.Random(seed)
    for n in range(calls):
        operator, dtype = draw.choice(list(REFERENCES)), draw.choice(TYPES)
        sizes = chosen(draw, operator)
        feeds = make(operator, sizes, seed=n)
        words = feeds[2 if operator == "MutualAttention" else 3]
        which = draw.choice(["first", "any", "none"])
        if which == "any":
            words[:] = np.array([[draw.random() < 0.5 for _ in row] for row in words])
        words[0] &= which != "none"
        ends, order = draw.random() < 0.7, draw.choice([0, 1, 2])
        how = draw.choice([called, passed])
        print(n, how.__name__, operator, dtype, sizes, which, ends, order, flush=True)
        found = how(operator, feeds, dtype, ends, order)
        for one, value in zip(found, wanted(operator, feeds, dtype), strict=True):
            assert np.isfinite(one).all()
            scale = max(np.linalg.norm(value), 0.1 * value.size**0.5)
            # one channel's columns may cancel to a tenth, many channels' errors do not add up;
            # two pixels differ from their mean by a rounding, over itself
            loose = 1.5 if min(sizes[2], sizes[5]) >= 8 else 15.0
            loose = np.inf if operator == "NormAttention" and sizes[1] == 2 else loose
            assert np.linalg.norm(one - value) <= loose * BARS[dtype] * scale


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
