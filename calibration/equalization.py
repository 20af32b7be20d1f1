"""How much larger each channel is made before it is quantized, from what samples show.

A stream of maps (``export/equalize.py``) has one factor per channel. Full equalization gives every
channel the range of the largest, which is best for the maps but takes steps away from the weights
behind them; between none and full, each stream gets what disturbs its readers least, by the
variance of uniform rounding (a twelfth of a squared step).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx

from ..export.equalize import Stream, streams
from ..export.graph import GraphIndex, attribute
from ..runtime.plan import ChannelScale
from .statistics import Arrays, Taps

Vector = npt.NDArray[np.float64]

SAMPLES = 64  # that show the ranges of channels
STRENGTHS = (0.5, 0.75, 1.0)
WORTH = 0.95  # of the disturbance without factors: what is above is left alone
LIMIT = 64.0  # no channel is made larger than this; an empty one has no range
_LEVELS = 127


@dataclass
class Channels:
    """What the channels of a tensor hold: largest absolute value, mean square; both [C]."""

    largest: Vector = field(default_factory=lambda: np.zeros(1))
    power: Vector = field(default_factory=lambda: np.zeros(1))
    seen: int = 0

    def add(self, values: npt.NDArray[np.generic], axis: int) -> None:
        """Count one forward's values."""
        others = tuple(i for i in range(values.ndim) if i != axis)
        real = values.astype(np.float64)
        self.largest = np.maximum(self.largest, np.abs(real).max(others))
        self.power = (self.power * self.seen + (real**2).mean(others)) / (self.seen + 1)
        self.seen += 1


def channel_scales(
    model: onnx.ModelProto,
    quantized: Iterable[str],
    inputs: Iterable[Arrays],
    products: bool = True,
) -> tuple[ChannelScale, ...]:
    """Factors for a part's graph.

    quantized: names of the tensors that a plan quantizes. inputs: of some calibration samples.
    products: whether streams count that need one, which takes time when the model runs.
    """
    index, wanted = GraphIndex(model), frozenset(quantized)
    found = [s for s in streams(index) if _useful(s, wanted, products)]
    axes = {name: axis for stream in found for name, axis in stream.tensors.items()}
    seen = {name: Channels() for name in axes}
    taps = Taps(model, axes)
    for taken in inputs:
        for name, value in taps.values(taken):
            seen[name].add(value, axes[name])
    chosen = [_factors(index, stream, wanted, seen) for stream in found]
    return tuple(scale for scale in chosen if scale is not None)


def _useful(stream: Stream, quantized: frozenset[str], products: bool) -> bool:
    """Products cost time: more tensors have to gain from the factors than products are needed."""
    needed = len(stream.readers) + len(stream.writers)
    return len(quantized & stream.tensors.keys()) > needed <= 2 * products


def _factors(
    index: GraphIndex, stream: Stream, quantized: frozenset[str], seen: dict[str, Channels]
) -> ChannelScale | None:
    """The best factors of a stream; None where they bring next to nothing."""
    tops = [seen[name].largest for name in stream.tensors if name in quantized]
    shares = [top / top.max() for top in tops if top.max() > 0.0]
    if not shares:
        return None
    share = np.maximum(np.max(shares, axis=0), 1.0 / LIMIT)
    readers = _readers(index, stream)

    def disturbance(strength: float) -> float:
        factors = share**-strength
        steps = np.array([(factors * top).max() / _LEVELS for top in tops])
        rounding = float((steps**2).sum()) / 12.0
        return sum(_noise(w, factors, rounding, seen[name].power) for name, w in readers)

    best = min(STRENGTHS, key=disturbance)
    if not readers or disturbance(best) > WORTH * disturbance(0.0):
        return None
    factors = tuple((share**-best).astype(np.float32).tolist())
    return ChannelScale(stream.tensors, factors, stream.readers, stream.writers)


def _readers(index: GraphIndex, stream: Stream) -> list[tuple[str, npt.NDArray[np.float64] | None]]:
    """Tensors that weights read, with the weights [O, C, K]; None for what keeps channels apart."""
    found: list[tuple[str, npt.NDArray[np.float64] | None]] = []
    for name in stream.tensors:
        for node in index.readers[name]:
            if node.op_type not in ("Conv", "MatMul", "InstanceNormalization"):
                continue
            weight = index.weight_of(node)
            if weight is None or attribute(node, "group", 1) != 1:
                found.append((name, None))
                continue
            values = index.doubles(weight)
            values = values.T if node.op_type == "MatMul" else values
            found.append((name, values.reshape(*values.shape[:2], -1)))
        if name in stream.readers:
            found.append((name, None))
    return found


def _noise(
    weights: npt.NDArray[np.float64] | None, factors: Vector, rounding: float, power: Vector
) -> float:
    """What a reader's output has of rounding, over what it has of signal."""
    if weights is None:
        return float((rounding / factors**2).sum() / max(power.sum(), 1e-30))
    squares = (weights**2).sum(2)
    from_map = rounding * (squares / factors**2).sum()
    steps = np.abs(weights / factors[:, None]).max((1, 2)) / _LEVELS
    from_weights = (steps**2).sum() / 12.0 * (factors**2 * power).sum() * weights.shape[2]
    return float((from_map + from_weights) / max(float((squares @ power).sum()), 1e-30))
