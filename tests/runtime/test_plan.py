from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refedge.errors import BundleError
from refedge.runtime.plan import (
    Calibration,
    ChannelScale,
    PartPlan,
    Plan,
    WeightScale,
    decode_plan,
    encode_plan,
    require_graph,
)

GRAPH = b"the canonical graph"
PART = PartPlan(
    graph=hashlib.sha256(GRAPH).hexdigest(),
    int8=("a/Conv", "a/MatMul"),
    high=("a/Softmax",),
    activations={"x": 0.5, "y": 0.0078125, "z": 65504.0},
    stored=("y",),
    weights={"w": WeightScale(0, (0.25, 1e-4, 3.0)), "v": WeightScale(None, (0.125,))},
    channels=(ChannelScale({"x": 1, "y": 3}, (1.0, 2.0), readers=("y",), writers=("x",)),),
)
PLAN = Plan(
    "int8",
    "fp32",
    {"mask": PART, "text": PartPlan("0" * 64)},
    Calibration("refshapes:calibration", "mse", ("refshapes-1/lite/calibration/0/0",)),
    {"int8_macs": {"all": 0.5}},
)

names = st.text(max_size=8)
steps = st.floats(min_value=0.0, exclude_min=True, allow_infinity=False)
weights = st.builds(
    WeightScale,
    st.one_of(st.none(), st.integers(0, 3)),
    st.lists(steps, min_size=1, max_size=4).map(tuple),
)


@st.composite
def channels(draw: st.DrawFn) -> ChannelScale:
    tensors = draw(st.dictionaries(names, st.integers(0, 3), min_size=1, max_size=3))
    some = st.sets(st.sampled_from(sorted(tensors))).map(sorted).map(tuple)
    factors = draw(st.lists(steps, min_size=1, max_size=3))
    return ChannelScale(tensors, tuple(factors), draw(some), draw(some))


@st.composite
def parts(draw: st.DrawFn) -> PartPlan:
    activations = draw(st.dictionaries(names, steps, max_size=4))
    stored = draw(st.sets(st.sampled_from(sorted(activations)))) if activations else set()
    return PartPlan(
        draw(names),
        tuple(draw(st.lists(names, max_size=3))),
        tuple(draw(st.lists(names, max_size=3))),
        activations,
        tuple(sorted(stored)),
        draw(st.dictionaries(names, weights, max_size=3)),
        channels=tuple(draw(st.lists(channels(), max_size=2))),
    )


def damaged(raw: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        decode_plan(raw)
    assert caught.value.code == "plan-damaged"
    return caught.value.why


def changed(*path: str, value: Any) -> bytes:
    """The plan's JSON with one value exchanged."""
    record = json.loads(encode_plan(PLAN))
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(record).encode()


def test_round_trip() -> None:
    raw = encode_plan(PLAN)
    assert decode_plan(raw) == PLAN
    assert encode_plan(decode_plan(raw)) == raw
    assert raw.endswith(b"}\n")


@given(st.dictionaries(names, parts(), max_size=3), st.sampled_from(("fp16", "fp32")))
@settings(max_examples=100, deadline=None)
def test_any_plan_comes_back(found: dict[str, PartPlan], rest: str) -> None:
    plan = Plan("any", rest, found)
    assert decode_plan(encode_plan(plan)) == plan


def test_the_order_of_tensors_is_kept() -> None:
    """Dialects write nodes in it: a plan from its file gives the very same graphs."""
    part = replace(PLAN.parts["mask"], activations={"b": 0.5, "a": 0.25}, stored=(), factors=())
    read = decode_plan(encode_plan(replace(PLAN, parts={"mask": part})))
    assert list(read.parts["mask"].activations) == ["b", "a"]


@given(st.integers(0, len(encode_plan(PLAN)) - 3))
@settings(max_examples=100, deadline=None)
def test_a_truncated_plan_is_damaged(length: int) -> None:
    """Cut anywhere before its last brace."""
    damaged(encode_plan(PLAN)[:length])


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_anything_else_is_damaged(raw: bytes) -> None:
    damaged(raw)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_byte_is_damaged_or_a_valid_plan(data: st.DataObject) -> None:
    """A plan's own reader cannot see every change, the manifest's digest does; it must not leak
    another error, nor a scale that is no scale."""
    raw = bytearray(encode_plan(PLAN))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        plan = decode_plan(bytes(raw))
    except BundleError as error:
        assert error.code == "plan-damaged"
        return
    for part in plan.parts.values():
        assert all(0 < s < float("inf") for s in part.activations.values())


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf"), None, "2"])
def test_factors_of_channels_are_positive_numbers(factor: Any) -> None:
    channel = {"tensors": {"x": 1}, "factors": [1.0, factor]}
    damaged(changed("parts", "mask", "channels", value=[channel]))


@pytest.mark.parametrize("end", ["readers", "writers"])
def test_a_product_for_channels_of_a_tensor_without_factors(end: str) -> None:
    channel = {"tensors": {"x": 1}, "factors": [2.0], end: ["y"]}
    assert "no factors" in damaged(changed("parts", "mask", "channels", value=[channel]))


@pytest.mark.parametrize("scale", [0, -0.0, -0.5, float("nan"), float("inf"), None, "0.5", [0.5]])
@pytest.mark.parametrize(
    "path",
    [("parts", "mask", "activations", "x"), ("parts", "mask", "weights", "w", "scales")],
)
def test_scales_are_positive_numbers(path: tuple[str, ...], scale: Any) -> None:
    weight = path[-1] == "scales"
    damaged(changed(*path, value=[0.5, scale] if weight else scale))


def test_a_scale_too_large_for_a_float() -> None:
    damaged(encode_plan(PLAN).replace(b"0.0078125", b"1e999"))


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("schema",), 2, "schema 2"),
        (("schema",), "1", "schema"),
        (("rest",), "fp8", "fp8"),
        (("parts", "mask", "stored"), ["nowhere"], "stored"),
        (("parts", "mask", "graph"), 7, "str"),
        (("parts",), [], "object"),
        (("calibration",), {"data": "x"}, "missing"),
    ],
)
def test_foreign_content(path: tuple[str, ...], value: Any, why: str) -> None:
    assert why in damaged(changed(*path, value=value))


def test_a_plan_as_deep_as_a_well() -> None:
    depth = 100_000
    well = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    raw = changed("notes", value="here").replace(b'"here"', well)
    assert raw.count(b"[") > depth
    damaged(raw)


def test_the_plan_of_another_graph() -> None:
    assert require_graph(PLAN, "mask", GRAPH) is PART
    with pytest.raises(BundleError) as caught:
        require_graph(PLAN, "mask", GRAPH + b".")
    assert caught.value.code == "plan-graph"
    assert PART.graph[:16] in caught.value.why
    with pytest.raises(BundleError, match="'image'") as caught:
        require_graph(PLAN, "image", GRAPH)
    assert caught.value.code == "plan-graph"
    assert "mask, text" in caught.value.why
