"""Factors from samples: what they bring, and where there are none."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from refedge.calibration.equalization import LIMIT, Channels, channel_scales
from refedge.calibration.placement import place
from refedge.calibration.ranges import step, weight_scales
from refedge.export.equalize import equalize
from refedge.export.graph import GraphIndex
from refedge.export.qdq import write_qdq
from refedge.runtime.plan import ChannelScale, PartPlan, WeightScale

from ..export.small_graphs import node, run, small

C = 8
SPREAD = np.geomspace(1.0, 100.0, C).astype(np.float32)  # ranges of the channels of the map
RNG = np.random.default_rng(0)
X = {"x": RNG.normal(size=(1, 3, 12, 12)).astype(np.float32)}


def network(*, last: str = "Conv") -> onnx.ModelProto:
    """Channels of very different size, between two layers that could make them alike."""
    first = RNG.normal(size=(C, 3, 1, 1)).astype(np.float32) * SPREAD[:, None, None, None]
    second = RNG.normal(size=(4, C, 1, 1)).astype(np.float32) / SPREAD[:, None, None]
    nodes = [node("Conv", ["x", "a"], "h"), node(last, ["h", "b"], "y")]
    if last == "Gelu":
        nodes = [node("Conv", ["x", "a"], "h"), node("Gelu", ["h"], "y")]
    weights = {"a": first} | ({"b": second} if last == "Conv" else {})
    return small(nodes, {"x": ("batch", 3, 12, 12)}, ["y"], weights)


def int8_error(model: onnx.ModelProto, channels: tuple[ChannelScale, ...]) -> float:
    """Relative error of the output when everything is in int8, ranges by what X shows."""
    wanted = run(model, X)["y"]
    changed = equalize(model, channels)
    index = GraphIndex(changed)
    found = place(index)
    kinds = dict.fromkeys((n for n in (*found.inputs, *found.stored) if n != "x"), 1)
    seen = {**run(changed, X, kinds), **X}
    scales = {n: step(float(np.abs(seen[n]).max())) for n in (*found.inputs, *found.stored)}
    weights = {
        w: WeightScale(a, weight_scales(index.constant(w), a)) for w, a in found.weights.items()
    }
    plan = PartPlan("", found.int8, found.high, scales, found.stored, weights)
    got = run(write_qdq(changed, plan, unsigned=True, stored=True), X)["y"]
    return float(np.abs(got - wanted).mean() / np.abs(wanted).mean())


def test_small_channels_are_no_longer_lost() -> None:
    """Each channel's share of the output is alike, its share of the map is not: with one step for
    all, the small ones are rounded to a few levels."""
    model = network()
    (scale,) = channel_scales(model, ["x", "h"], [X])
    assert scale.tensors == {"h": 1}
    assert scale.readers == scale.writers == ()
    assert min(scale.factors) == pytest.approx(1.0)
    assert np.argmin(scale.factors) == C - 1  # the largest stays as it is
    assert int8_error(model, (scale,)) < 0.5 * int8_error(model, ())


def test_no_factors_where_a_product_would_be_needed_for_one_tensor() -> None:
    assert channel_scales(network(last="Gelu"), ["x", "h"], [X]) == ()


def test_streams_that_need_a_product_can_be_left_out() -> None:
    """Two maps gain and one reader, a Gelu, needs a product: only where products are allowed."""
    first = RNG.normal(size=(C, 3, 1, 1)).astype(np.float32) * SPREAD[:, None, None, None]
    second = RNG.normal(size=(4, C, 1, 1)).astype(np.float32) / SPREAD[:, None, None]
    nodes = [node("Conv", ["x", "a"], "h"), node("Relu", ["h"], "r"), node("Gelu", ["r"], "g")]
    nodes += [node("Conv", ["r", "b"], "y"), node("Conv", ["g", "b"], "z")]
    shape = {"x": ("batch", 3, 12, 12)}
    model = small(nodes, shape, ["y", "z"], {"a": first, "b": second})
    (scale,) = channel_scales(model, ["x", "h", "r"], [X])
    assert scale.readers == ("r",)
    assert channel_scales(model, ["x", "h", "r"], [X], products=False) == ()


def test_no_factors_for_what_is_not_quantized() -> None:
    assert channel_scales(network(), ["x"], [X]) == ()


def test_an_empty_channel_has_a_bounded_factor() -> None:
    model = network()
    first = GraphIndex(model).constant("a").copy()
    first[0] = 0.0
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(first, "a"))
    (scale,) = channel_scales(model, ["h"], [X])
    assert 1.0 < scale.factors[0] <= LIMIT


def test_statistics_do_not_depend_on_how_samples_come() -> None:
    values = RNG.normal(size=(4, C, 3, 3)).astype(np.float32)
    together, apart = Channels(), Channels()
    together.add(values, 1)
    for sample in values:
        apart.add(sample[None], 1)
    np.testing.assert_allclose(together.largest, np.abs(values).max((0, 2, 3)))
    np.testing.assert_allclose(apart.largest, together.largest)
    np.testing.assert_allclose(apart.power, together.power)
