"""From a histogram to a scale: where to cut a tensor's range.

A symmetric int8 step is ``threshold / 127``. Cutting below the largest value clips outliers and
makes the steps finer for the rest; the methods differ in how they weigh the two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .statistics import BINS, Histogram

LEVELS = 127
PERCENTILE = 99.99
_SMALLEST = 2.0**-14  # the smallest normal float16
_LARGEST = 65504.0  # the largest


def minmax(histogram: Histogram) -> float:
    """The largest absolute value: nothing is clipped."""
    return histogram.largest


def percentile(histogram: Histogram, share: float = PERCENTILE) -> float:
    """The value below which ``share`` percent of all absolute values lie, at a bin's upper edge."""
    total = histogram.counts.sum()
    reached = np.searchsorted(np.cumsum(histogram.counts), total * share / 100.0)
    edge = (min(int(reached), BINS - 1) + 1) * histogram.limit / BINS
    return float(min(edge, histogram.largest))


def entropy(histogram: Histogram) -> float:
    """The cut whose 128 quantized levels lose least information (Migacz, GTC 2017).

    For every cut, the clipped distribution P is compared with what 128 levels make of it, Q, by
    their Kullback-Leibler divergence.
    """
    counts = histogram.counts.astype(np.float64)
    counts[0] = min(counts[0], counts[1])  # exact zeros are free, and would drown the rest
    last = _last_bin(histogram)
    best, best_loss = last, np.inf
    for cut in range(LEVELS + 1, last + 1, 8):
        loss = _divergence(counts, cut)
        if loss < best_loss:
            best, best_loss = cut, loss
    return float(min(best * histogram.limit / BINS, histogram.largest))


def mse(histogram: Histogram) -> float:
    """The cut with the least mean squared error of rounding and clipping, over bin centres."""
    counts = histogram.counts.astype(np.float64)
    centres = (np.arange(BINS) + 0.5) * histogram.limit / BINS
    candidates = histogram.largest * np.linspace(0.2, 1.0, 81)
    losses = []
    for threshold in candidates:
        size = threshold / LEVELS
        rounded = np.clip(np.rint(centres / size), -128, LEVELS) * size
        losses.append(float((counts * (centres - rounded) ** 2).sum()))
    return float(candidates[int(np.argmin(losses))])


METHODS: dict[str, Callable[[Histogram], float]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def step(threshold: float) -> float:
    """``threshold / 127``, rounded up to a float16.

    Dialects in float16 hold their scales in float16; with such steps every dialect of a plan has
    the very same ones. Rounding up never clips what the threshold did not; only what float16 has no
    step for, thresholds above 8 million, is clipped.
    """
    wanted = min(max(threshold / LEVELS, _SMALLEST), _LARGEST)
    half = np.float16(wanted)
    if float(half) < wanted:
        half = np.nextafter(half, np.float16(np.inf))
    return float(half)


def scale_of(histogram: Histogram, method: str) -> float:
    """The symmetric int8 step of a tensor."""
    return step(METHODS[method](histogram) if histogram.largest > 0.0 else 0.0)


def weight_scales(weight: npt.NDArray[np.generic], axis: int | None) -> tuple[float, ...]:
    """Steps of a constant, per channel or one in all: its largest absolute value over 127."""
    if axis is None:
        return (step(float(np.abs(weight).max())),)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    return tuple(step(float(v)) for v in np.abs(weight).max(axis=others))


def _last_bin(histogram: Histogram) -> int:
    return int(np.flatnonzero(histogram.counts)[-1]) + 1


def _divergence(counts: npt.NDArray[np.float64], cut: int) -> float:
    clipped = counts[:cut].copy()
    clipped[-1] += counts[cut:].sum()
    edges = (np.arange(LEVELS + 2) * cut) // (LEVELS + 1)
    sums = np.add.reduceat(counts[:cut], edges[:-1])
    filled = np.add.reduceat((counts[:cut] > 0).astype(np.float64), edges[:-1])
    means = np.divide(sums, filled, out=np.zeros_like(sums), where=filled > 0)
    expanded = np.repeat(means, np.diff(edges)) * (counts[:cut] > 0)
    p, q = clipped / clipped.sum(), expanded / max(expanded.sum(), 1e-12)
    where = p > 0
    return float((p[where] * np.log(p[where] / np.maximum(q[where], 1e-12))).sum())
