from __future__ import annotations

import tracemalloc
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from refedge.calibration import statistics
from refedge.calibration.statistics import BINS, Collector, Histogram
from refedge.errors import ExportError
from refedge.export.graph import GraphIndex

from ..export.small_graphs import node, small

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
batches = st.lists(
    arrays(np.float32, array_shapes(max_dims=3, max_side=6), elements=finite), max_size=4
)


def histogram(values: Iterable[np.ndarray]) -> Histogram:
    made = Histogram()
    for value in values:
        made.add(value)
    return made


def by_numpy(values: list[np.ndarray], limit: float) -> np.ndarray:
    """np.histogram in float64, where every edge is exact because the limit is a power of two."""
    flat = np.concatenate([np.abs(v.astype(np.float64)).ravel() for v in values])
    return np.histogram(flat, bins=BINS, range=(0.0, limit))[0]


@given(batches)
@example([np.float32([2.0**25]), np.float32([2.0**25 + 4])])  # the first limit, then beyond it
@settings(max_examples=200, deadline=None)
def test_counts_are_those_of_numpy(values: list[np.ndarray]) -> None:
    found = histogram(values)
    total = sum(v.size for v in values)
    assert found.counts.sum() == total
    assert found.counts.shape == (BINS,)
    assert found.largest == max((float(np.abs(v).max()) for v in values), default=0.0)
    if found.largest == 0.0:
        assert found.limit == 0.0
        assert found.counts[0] == total
        return
    assert np.log2(found.limit) == np.rint(np.log2(found.limit))
    assert found.largest <= found.limit
    assert np.array_equal(found.counts, by_numpy(values, found.limit))


@given(batches.filter(lambda v: any(a.any() for a in v)), st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_order_does_not_matter(values: list[np.ndarray], random: object) -> None:
    """But for the limit, which the first value may have put higher."""
    mixed = list(values)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    one, two = sorted((histogram(values), histogram(mixed)), key=lambda h: h.limit)
    assert one.largest == two.largest
    assert np.array_equal(by_numpy(values, two.limit), two.counts)


def test_the_range_doubles_and_loses_nothing() -> None:
    found = histogram([np.float32([0.75])])
    assert found.limit == 1.0
    assert found.counts[BINS * 3 // 4] == 1
    found.add(np.float32([-3.0, 0.25]))
    assert found.limit == 4.0
    assert found.largest == 3.0
    assert {int(i): int(found.counts[i]) for i in np.flatnonzero(found.counts)} == {
        BINS // 16: 1,
        BINS * 3 // 16: 1,
        BINS * 3 // 4: 1,
    }


def test_zeros_and_nothing() -> None:
    found = histogram([np.zeros((2, 3), np.float32), np.zeros((0, 3), np.float32)])
    assert (found.limit, found.largest, found.counts[0]) == (0.0, 0.0, 6)
    found.add(np.float32([0.5]))
    # the zeros from before stay in the first bin; a power of two opens the upper half
    assert (found.limit, found.counts[0], found.counts[1024]) == (1.0, 6, 1)


@pytest.mark.parametrize("values", [[1e-45], [1e-45, 3e38], [3.4e38], [1e-40, 2e-38]])
def test_the_ends_of_float32(values: list[float]) -> None:
    """Denormal values once overflowed the bins' arithmetic."""
    found = histogram([np.float32([v]) for v in values])
    assert found.counts.sum() == len(values)
    assert found.largest == float(np.float32(max(values)))


def test_memory_does_not_grow_with_what_was_seen() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=20_000).astype(np.float32)
    found = histogram([values])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for i in range(50):
        found.add(values * i)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    # 51 x 80 kB went through; what is kept is 16 kB of counts, which the first one had already
    assert grown < 40_000
    assert found.counts.sum() == 51 * values.size


def two_steps() -> tuple[object, np.ndarray]:
    weight = np.float32([[1, -2], [3, 0.5]])
    model = small(
        [node("MatMul", ["x", "w"], "m"), node("Relu", ["m"], "y")],
        {"x": ("batch", 2)},
        ["y"],
        {"w": weight},
    )
    return model, weight


def test_the_collector_sees_every_tensor() -> None:
    model, weight = two_steps()
    collector = Collector(model, ["x", "m", "y"])
    rng = np.random.default_rng(0)
    seen = [rng.normal(size=(1, 2)).astype(np.float32) for _ in range(5)]
    for x in seen:
        collector.add({"x": x, "unrelated": x})
    every = np.concatenate(seen)
    for name, values in (("x", every), ("m", every @ weight), ("y", np.maximum(every @ weight, 0))):
        found = collector.histograms[name]
        assert found.counts.sum() == 10
        # ONNX Runtime's product may differ in the last bit
        assert found.largest == pytest.approx(np.abs(values).max(), rel=1e-6)
    assert len(model.graph.output) == 1  # the model was not changed


def test_many_tensors_are_handed_out_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = two_steps()
    x = np.float32([[0.5, -1.0]])
    whole = Collector(model, ["x", "m", "y"])
    monkeypatch.setattr(statistics, "_MEMORY", 16)  # bytes: two tensors of two floats
    assert statistics._groups(GraphIndex(model), ["x", "m", "y"]) == [["x", "m"], ["y"]]
    parted = Collector(model, ["x", "m", "y"])
    monkeypatch.setattr(statistics, "_MEMORY", 1)  # less than any: one by one
    alone = Collector(model, ["x", "m", "y"])
    for collector in (whole, parted, alone):
        collector.add({"x": x})
    for name, found in whole.histograms.items():
        for other in (parted, alone):
            assert np.array_equal(found.counts, other.histograms[name].counts)
            assert found.largest == other.histograms[name].largest


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused(value: float) -> None:
    model, _ = two_steps()
    collector = Collector(model, ["m"])
    with pytest.raises(ExportError, match="tensor m") as caught:
        collector.add({"x": np.float32([[1.0, value]])})
    assert caught.value.code == "calibrate-infinite"
    assert collector.histograms["m"].counts.sum() == 0
