"""Lint, folding, weights and the bundle writer on graphs made by hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from refedge.errors import BundleError, ExportError
from refedge.export.bundle import BundleWriter
from refedge.export.canonical import canonical, fold_constants
from refedge.export.dialects import mark
from refedge.export.from_torch import to_onnx
from refedge.export.lint import lint, require_clean
from refedge.export.parity import compare
from refedge.export.weights import split_weights
from refedge.models.parts import Method, Part, Port
from refedge.runtime.bundle import open_bundle

from ..runtime.test_manifest import MANIFEST


def graph(
    nodes: list[onnx.NodeProto],
    *,
    dtype: int = TensorProto.FLOAT,
    shape: tuple[object, ...] = ("batch", 4),
    weights: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "mask",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(v, k) for k, v in (weights or {}).items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    return model


def rules(model: onnx.ModelProto) -> set[str]:
    return {f.rule for f in lint(model)}


def test_a_clean_graph() -> None:
    model = graph([helper.make_node("Relu", ["x"], ["y"], name="r")])
    assert rules(model) == set()
    require_clean(model)


@pytest.mark.parametrize(
    ("operator", "rule"),
    [
        ("Loop", "control-flow"),
        ("If", "control-flow"),
        ("NonZero", "dynamic-shape"),
        ("Shape", "shape"),
        ("Erf", "decomposed"),
    ],
)
def test_operators_that_are_not_allowed(operator: str, rule: str) -> None:
    node = helper.make_node(operator, ["x"], ["y"], name="bad")
    node.metadata_props.append(onnx.StringStringEntryProto(key="refedge.module", value="neck.a"))
    (finding,) = lint(graph([node]))
    assert (finding.rule, finding.node, finding.module) == (rule, "bad", "neck.a")
    with pytest.raises(ExportError, match=r"neck\.a"):
        require_clean(graph([node]))


def test_headers_and_borders() -> None:
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    old = graph(relu)
    old.ir_version = 9
    assert rules(old) == {"ir-version"}
    other = graph(relu)
    other.opset_import[0].version = 18
    assert rules(other) == {"opset"}
    assert rules(graph(relu, shape=(2, 4))) == {"batch"}
    assert rules(graph(relu, shape=("batch", "side"))) == {"static"}
    assert rules(graph(relu, dtype=TensorProto.INT64)) == {"border-dtype"}


def test_only_a_cast_reads_bytes() -> None:
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    assert rules(graph([cast], dtype=TensorProto.UINT8)) == set()
    transpose = helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1])
    after = helper.make_node("Cast", ["t"], ["y"], to=TensorProto.FLOAT)
    assert rules(graph([transpose, after], dtype=TensorProto.UINT8)) == {"uint8"}


def test_invalid_onnx_is_named() -> None:
    with pytest.raises(ExportError) as caught:
        require_clean(graph([helper.make_node("Relu", ["nowhere"], ["y"])]))
    assert caught.value.code == "export-lint"


def test_movement_of_weights_is_folded_and_a_product_is_not() -> None:
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    model = graph(
        [
            helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
            helper.make_node("Mul", ["wt", "wt"], ["ww"]),
            helper.make_node("MatMul", ["x", "ww"], ["y"]),
        ],
        weights={"w": weight},
    )
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    before = run(model, x)
    fold_constants(model)
    assert [n.op_type for n in model.graph.node] == ["Mul", "MatMul"]
    assert [t.name for t in model.graph.initializer] == ["wt"]
    np.testing.assert_array_equal(run(model, x), before)


def test_constant_maps_and_tables_are_computed_now() -> None:
    """Coordinates have a convolution of their own, a class token is added to positions."""
    rng = np.random.default_rng(0)
    model = graph(
        [
            helper.make_node("Conv", ["places", "kernel"], ["map"], pads=[1, 1, 1, 1]),
            helper.make_node("Pad", ["token", "pads"], ["first"]),
            helper.make_node("Add", ["first", "map"], ["table"]),
            helper.make_node("Reshape", ["x", "wide"], ["row"]),
            helper.make_node("Add", ["row", "table"], ["sum"]),
            helper.make_node("Reshape", ["sum", "narrow"], ["y"]),
        ],
        weights={
            "places": rng.normal(size=(1, 2, 4, 4)).astype(np.float32),
            "kernel": rng.normal(size=(3, 2, 3, 3)).astype(np.float32),
            "token": rng.normal(size=(1, 3, 1, 1)).astype(np.float32),
            "pads": np.int64([0, 0, 0, 0, 0, 0, 3, 3]),
            "wide": np.int64([-1, 1, 1, 4]),
            "narrow": np.int64([-1, 4]),
        },
    )
    x = rng.normal(size=(2, 4)).astype(np.float32)
    before = run(model, x)
    fold_constants(model)
    assert [n.op_type for n in model.graph.node] == ["Reshape", "Add", "Reshape"]
    assert {t.name for t in model.graph.initializer} == {"table", "wide", "narrow"}
    # a sum of 18 products in another order
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-5)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


def test_canonical_refuses_another_opset() -> None:
    model = graph([helper.make_node("Relu", ["x"], ["y"])])
    model.opset_import[0].version = 18
    with pytest.raises(ExportError) as caught:
        canonical(model, "mask")
    assert caught.value.code == "export-opset"


def test_large_weights_move_out_and_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "small": np.float32([[2.0]]),
        "line": rng.normal(size=(4, 100)).astype(np.float32),
        "page": rng.normal(size=(100, 4, 100)).astype(np.float32).reshape(100, 400)[:, :4].copy(),
        "large": rng.normal(size=(4, 20000)).astype(np.float32),
    }
    model = graph(
        [
            helper.make_node("MatMul", ["x", "line"], ["a"]),
            helper.make_node("MatMul", ["a", "page"], ["b"]),
            helper.make_node("MatMul", ["b", "large"], ["c"]),
            helper.make_node("ReduceMax", ["c", "axis"], ["m"], keepdims=1),
            helper.make_node("Mul", ["m", "small"], ["d"]),
            helper.make_node("Add", ["b", "d"], ["y"]),
        ],
        weights=weights | {"axis": np.array([1])},
    )
    x = rng.normal(size=(2, 4)).astype(np.float32)
    before = run(model, x)
    name, content = split_weights(model)
    assert name.startswith("mask-")
    assert name.endswith(".weights")
    stored = {t.name: t for t in model.graph.initializer}
    assert stored["small"].data_location != TensorProto.EXTERNAL
    for tensor, align in (("line", 64), ("page", 64), ("large", 4096)):
        place = {e.key: e.value for e in stored[tensor].external_data}
        assert int(place["offset"]) % align == 0
    (tmp_path / name).write_bytes(content)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(
        str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], before)


def test_equal_weights_have_equal_names() -> None:
    def make(value: float) -> onnx.ModelProto:
        weight = np.full((4, 400), value, np.float32)
        return graph([helper.make_node("MatMul", ["x", "w"], ["y"])], weights={"w": weight})

    assert split_weights(make(1)) == split_weights(make(1))
    assert split_weights(make(1))[0] != split_weights(make(2))[0]


def test_a_dialect_is_a_copy() -> None:
    model = graph([helper.make_node("Relu", ["x"], ["y"])])
    copy = mark(model, "ort", "fp32")
    copy.graph.node[0].op_type = "Tanh"
    assert model.graph.node[0].op_type == "Relu"
    assert {p.key: p.value for p in copy.metadata_props} == {
        "refedge.dialect": "ort",
        "refedge.plan": "fp32",
    }


def test_agreement_is_measured_in_sigma() -> None:
    a = {"logits": np.float32([[-1, 1, 3, 5]])}
    same = compare(a, a)
    assert (same.sigma, same.iou) == (0.0, 1.0)
    assert same.cosine == pytest.approx(1.0)
    other = compare(a, {"logits": np.float32([[1, 1, 3, 5]])})
    assert other.sigma == pytest.approx(2 / a["logits"].std())
    assert other.iou == pytest.approx(3 / 4)
    assert compare({"keys": a["logits"]}, {"keys": a["logits"]}).iou is None


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Sometimes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def part(module: torch.nn.Module) -> Part:
    port = (Port("x", "float32", ("batch", 4)),)
    return Part(
        "mask",
        Method(module, module.forward),
        port,
        (Port("y", "float32", ("batch", 4)),),
    )


def test_a_user_module_exports() -> None:
    model = to_onnx(part(Twice()))
    assert lint(model) == []
    assert model.graph.node[0].name == "/Mul"


def test_a_module_torch_cannot_trace() -> None:
    with pytest.raises(ExportError) as caught:
        to_onnx(part(Sometimes()))
    assert caught.value.code == "export-trace"


def test_the_writer_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.refedge"
    with pytest.raises(RuntimeError), BundleWriter(target) as writer:
        writer.add("graphs/mask.onnx", b"abc")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_the_writer_replaces_bundles_only(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.refedge"
    for content in (b"abc", b"defg"):
        with BundleWriter(target) as writer:
            writer.add("graphs/mask.onnx", content)
            writer.commit(MANIFEST)
        assert open_bundle(target).manifest.files["graphs/mask.onnx"].bytes == len(content)
        assert sorted(p.name for p in target.parent.iterdir()) == ["a.refedge"]
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(BundleError) as caught, BundleWriter(photos):
        pass
    assert caught.value.code == "bundle-target"
    assert (photos / "holiday.jpg").exists()


def test_a_failed_replacement_keeps_the_old_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.refedge"
    with BundleWriter(target) as writer:
        writer.add("graphs/mask.onnx", b"abc")
        writer.commit(MANIFEST)
    rename, calls = os.rename, []

    def failing(source: Path, goal: Path) -> None:
        calls.append(goal)
        if len(calls) == 2:  # the new bundle into the old one's place
            raise OSError("disk full")
        rename(source, goal)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk full"), BundleWriter(target) as writer:
        writer.add("graphs/mask.onnx", b"other")
        writer.commit(MANIFEST)
    assert open_bundle(target).manifest.files["graphs/mask.onnx"].bytes == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.refedge"]


def test_a_name_has_one_content(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "a.refedge") as writer:
        writer.add("w", b"1")
        writer.add("w", b"1")
        with pytest.raises(ValueError, match="other content"):
            writer.add("w", b"2")


def test_a_replaced_bundle_keeps_its_engines(tmp_path: Path) -> None:
    target = tmp_path / "a.refedge"
    for content in (b"abc", b"other"):
        with BundleWriter(target) as writer:
            writer.add("graphs/mask.onnx", content)
            writer.commit(MANIFEST)
        engine = target / "engines" / "trt10" / "fp16" / "mask.engine"
        if content == b"abc":
            engine.parent.mkdir(parents=True)
            engine.write_bytes(b"built for an hour")
    assert engine.read_bytes() == b"built for an hour"
    assert open_bundle(target).manifest.files["graphs/mask.onnx"].bytes == 5
    assert [p.name for p in tmp_path.iterdir()] == ["a.refedge"]
