"""One quantizer behind all encodings, proven against integers in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from refedge.calibration.ranges import step, weight_scales
from refedge.export.canonical import module_of
from refedge.export.graph import GraphIndex
from refedge.export.qdq import quantize_weight, write_qdq
from refedge.runtime.plan import PartPlan, WeightScale

from . import integer_reference as reference
from .integer_reference import ENCODINGS, SIGNED, UNSIGNED, UNSIGNED_WEIGHTS, Encoding
from .small_graphs import node, operators, run, small

KINDS = {np.uint8: TensorProto.UINT8, np.int8: TensorProto.INT8}


@dataclass(frozen=True)
class Case:
    """An operator with a constant weight, and how the integer reference computes it.

    axis: of the weight's output channels; out: of the same channels in the result.
    fused: whether ONNX Runtime's fused kernel takes scales per channel.
    """

    operator: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    axis: int
    out: int
    sums: Callable[[np.ndarray, np.ndarray, tuple[int, int]], np.ndarray]
    attributes: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    left: bool = False  # the weight is the left factor
    fused: bool = True


def convolution(**options: int) -> Callable[..., np.ndarray]:
    return lambda x, w, zeros: reference.conv(x, w, zeros, **options)


def gemm(x: np.ndarray, w: np.ndarray, zeros: tuple[int, int]) -> np.ndarray:
    return reference.matmul(x, w.T, zeros)


def turned(x: np.ndarray, w: np.ndarray, zeros: tuple[int, int]) -> np.ndarray:
    return reference.matmul(w, x, zeros[::-1])


PADS = {"pads": [1, 1, 1, 1]}
CASES = {
    "conv": Case("Conv", (2, 3, 7, 9), (5, 3, 3, 3), 0, 1, convolution(pad=1), PADS, bias=True),
    "strided conv": Case(
        "Conv", (1, 4, 8, 8), (6, 4, 2, 2), 0, 1, convolution(stride=2), {"strides": [2, 2]}
    ),
    "depthwise conv": Case(
        "Conv",
        (2, 6, 8, 8),
        (6, 1, 3, 3),
        0,
        1,
        convolution(pad=1, group=6),
        {**PADS, "group": 6},
        bias=True,
    ),
    "matmul": Case("MatMul", (2, 5, 24), (24, 7), 1, -1, reference.matmul),
    "matmul of rank 3": Case(
        "MatMul", (3, 5, 16), (3, 16, 4), 2, -1, reference.matmul, fused=False
    ),
    "matmul from the left": Case(
        "MatMul", (2, 16, 5), (7, 16), 0, -2, turned, left=True, fused=False
    ),
    "gemm": Case("Gemm", (9, 16), (7, 16), 0, -1, gemm, {"transB": 1}, bias=True),
}


@dataclass(frozen=True)
class Drawn:
    """Values and scales for a case."""

    x: np.ndarray
    w: np.ndarray
    bias: np.ndarray
    x_scale: float
    w_scales: tuple[float, ...]
    y_scale: float


def drawn(case: Case, seed: int, *, exact: bool, single: bool = False) -> Drawn:
    """Some values beyond the range, so that clipping is seen.

    exact: scales are powers of two and the bias is a multiple of their product. Then every number
    in the graph is an integer below 2**24 times a power of two, float32 arithmetic is exact in
    whatever order, and so are ties.
    single: every channel gets the weight's one scale.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=case.x).astype(np.float32)
    w = (rng.normal(size=case.w) * 0.3).astype(np.float32)
    channels = case.w[case.axis]
    if exact:
        x_scale, y_scale = 2.0**-6, 2.0**-4
        w_scales = tuple(2.0 ** -float(k) for k in rng.integers(7, 10, channels))
        bias = rng.integers(-2000, 2000, channels) * (x_scale * np.array(w_scales))
    else:
        x_scale = step(float(np.abs(x).max()) * 0.7)
        w_scales = weight_scales(w, None) * channels if single else weight_scales(w, case.axis)
        bias = rng.normal(size=channels)
        y_scale = step(float(np.prod(case.w) / channels) ** 0.5)
    return Drawn(x, w, bias.astype(np.float32), x_scale, w_scales, y_scale)


def written(case: Case, values: Drawn, encoding: Encoding) -> onnx.ModelProto:
    inputs = ["w", "x"] if case.left else ["x", "w"]
    constants = {"w": values.w}
    if case.bias:
        inputs.append("b")
        constants["b"] = values.bias
    nodes = [node(case.operator, inputs, "y", "neck.a", **case.attributes), node("Relu", "y", "z")]
    nodes[1].input[:] = ["y"]
    model = small(nodes, {"x": case.x}, ["z"], constants)
    spec = WeightScale(case.axis, values.w_scales)
    if not case.fused and len(set(values.w_scales)) == 1:
        spec = WeightScale(None, values.w_scales[:1])
    plan = PartPlan(
        "",
        (nodes[0].name,),
        activations={"x": values.x_scale, "y": values.y_scale},
        weights={"w": spec},
    )
    return write_qdq(
        model,
        plan,
        unsigned=encoding is not SIGNED,
        stored=True,
        unsigned_weights=encoding is UNSIGNED_WEIGHTS,
    )


def along(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def expected(case: Case, values: Drawn, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    """Integers of x and of y."""
    scales = np.array(values.w_scales)
    x = reference.quantize(values.x, values.x_scale, encoding.activation)
    steps = along(scales, case.axis, len(case.w))
    w = reference.quantize(values.w, steps, encoding.weight, low=-127)
    sums = case.sums(x, w, (encoding.activation, encoding.weight))
    bias = along(values.bias, case.out, sums.ndim) if case.bias else 0.0
    product = along(scales * values.x_scale, case.out, sums.ndim)
    return x, reference.requantize(sums, product, bias, values.y_scale, encoding.activation)


def integers(model: onnx.ModelProto, values: Drawn, encoding: Encoding) -> dict[str, np.ndarray]:
    """What ONNX Runtime writes behind each QuantizeLinear, with nothing optimised."""
    kind = KINDS[encoding.activations]
    taps = {"x/quantized": kind, "y/quantized": kind}
    found = run(model, {"x": values.x}, taps)
    assert all(v.dtype == encoding.activations for v in found.values())
    return {name: v.astype(np.int64) for name, v in found.items()}


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.name)
@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=5, deadline=None)
def test_integers_are_bit_identical(name: str, encoding: Encoding, seed: int) -> None:
    """With exact scales nothing rounds but the quantizer; so there is no tolerance at all."""
    case, values = CASES[name], drawn(CASES[name], seed, exact=True)
    found = integers(written(case, values, encoding), values, encoding)
    x, y = expected(case, values, encoding)
    assert np.array_equal(found["x/quantized"], x)
    assert np.array_equal(found["y/quantized"], y)
    assert len(np.unique(y)) > 10  # something was computed


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.name)
@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=5, deadline=None)
def test_calibrated_scales_are_within_a_step(name: str, encoding: Encoding, seed: int) -> None:
    """float32 sums round; where they come to lie beside a half, the integer may be the next."""
    case, values = CASES[name], drawn(CASES[name], seed, exact=False)
    found = integers(written(case, values, encoding), values, encoding)
    x, y = expected(case, values, encoding)
    assert np.array_equal(found["x/quantized"], x)
    assert np.abs(found["y/quantized"] - y).max() <= 1
    # a float32 sum of at most 54 products errs by about 1e-6 of a range of 127 steps
    assert (found["y/quantized"] != y).mean() < 0.02


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_encodings_are_one_quantizer(name: str, exact: bool) -> None:
    case, values = CASES[name], drawn(CASES[name], 1, exact=exact)
    found = {}
    for encoding in ENCODINGS:
        model = written(case, values, encoding)
        reals = run(model, {"x": values.x})["z"]
        steps = integers(model, values, encoding)
        found[encoding.name] = reals, {n: v - encoding.activation for n, v in steps.items()}
    one, *others = found.values()
    for other in others:
        # dequantized values are the same float32 numbers, in the same graph: no tolerance
        assert np.array_equal(one[0], other[0])
        assert all(np.array_equal(one[1][n], other[1][n]) for n in one[1])


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.name)
@pytest.mark.parametrize("name", CASES)
def test_fused_kernels_are_within_a_step(name: str, encoding: Encoding, tmp_path: Path) -> None:
    """ONNX Runtime's integer kernels requantize by a float32 factor: half a step may flip."""
    case = CASES[name]
    values = drawn(case, 2, exact=False, single=not case.fused)
    model = written(case, values, encoding)
    kept = tmp_path / "optimised.onnx"
    tap = {"y/dequantized": TensorProto.FLOAT}
    reals = run(model, {"x": values.x}, tap, optimised=True, keep=kept)["y/dequantized"]
    # x86 has fused kernels of unsigned activations only, and none of int8 by uint8 in that order
    if encoding is not SIGNED and not (case.left and encoding is UNSIGNED):
        assert operators(kept) & {"QLinearConv", "QLinearMatMul", "QGemm"}
    found = np.rint(reals / np.float32(values.y_scale)).astype(np.int64)
    _, y = expected(case, values, encoding)
    assert np.abs(found - (y - encoding.activation)).max() <= 1


@given(st.integers(0, 2**32 - 1), st.sampled_from((0, 1, None)))
@settings(max_examples=50, deadline=None)
def test_weights_as_integers(seed: int, axis: int | None) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(4, 5)) * rng.choice([1e-3, 1, 1e3])).astype(np.float32)
    weight.flat[0] = 0.0
    spec = WeightScale(axis, weight_scales(weight, axis))
    found = quantize_weight(weight, spec)
    scales = np.array(spec.scales)
    steps = scales[0] if axis is None else along(scales, axis, 2)
    assert found.dtype == np.int8
    assert found.min() >= -127
    assert np.array_equal(found, reference.quantize(weight, steps, 0, low=-127))
    # scales come from the largest value, so nothing is clipped: half a step is all that is lost
    assert (np.abs(found * steps - weight) <= steps * 0.5 * (1 + 1e-6)).all()


def test_ties_go_to_the_even() -> None:
    weight = np.float32([[0.5, 1.5, 2.5, -0.5, -1.5, 300.0, -300.0]])
    found = quantize_weight(weight, WeightScale(None, (1.0,)))
    assert found.tolist() == [[0, 2, 2, 0, -2, 127, -127]]


def shared() -> tuple[onnx.ModelProto, PartPlan]:
    """Two products read x, one sum reads both; a weight per tensor, one per channel."""
    nodes = [
        node("MatMul", ["x", "v"], "m", "neck.a"),
        node("MatMul", ["x", "w"], "n", "neck.b"),
        node("Add", ["m", "n"], "s", "neck"),
        node("Relu", ["s"], "y"),
    ]
    weights = {"v": np.eye(4, dtype=np.float32), "w": np.eye(4, dtype=np.float32) * 2}
    plan = PartPlan(
        "",
        (nodes[0].name, nodes[1].name),
        activations={"x": 0.5, "m": 0.5, "n": 0.25},
        stored=("m", "n"),
        weights={"v": WeightScale(None, (0.125,)), "w": WeightScale(1, (0.25,) * 4)},
    )
    return small(nodes, {"x": ("batch", 4)}, ["y"], weights), plan


def test_the_form_of_the_graph() -> None:
    model, plan = shared()
    before = model.SerializeToString()
    out = write_qdq(model, plan, unsigned=True, stored=True)
    assert model.SerializeToString() == before
    onnx.checker.check_model(out, full_check=True)
    index = GraphIndex(out)
    counts = [n.op_type for n in index.nodes]
    assert counts.count("QuantizeLinear") == 3  # x, m and n: each once, whoever reads them
    assert counts.count("DequantizeLinear") == 5
    for made in index.nodes:
        if made.op_type == "QuantizeLinear":
            scale, zero = (index.constant(i) for i in made.input[1:])
            assert scale.ndim == zero.ndim == 0
            assert (scale.dtype, zero.dtype, int(zero)) == (np.float32, np.uint8, 128)
    # equal scales are one constant, and a pair belongs to the module that made its tensor
    scales = {i for n in index.nodes if n.op_type == "QuantizeLinear" for i in n.input[1:2]}
    assert len(scales) == 2
    assert {n.name: module_of(n) for n in index.nodes}["m/QuantizeLinear"] == "neck.a"
    assert {n.name: module_of(n) for n in index.nodes}["w/DequantizeLinear"] == "neck.b"
    # float weights are gone
    assert not {"v", "w"} & set(index.tensors)
    assert [t.dims for t in out.graph.initializer if t.name == "v/scale"] == [[]]


def test_stored_tensors_are_for_those_who_need_them() -> None:
    model, plan = shared()
    out = write_qdq(model, plan, unsigned=False, stored=False)
    onnx.checker.check_model(out, full_check=True)
    pairs = [n.input[0] for n in out.graph.node if n.op_type == "QuantizeLinear"]
    assert pairs == ["x"]
    add = next(n for n in out.graph.node if n.op_type == "Add")
    assert list(add.input) == ["m", "n"]


def test_an_empty_plan_changes_nothing() -> None:
    model, _ = shared()
    out = write_qdq(model, PartPlan(""), unsigned=True, stored=True)
    assert out.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_shifted_weights_are_the_same_numbers() -> None:
    model, plan = shared()
    both = [
        write_qdq(model, plan, unsigned=True, stored=True, unsigned_weights=shift)
        for shift in (False, True)
    ]
    held = [{t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in both]
    for name in ("v/int8", "w/int8"):
        assert (held[0][name].dtype, held[1][name].dtype) == (np.int8, np.uint8)
        assert np.array_equal(held[0][name].astype(int) + 128, held[1][name])
    zeros = {n: v for n, v in held[1].items() if n.startswith("zeros_")}
    assert {v.ndim for v in zeros.values()} == {0, 1}
    assert all((v == 128).all() for v in zeros.values())


def test_unsigned_is_what_x86_takes() -> None:
    assert (UNSIGNED.activations, UNSIGNED.weights) == (np.uint8, np.int8)
    model, plan = shared()
    held = {
        t.name: t.data_type
        for t in write_qdq(model, plan, unsigned=True, stored=True).graph.initializer
    }
    assert held["zero_point"] == TensorProto.UINT8
    assert held["v/int8"] == TensorProto.INT8
