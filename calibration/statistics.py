"""What the tensors of a graph hold, seen over a calibration set: one pass, bounded memory.

Every tensor keeps a histogram of its absolute values. Its range doubles when a larger value comes,
by adding neighbouring bins, so nothing has to be known beforehand and nothing is kept but bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from ..errors import ExportError
from ..export.graph import GraphIndex, copy_of

Arrays = Mapping[str, npt.NDArray[np.generic]]

BINS = 2048
_MEMORY = 384 << 20  # bytes of tensors that one session hands out at once


@dataclass
class Histogram:
    """Counts of absolute values in equal bins from 0 to ``limit``."""

    limit: float = 0.0
    largest: float = 0.0
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: npt.NDArray[np.generic]) -> None:
        """Count an array's values; not-a-number and infinity are refused by the caller."""
        magnitudes = np.abs(values.astype(np.float32, copy=False)).ravel()
        if magnitudes.size == 0:
            return
        top = float(magnitudes.max())
        self.largest = max(self.largest, top)
        if top > 0.0 and self.limit == 0.0:
            # the power of two above the first value seen, so that ranges only ever double and no
            # value lies on the last edge, which a doubling would move
            self.limit = float(np.ldexp(1.0, np.frexp(np.float64(top))[1]))
        while 0.0 < self.limit <= top:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate((merged, np.zeros(BINS // 2, np.int64)))
            self.limit *= 2.0
        if self.limit == 0.0:
            self.counts[0] += magnitudes.size
            return
        # in float64, because float32 cannot hold 2048 over a very small limit
        per_unit = np.float64(BINS / self.limit)
        bins = np.minimum((magnitudes * per_unit).astype(np.int64), BINS - 1)
        self.counts += np.bincount(bins, minlength=BINS)


class Taps:
    """Runs a graph and hands out tensors from its inside.

    The graph runs without optimisations, so that every tensor exists as the plan names it; tensors
    are handed out in groups that fit into memory, at the price of one forward per group.
    """

    def __init__(self, model: onnx.ModelProto, names: Iterable[str]) -> None:
        groups = _groups(GraphIndex(model), list(names))
        self._sessions = [(group, _session(model, group)) for group in groups]

    def values(self, inputs: Arrays) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        """One forward; ``inputs`` by name. Raises ExportError ``calibrate-infinite``."""
        for names, session in self._sessions:
            taken = {i.name: inputs[i.name] for i in session.get_inputs()}
            for name, value in zip(names, session.run(names, taken), strict=True):
                yield name, _finite(name, np.asarray(value))


class Collector:
    """A histogram per named tensor of a graph, over calibration inputs."""

    def __init__(self, model: onnx.ModelProto, names: Iterable[str]) -> None:
        self.histograms = {name: Histogram() for name in names}
        self._taps = Taps(model, self.histograms)

    def add(self, inputs: Arrays) -> None:
        """One forward; ``inputs`` by name."""
        for name, value in self._taps.values(inputs):
            self.histograms[name].add(value)


def _finite(name: str, value: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    if np.isfinite(value).all():
        return value
    raise ExportError(
        "calibrate-infinite",
        f"the tensor {name} is not finite on a calibration sample",
        why="a scale cannot be chosen for infinity or not-a-number",
        fix="check the weights; the fp32 model itself gives this value",
    )


def _groups(index: GraphIndex, names: list[str]) -> list[list[str]]:
    """Split the tensors so that each group fits the memory, for a batch of one."""
    groups: list[list[str]] = [[]]
    held = 0
    for name in names:
        size = 4 * int(np.prod(index.shape(name) or (1,)))
        if groups[-1] and held + size > _MEMORY:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return [g for g in groups if g]


def _session(model: onnx.ModelProto, names: list[str]) -> onnxruntime.InferenceSession:
    """A session over the same graph with other outputs."""
    changed = copy_of(model)
    del changed.graph.output[:]
    for name in names:
        changed.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # which every session would keep at its largest
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    raw = changed.SerializeToString()
    return onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
