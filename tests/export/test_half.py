from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from refedge.calibration.placement import HIGH
from refedge.export.dialects import write_dialect
from refedge.export.half import half, store_half, to_half
from refedge.export.qdq import write_qdq
from refedge.runtime.bundle import open_bundle
from refedge.runtime.plan import PartPlan, WeightScale, decode_plan

from .small_graphs import node, run, small

RNG = np.random.default_rng(3)
WEIGHTS = {
    "k": RNG.normal(size=(4, 4, 3, 3)).astype(np.float32) * 0.2,
    "w": RNG.normal(size=(12, 12)).astype(np.float32) * 0.2,
    "gamma": np.ones(12, np.float32),
    "sizes": np.float32([1, 1, 2, 2]),
    "low": np.float32(-1e9),
    "three": np.int64([3]),
    "zero": np.float32(0),
}


def network() -> onnx.ModelProto:
    """Bytes in, a mask, a norm, a resize, a choice: every kind of node that needs thought."""
    return small(
        [
            node("Cast", ["pixels"], "x", to=TensorProto.FLOAT),
            node("Conv", ["x", "k"], "c", "stem", pads=[1, 1, 1, 1]),
            node("Resize", ["c", "", "sizes"], "r", "stem", mode="nearest"),
            node("LayerNormalization", ["r", "gamma"], "n", "norm"),
            node("MatMul", ["n", "w"], "m", "head"),
            node("Where", ["words", "m", "low"], "s", "head"),
            node("Softmax", ["s"], "p", "head"),
            node("TopK", ["m", "three"], ["best", "which"], "head"),
            node("Equal", ["m", "zero"], "none", "head"),
            node("Cast", ["none"], "count", "head", to=TensorProto.FLOAT),
            node("Add", ["p", "count"], "y", "head"),
            node("Relu", ["best"], "z", "head"),
        ],
        {"pixels": (1, 4, 6, 6), "words": (1, 1, 1, 12)},
        ["y", "z"],
        WEIGHTS,
        {"pixels": TensorProto.UINT8, "words": TensorProto.BOOL},
    )


def high_of(model: onnx.ModelProto) -> tuple[str, ...]:
    return tuple(n.name for n in model.graph.node if n.op_type in HIGH)


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Of every tensor, by onnx's own inference, which refuses what is not typed right."""
    onnx.checker.check_model(model, full_check=True)
    typed = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    values = (*typed.graph.value_info, *typed.graph.input, *typed.graph.output)
    found = {v.name: v.type.tensor_type.elem_type for v in values}
    return found | {t.name: t.data_type for t in model.graph.initializer}


def precision_of(node: onnx.NodeProto, kinds: dict[str, int]) -> set[int]:
    """Float types that a node reads, without Resize's factors, which are always float32."""
    data = node.input[:1] if node.op_type == "Resize" else node.input
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16}
    return {kinds[i] for i in data if i and kinds[i] in floats}


def require_typed(model: onnx.ModelProto, high: set[str]) -> None:
    """High nodes read float32 and nothing else, all others float16; borders are float32."""
    kinds = types(model)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type != TensorProto.FLOAT16
        assert kinds[value.name] == value.type.tensor_type.elem_type
    for made in model.graph.node:
        if made.op_type in ("Cast", "QuantizeLinear", "DequantizeLinear"):
            continue
        wanted = TensorProto.FLOAT if made.name in high else TensorProto.FLOAT16
        assert precision_of(made, kinds) <= {wanted}, made.name
    casts = [
        (n.input[0], a.i) for n in model.graph.node if n.op_type == "Cast" for a in n.attribute
    ]
    assert max(Counter(casts).values()) == 1  # one per tensor and direction, whoever reads it


def pixels() -> dict[str, np.ndarray]:
    words = np.arange(12).reshape(1, 1, 1, 12) < 7
    return {"pixels": RNG.integers(0, 4, (1, 4, 6, 6), np.uint8), "words": words}


def test_a_typed_graph() -> None:
    model = network()
    high = high_of(model)
    given = pixels()
    wanted = run(model, given)
    out = to_half(network(), high)
    require_typed(out, set(high))
    found = run(out, given)
    for name, value in wanted.items():
        assert found[name].dtype == np.float32
        # float16 keeps 11 bits; sums of 36 and of 12 products come out to about three digits
        np.testing.assert_allclose(found[name], value, rtol=2e-2, atol=2e-2)


def test_everything_high_is_the_same_graph() -> None:
    """With every node high nothing is left in float16, and the numbers are the very same."""
    model = network()
    given = pixels()
    out = to_half(network(), [n.name for n in model.graph.node])
    assert TensorProto.FLOAT16 not in types(out).values()
    for name, value in run(model, given).items():
        assert np.array_equal(run(out, given)[name], value)


def test_casts_are_shared() -> None:
    """Three high readers of one float16 tensor: one Cast."""
    model = small(
        [node("Conv", ["x", "k"], "c")]
        + [node("Softmax", ["c"], f"s{i}", axis=i) for i in (1, 2, 3)]
        + [node("Sum", ["s1", "s2", "s3"], "y")],
        {"x": (1, 4, 6, 6)},
        ["y"],
        {"k": WEIGHTS["k"]},
    )
    high = high_of(model)
    out = to_half(model, high)
    require_typed(out, set(high))
    casts = [n.input[0] for n in out.graph.node if n.op_type == "Cast"]
    assert sorted(casts) == ["c", "s1", "s2", "s3", "x", "y/half"]


def test_an_output_that_is_read_on() -> None:
    """A border that a float16 node writes and another reads keeps its name and its type."""
    model = small(
        [node("Relu", ["x"], "y"), node("Sigmoid", ["y"], "z")], {"x": ("batch", 4)}, ["y", "z"]
    )
    out = to_half(model, [])
    require_typed(out, set())
    assert {v.name for v in out.graph.output} == {"y", "z"}
    x = np.float32([[-1, 0, 1, 2]])
    found = run(out, {"x": x})
    assert np.array_equal(found["y"], np.maximum(x, 0))
    np.testing.assert_allclose(found["z"], 1 / (1 + np.exp(-np.maximum(x, 0))), rtol=1e-3)


def test_pairs_take_the_type_around_them() -> None:
    nodes = [
        node("MatMul", ["x", "a"], "m"),
        node("Softmax", ["m"], "p"),
        node("MatMul", ["p", "b"], "y"),
    ]
    weights = {n: np.eye(4, dtype=np.float32) for n in "ab"}
    model = small(nodes, {"x": ("batch", 4)}, ["y"], weights)
    plan = PartPlan(
        "",
        (nodes[0].name, nodes[2].name),
        (nodes[1].name,),
        {"x": 0.5, "m": 0.5, "p": 0.0078125},
        (),
        {n: WeightScale(1, (0.0078125,) * 4) for n in "ab"},
    )
    quantized = write_qdq(model, plan, unsigned=False, stored=True)
    before = run(quantized, {"x": np.float32([[1, 2, 0.5, 0]])})["y"]
    out = to_half(quantized, plan.high)
    require_typed(out, set(plan.high))
    kinds = types(out)
    # m's pair serves only the softmax, which stays in float32; the others are float16
    assert kinds["m/dequantized"] == TensorProto.FLOAT
    for name in ("x/dequantized", "p/dequantized", "a/dequantized", "b/dequantized"):
        assert kinds[name] == TensorProto.FLOAT16
    # all numbers here are exact in float16, but the softmax's, which are rounded to 1/128
    assert np.array_equal(run(out, {"x": np.float32([[1, 2, 0.5, 0]])})["y"], before)


def test_what_is_too_large_becomes_the_largest() -> None:
    values = np.float32([1e9, -1e9, 65504, -65520, 3.4e38, 1.0, 1e-9, np.inf])
    assert half(values).tolist() == [65504, -65504, 65504, -65504, 65504, 1.0, 0.0, 65504]
    model = network()
    out = to_half(model, high_of(model))
    held = {t.name: numpy_helper.to_array(t) for t in out.graph.initializer}
    assert held["low/half"].dtype == np.float16
    assert float(held["low/half"]) == -65504.0
    assert all(np.isfinite(v).all() for v in held.values())


def test_stored_halves_compute_in_float32() -> None:
    model = network()
    given = pixels()
    rounded = network()
    for tensor in rounded.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if tensor.name in ("k", "w"):
            exact = value.astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(exact, tensor.name))
    out = store_half(model)
    kinds = types(out)
    assert {n for n, k in kinds.items() if k == TensorProto.FLOAT16} == {"k/half", "w/half"}
    # the arithmetic is float32 on the rounded weights: no tolerance
    for name, value in run(rounded, given).items():
        assert np.array_equal(run(out, given)[name], value)


@pytest.mark.parametrize("part", ["text", "mask"])
@pytest.mark.parametrize("plan", ["fp16", "int8"])
def test_the_real_graphs(quantized: Path, plan: str, part: str) -> None:
    """Both plans of the tiny SLViT with float16 as the rest."""
    opened = open_bundle(quantized)
    made = decode_plan(opened.file(opened.manifest.plans[plan]).read_bytes())
    model = onnx.load(opened.file(opened.manifest.canonical.graphs[part]))
    found = made.parts[part]
    out, *_ = write_dialect(model, "trt10", replace(made, rest="fp16"), found)
    require_typed(out, set(found.high))
    assert set(found.high) <= {n.name for n in out.graph.node}
    borders = [(v.name, v.type.tensor_type.elem_type) for v in out.graph.output]
    assert borders == [(v.name, v.type.tensor_type.elem_type) for v in model.graph.output]
