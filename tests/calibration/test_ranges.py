from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from refedge.calibration.ranges import (
    LEVELS,
    METHODS,
    entropy,
    minmax,
    mse,
    percentile,
    scale_of,
    step,
    weight_scales,
)
from refedge.calibration.statistics import BINS, Histogram

RNG = np.random.default_rng(7)
COUNT = 199_999  # no whole number of them is any of the percentages below
KNOWN = {
    "normal": RNG.normal(size=COUNT),
    "uniform": RNG.uniform(-3, 3, COUNT),
    "laplace": RNG.laplace(size=COUNT),
    "relu": np.maximum(RNG.normal(size=COUNT), 0),
    "outliers": np.concatenate((RNG.normal(size=COUNT - 2), [60.0, -55.0])),
    "heavy tail": RNG.standard_t(5, COUNT),
    "constant": np.full(997, 2.5),
}
some = st.lists(
    st.floats(0, 1e6, width=32, allow_nan=False).filter(lambda v: v == 0 or v > 1e-20),
    min_size=1,
    max_size=50,
)


def histogram(values: np.ndarray) -> Histogram:
    made = Histogram()
    made.add(np.asarray(values, np.float32))
    return made


def squared_error(values: np.ndarray, threshold: float) -> float:
    """Of the quantizer itself, on the values themselves."""
    size = threshold / LEVELS
    return float(((values - np.clip(np.rint(values / size), -128, LEVELS) * size) ** 2).mean())


@pytest.mark.parametrize("name", KNOWN)
def test_minmax_is_the_largest(name: str) -> None:
    assert minmax(histogram(KNOWN[name])) == pytest.approx(np.abs(KNOWN[name]).max(), rel=1e-7)


@pytest.mark.parametrize("share", [50.0, 90.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("name", KNOWN)
def test_percentiles_are_those_of_numpy(name: str, share: float) -> None:
    found = histogram(KNOWN[name])
    magnitudes = np.abs(KNOWN[name].astype(np.float32))
    exact = float(np.percentile(magnitudes, share, method="inverted_cdf"))
    bin_width = found.limit / BINS
    # the upper edge of the bin that holds the exact one, or the largest value if that is less
    assert exact - 1e-6 * exact <= percentile(found, share) <= exact + bin_width + 1e-9


@pytest.mark.parametrize("name", KNOWN)
def test_mse_has_the_least_error(name: str) -> None:
    """Of all cuts, measured on the values and not on the histogram it was chosen by."""
    values = KNOWN[name].astype(np.float32).astype(np.float64)
    chosen = squared_error(values, mse(histogram(values)))
    cuts = np.abs(values).max() * np.linspace(0.2, 1.0, 81)
    least = min(squared_error(values, cut) for cut in cuts)
    # bins are at least 8 times finer than steps, so that bin centres cost a step's error 1/64 of
    # it; 5 % leaves the rest to two cuts of nearly the same error
    assert chosen <= least * 1.05 + (np.abs(values).max() / BINS) ** 2


def test_mse_cuts_a_bell_and_keeps_a_box() -> None:
    """Known from quantizing them: 8-bit normals are best cut near 4 σ, a box at its edge."""
    assert 3.5 <= mse(histogram(KNOWN["normal"])) <= 4.5
    assert mse(histogram(KNOWN["uniform"])) == pytest.approx(3.0, rel=0.02)


def test_mse_meets_an_outlier_half_way() -> None:
    """(t - c)² / n of clipping and (c / 127)² / 12 of rounding are least at c = t / 2, since n =
    199,999 is nearly 12 x 127²."""
    values = np.append(RNG.normal(size=COUNT - 1), 12.0)
    assert mse(histogram(values)) == pytest.approx(6.0, rel=0.1)


@pytest.mark.parametrize("method", [entropy, percentile])
def test_outliers_are_clipped(method: Callable[[Histogram], float]) -> None:
    """Two values in 200,000 at 60 σ must not take the steps from the bell."""
    cut = method(histogram(KNOWN["outliers"]))
    assert 2.5 <= cut <= 12.0


def test_entropy_keeps_a_box_whole() -> None:
    """Nothing is gained by clipping where every value is as likely as any other."""
    assert entropy(histogram(KNOWN["uniform"])) >= 2.9


def test_entropy_is_not_drowned_by_zeros() -> None:
    """Half of what a Relu gives is zero, exactly; zero costs no level."""
    assert entropy(histogram(KNOWN["relu"])) > 2.5


@given(some)
@settings(max_examples=60, deadline=None)
def test_no_method_goes_beyond_the_largest(values: list[float]) -> None:
    found = histogram(np.array(values))
    for name, method in METHODS.items():
        scale = scale_of(found, name)
        assert np.isfinite(scale)
        assert scale > 0
        if found.largest > 0:
            assert 0 < method(found) <= found.largest
            assert scale <= step(found.largest)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_has_a_scale(method: str) -> None:
    assert scale_of(histogram(np.zeros(5)), method) == 2.0**-14
    assert scale_of(Histogram(), method) == 2.0**-14


@given(st.floats(0, 65504.0 * LEVELS, allow_nan=False))
@settings(max_examples=300, deadline=None)
def test_steps_are_float16_and_never_clip(threshold: float) -> None:
    found = step(threshold)
    assert float(np.float16(found)) == found
    assert found * LEVELS >= threshold * (1 - 1e-15)  # 127 x has one rounding in float64
    # the next float16 below would clip, or is not normal any more
    below = float(np.nextafter(np.float16(found), np.float16(0)))
    assert below < threshold / LEVELS or found == 2.0**-14


@pytest.mark.parametrize("threshold", [8.4e6, 1e9, 3.4e38])
def test_steps_end_where_float16_does(threshold: float) -> None:
    """A mask of -3e38 in a tensor once gave an infinite scale, and a plan nobody could read."""
    assert step(threshold) == 65504.0


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=4, max_side=4),
        elements=st.floats(-1e4, 1e4, width=32),
    ),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_weights_are_never_clipped(weight: np.ndarray, data: st.DataObject) -> None:
    axis = data.draw(st.one_of(st.none(), st.integers(0, weight.ndim - 1)))
    scales = weight_scales(weight, axis)
    if axis is None:
        assert scales == (step(float(np.abs(weight).max())),)
        return
    assert len(scales) == weight.shape[axis]
    for channel, scale in enumerate(scales):
        assert scale == step(float(np.abs(weight.take(channel, axis)).max()))
