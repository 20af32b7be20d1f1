from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from refedge.errors import ExportError
from refedge.export.canonical import module_of
from refedge.export.lower import PLAIN, to_opset_17
from refedge.export.qdq import write_qdq
from refedge.runtime.bundle import open_bundle
from refedge.runtime.plan import PartPlan, WeightScale

from .small_graphs import node, operators, run, small

X = np.random.default_rng(5).normal(size=(2, 6, 8, 8)).astype(np.float32) * 2
F16 = np.float32([1, 1, 2, 2])


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    """Lowered, valid by the checker, and typed as before."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    out = to_opset_17(copy)
    assert [(o.domain, o.version) for o in out.opset_import] == [("", 17)]
    assert out.ir_version == 8
    onnx.checker.check_model(out, full_check=True)
    onnx.shape_inference.infer_shapes(out, check_type=True, strict_mode=True)
    return out


def one(
    operator: str,
    inputs: list[str],
    outputs: list[str] | None = None,
    weights: dict[str, Any] | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    outputs = outputs or ["y"]
    made = node(operator, inputs, outputs, "neck.a", **attributes)
    return small([made], {"x": X.shape}, outputs, weights)


def refused(model: onnx.ModelProto) -> ExportError:
    with pytest.raises(ExportError) as caught:
        to_opset_17(model)
    assert caught.value.code == "export-lower"
    assert "neck.a" in caught.value.why
    return caught.value


@pytest.mark.parametrize("attributes", [{}, {"approximate": "none"}])
def test_gelu_in_pieces(attributes: dict[str, str]) -> None:
    model = one("Gelu", ["x"], **attributes)
    out = lowered(model)
    assert [n.op_type for n in out.graph.node] == ["Div", "Erf", "Add", "Mul", "Mul"]
    assert {module_of(n) for n in out.graph.node} == {"neck.a"}
    assert len({n.name for n in out.graph.node}) == 5
    # the same formula in float32; erf is approximated to about 1e-7 in either kernel
    np.testing.assert_allclose(run(out, {"x": X})["y"], run(model, {"x": X})["y"], atol=2e-6)


@pytest.mark.parametrize(
    ("scale", "shift", "kinds"),
    [
        (1.0, 0.0, ["LayerNormalization"]),
        (2.0, 0.0, ["LayerNormalization", "Mul"]),
        (1.0, 3.0, ["LayerNormalization", "Add"]),
        (2.0, 3.0, ["LayerNormalization", "Mul", "Add"]),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_instance_norms_are_layer_norms_over_pixels(
    scale: float, shift: float, kinds: list[str], flat: bool
) -> None:
    """8.6.0's parser has a plugin for instance norms, which wants cuDNN."""
    given = X.reshape(2, 6, 64) if flat else X
    steps = np.arange(6, dtype=np.float32)
    weights = {"s": np.full(6, scale, np.float32) + (scale != 1) * steps,
               "b": np.full(6, shift, np.float32) + (shift != 0) * steps}  # fmt: skip
    made = [
        node("InstanceNormalization", ["x", "s", "b"], "m", "neck.a", epsilon=1e-3),
        node("InstanceNormalization", ["m", "s", "b"], "y", "neck.b"),
    ]
    model = small(made, {"x": given.shape}, ["y"], weights)
    out = lowered(model)
    assert [n.op_type for n in out.graph.node] == kinds * 2
    assert [n.name for n in out.graph.node][:: len(kinds)] == [n.name for n in made], "pins' names"
    constants = {t.name for t in out.graph.initializer if t.name.startswith(PLAIN)}
    area = "64" if flat else "8x8"
    assert constants == {f"norm/ones_{area}", f"norm/zeros_{area}"}
    wanted, found = run(model, {"x": given})["y"], run(out, {"x": given})["y"]
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())


def test_the_tanh_form_is_refused() -> None:
    assert "tanh" in refused(one("Gelu", ["x"], approximate="tanh")).what


def test_two_gelus_share_their_constants() -> None:
    model = small([node("Gelu", ["x"], "a"), node("Gelu", ["a"], "y")], {"x": ("batch", 4)}, ["y"])
    out = lowered(model)
    assert sorted(t.name for t in out.graph.initializer) == ["gelu/half", "gelu/one", "gelu/root"]
    x = X[0, 0, :1, :4]
    np.testing.assert_allclose(run(out, {"x": x})["y"], run(model, {"x": x})["y"], atol=2e-6)


@pytest.mark.parametrize(
    "operator", ["ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceSum"]
)
@pytest.mark.parametrize("axes", [None, [1], [-1], [0, 2, 3]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions(operator: str, axes: list[int] | None, keepdims: int) -> None:
    inputs = ["x"] if axes is None else ["x", "axes"]
    weights = None if axes is None else {"axes": np.int64(axes)}
    model = one(operator, inputs, weights=weights, keepdims=keepdims)
    found, wanted = run(lowered(model), {"x": X})["y"], run(model, {"x": X})["y"]
    assert found.shape == wanted.shape
    assert np.array_equal(found, wanted)  # the same kernel


def test_computed_axes_are_refused() -> None:
    made = node("ReduceMax", ["x", "axes"], "y", "neck.a")
    model = small([made], {"x": X.shape, "axes": (1,)}, ["y"], dtypes={"axes": TensorProto.INT64})
    assert "ReduceMax" in refused(model).what


SAME = {
    "Split by number": (["x"], ["a", "b"], {}, {"axis": 1, "num_outputs": 2}),
    "Split by sizes": (["x", "s"], ["a", "b"], {"s": np.int64([4, 2])}, {"axis": 1}),
    "Resize bilinear": (["x", "", "f"], ["y"], {"f": F16}, {"mode": "linear", "antialias": 0}),
    "Resize stretched": (
        ["x", "", "", "s"],
        ["y"],
        {"s": np.int64([2, 6, 5, 11])},
        {"mode": "linear", "keep_aspect_ratio_policy": "stretch"},
    ),
    "Reshape": (["x", "s"], ["y"], {"s": np.int64([2, -1])}, {"allowzero": 0}),
    "Pad": (["x", "p"], ["y"], {"p": np.int64([0, 0, 1, 1, 0, 0, 1, 1])}, {}),
    "LayerNormalization": (["x", "g"], ["y"], {"g": np.ones(8, np.float32)}, {"axis": -1}),
    "Transpose": (["x"], ["y"], {}, {"perm": [0, 2, 3, 1]}),
    "Softmax": (["x"], ["y"], {}, {"axis": 1}),
    "Clip": (["x", "l", "h"], ["y"], {"l": np.float32(-1), "h": np.float32(1)}, {}),
    "TopK": (["x", "k"], ["a", "i"], {"k": np.int64([3])}, {}),
    "Cast": (["x"], ["i"], {}, {"to": TensorProto.INT64, "saturate": 1}),
}


@pytest.mark.parametrize("name", SAME)
def test_everything_else_is_the_same(name: str) -> None:
    inputs, outputs, weights, attributes = SAME[name]
    made = node(name.split()[0], inputs, outputs, "neck.a", **attributes)
    model = small([made], {"x": X.shape}, outputs, weights, {"i": TensorProto.INT64})
    out = lowered(model)
    wanted = run(model, {"x": X})
    for output, value in run(out, {"x": X}).items():
        assert np.array_equal(value, wanted[output])


REFUSED = {
    "antialias": ("Resize", ["x", "", "f"], {"f": F16}, {"mode": "linear", "antialias": 1}),
    "keep_aspect_ratio_policy": (
        "Resize",
        ["x", "", "", "s"],
        {"s": np.int64([2, 6, 4, 4])},
        {"mode": "linear", "keep_aspect_ratio_policy": "not_larger"},
    ),
    "axes": ("Resize", ["x", "", "f"], {"f": F16[2:]}, {"mode": "linear", "axes": [2, 3]}),
    "so many inputs": (
        "Pad",
        ["x", "p", "", "a"],
        {"p": np.int64([1, 1]), "a": np.int64([2])},
        {},
    ),
    "GroupNormalization": (
        "GroupNormalization",
        ["x", "s", "s"],
        {"s": np.ones(2, np.float32)},
        {"num_groups": 2},
    ),
    "noop_with_empty_axes": (
        "ReduceMean",
        ["x", "a"],
        {"a": np.int64([1])},
        {"noop_with_empty_axes": 1},
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_opset_17_does_not_have(what: str) -> None:
    operator, inputs, weights, attributes = REFUSED[what]
    error = refused(one(operator, inputs, weights=weights, **attributes))
    assert what in error.what


def test_an_uneven_split_is_refused() -> None:
    """Since opset 18 the last part may be smaller; before, ONNX Runtime refuses it when loaded."""
    model = one("Split", ["x"], ["a", "b", "c", "d"], axis=1, num_outputs=4)
    shapes = [v.type.tensor_type.shape.dim[1].dim_value for v in model.graph.output]
    assert sum(shapes) == 6
    assert len(set(shapes)) == 2
    assert "Split" in refused(model).what


def test_pairs_lower_as_well() -> None:
    nodes = [node("MatMul", ["x", "w"], "m", "neck.a"), node("Gelu", ["m"], "y", "neck.a")]
    model = small(nodes, {"x": ("batch", 8)}, ["y"], {"w": np.eye(8, dtype=np.float32)})
    plan = PartPlan(
        "",
        (nodes[0].name,),
        activations={"x": 0.03125, "m": 0.03125},
        weights={"w": WeightScale(1, (0.0078125,) * 8)},
    )
    quantized = write_qdq(model, plan, unsigned=False, stored=True)
    out = lowered(quantized)
    assert operators(out) == {
        "QuantizeLinear", "DequantizeLinear", "MatMul", "Div", "Erf", "Add", "Mul",
    }  # fmt: skip
    x = X[0, 0]
    np.testing.assert_allclose(run(out, {"x": x})["y"], run(quantized, {"x": x})["y"], atol=2e-6)


@pytest.mark.parametrize("part", ["text", "mask"])
def test_the_real_graphs(bundle: Path, part: str) -> None:
    opened = open_bundle(bundle)
    model = onnx.load(opened.file(opened.manifest.canonical.graphs[part]))
    before = operators(model)
    out = lowered(model)
    assert "Gelu" in before
    gone = {"Gelu", "InstanceNormalization"}
    assert operators(out) >= (before - gone) | {"Erf", "LayerNormalization"}
    assert not gone & operators(out)
