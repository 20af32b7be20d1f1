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
from refedge.plugins.quick import CHAINS

from .emulated import (
    BARS,
    REFERENCES,
    TYPES,
    Feeds,
    from_bits,
    make,
    placed,
    run_call,
    run_pass,
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


class Pages:
    """Places for arrays that end, or begin, at a page without access; bytes full of ones."""

    def __init__(self, ends: bool) -> None:
        self._ends = ends
        self._edges: list[int] = []

    def place(self, size: int, item: int) -> np.ndarray:
        whole = -(-size // PAGE) * PAGE
        held = mmap.mmap(-1, whole + 2 * PAGE)
        start = np.frombuffer(held, np.uint8).ctypes.data
        room = np.frombuffer(held, np.uint8, size, PAGE + (whole - size if self._ends else 0))
        room[:] = 0xFF
        for edge in (start, start + PAGE + whole):
            assert LIBC.mprotect(edge, PAGE, 0) == 0
            self._edges.append(edge)
        return room

    def open(self) -> None:
        """Before the arrays go: what unmaps them may touch all pages."""
        for edge in self._edges:
            LIBC.mprotect(edge, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)


def called(pages: Pages, operator: str, feeds: Feeds, dtype: str, order: int) -> Feeds:
    """As the library calls its kernels."""
    return run_call(operator, feeds, dtype, pages.place, pages.place, order=order)


def passed(pages: Pages, operator: str, feeds: Feeds, dtype: str, order: int) -> Feeds:
    """As the ahead-of-time plugins do, every tensor of theirs between pages."""
    chain = CHAINS[operator]
    given = [v if v.dtype == bool else to_bits(v, dtype) for v in feeds]
    known = dict(zip(chain.inputs, given, strict=True), epsilon=np.float32([1e-5]))
    tensors = {name: placed(value, pages.place) for name, value in known.items()}
    for one in chain.passes.values():
        tensors |= run_pass(one, tensors, dtype, lambda _, *size: pages.place(*size), order=order)
    return [from_bits(tensors[name].copy()) for name in chain.outputs]


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
        pages = Pages(ends)
        found = how(pages, operator, feeds, dtype, order)
        pages.open()
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
