from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from refedge.errors import ExportError
from refedge.export.dialects import DIALECTS, WITH_PLUGIN
from refedge.export.lower import to_opset_17
from refedge.export.qdq import write_qdq
from refedge.export.targets import TARGETS, lint_qdq, lint_target, require_target
from refedge.runtime.bundle import open_bundle
from refedge.runtime.plan import PartPlan, WeightScale

from .small_graphs import node, small

Change = Callable[[onnx.ModelProto], None]


def clean(dialect: str) -> onnx.ModelProto:
    """A convolution with bias and all pairs, as the dialect wants it."""
    nodes = [
        node("Cast", ["pixels"], "x", "stem", to=TensorProto.FLOAT),
        node("Conv", ["x", "k", "b"], "c", "stem.conv"),
        node("TopK", ["c", "three"], ["best", "which"], "head.choice", axis=2),
        node("Relu", ["best"], "y", "head"),
    ]
    weights = {
        "k": np.ones((8, 4, 1, 1), np.float32),
        "b": np.ones(8, np.float32),
        "three": np.int64([3]),
    }
    model = small(
        nodes, {"pixels": ("batch", 4, 6, 6)}, ["y"], weights, {"pixels": TensorProto.UINT8}
    )
    plan = PartPlan(
        "",
        (nodes[1].name,),
        activations={"x": 0.5, "c": 0.5},
        weights={"k": WeightScale(0, (0.0078125,) * 8)},
    )
    ort = dialect.startswith("ort")
    unsigned_weights = dialect == "ort-u8u8"
    out = write_qdq(model, plan, unsigned=ort, stored=True, unsigned_weights=unsigned_weights)
    return to_opset_17(out) if dialect == "trt8" else out


def named(model: onnx.ModelProto, what: str) -> onnx.NodeProto:
    (found,) = [n for n in model.graph.node if what in (n.name, n.output[0])]
    return found


def constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))
            return name
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def operator(name: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        named(model, "y").op_type = name

    return change


def opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version += 1


def ir_version(model: onnx.ModelProto) -> None:
    model.ir_version -= 1


def other_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def large_k(model: onnx.ModelProto) -> None:
    constant(model, "three", np.int64([3841]))


def computed_k(model: onnx.ModelProto) -> None:
    named(model, "best").input[1] = "which"


def bytes_read(model: onnx.ModelProto) -> None:
    named(model, "x").op_type = "Transpose"


def integers_reduced(model: onnx.ModelProto) -> None:
    """8.6 takes no ReduceMax of integers: the TopK's indices."""
    last = named(model, "y")
    last.op_type = "ReduceMax"
    last.input[:] = ["which"]
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64


def logic_of_floats(model: onnx.ModelProto) -> None:
    named(model, "y").op_type = "Not"


def zero_point(value: np.generic) -> Change:
    def change(model: onnx.ModelProto) -> None:
        name = constant(model, "other_zero", np.asarray(value))
        for pair in (named(model, "c/QuantizeLinear"), named(model, "c/DequantizeLinear")):
            pair.input[2] = name

    return change


def scale(value: np.ndarray) -> Change:
    def change(model: onnx.ModelProto) -> None:
        name = constant(model, "other_scale", value)
        for pair in (named(model, "c/QuantizeLinear"), named(model, "c/DequantizeLinear")):
            pair.input[1] = name

    return change


def unlike_pair(model: onnx.ModelProto) -> None:
    named(model, "c/DequantizeLinear").input[1] = constant(model, "other", np.float32(0.25))


def unread_pair(model: onnx.ModelProto) -> None:
    named(model, "best").input[0] = "c"
    model.graph.node.remove(named(model, "c/DequantizeLinear"))


def read_by_another(model: onnx.ModelProto) -> None:
    named(model, "best").input[0] = "c/quantized"


def fed_by_another(model: onnx.ModelProto) -> None:
    named(model, "c/DequantizeLinear").input[0] = "x"


def fed_by_an_input(model: onnx.ModelProto) -> None:
    named(model, "c/DequantizeLinear").input[0] = "pixels"


def few_channels(model: onnx.ModelProto) -> None:
    constant(model, "k/scale", np.full(7, 0.5, np.float32))


def weight_scale(model: onnx.ModelProto) -> None:
    constant(model, "k/scale", np.float32([0.5] * 7 + [0.0]))


def weight_zero(model: onnx.ModelProto) -> None:
    constant(model, "zeros_8", np.int8([1] * 8))


def weight_dtype(model: onnx.ModelProto) -> None:
    constant(model, "k/int8", np.ones((8, 4, 1, 1), np.uint8))
    constant(model, "zeros_8", np.zeros(8, np.uint8))


def quantized_bias(model: onnx.ModelProto) -> None:
    bias = helper.make_node("DequantizeLinear", ["b/int8", "b/scale", "b/zero"], ["b/real"], "b/DQ")
    constant(model, "b/int8", np.ones(8, np.int8))
    constant(model, "b/scale", np.float32(0.5))
    constant(model, "b/zero", np.int8(0))
    model.graph.node.insert(0, bias)
    named(model, "c").input[2] = "b/real"


BROKEN: list[tuple[str, str, Change, str, str]] = [
    *((d, "opset", opset, "-", "") for d in DIALECTS),
    *((d, "opset", ir_version, "-", "") for d in DIALECTS),
    *((d, "opset", other_domain, "-", "") for d in DIALECTS),
    *((d, "dynamic-shape", operator("NonZero"), "head/Relu:y", "head") for d in DIALECTS),
    *((d, "dynamic-shape", operator("If"), "head/Relu:y", "head") for d in DIALECTS),
    ("trt10", "operator", operator("Bernoulli"), "head/Relu:y", "head"),
    ("trt8", "operator", operator("Gelu"), "head/Relu:y", "head"),
    ("trt10", "operator-type", logic_of_floats, "head/Relu:y", "head"),
    ("trt8", "operator-type", integers_reduced, "head/Relu:y", "head"),
    ("trt10", "topk", large_k, "head.choice/TopK:best", "head.choice"),
    ("trt8", "topk", computed_k, "head.choice/TopK:best", "head.choice"),
    ("trt10", "uint8", bytes_read, "stem/Cast:x", "stem"),
    ("trt8", "uint8", bytes_read, "stem/Cast:x", "stem"),
    ("ort", "qdq-zero-point", zero_point(np.uint8(127)), "c/QuantizeLinear", "stem.conv"),
    ("ort", "qdq-zero-point", zero_point(np.int8(0)), "c/QuantizeLinear", "stem.conv"),
    ("trt10", "qdq-zero-point", zero_point(np.uint8(128)), "c/QuantizeLinear", "stem.conv"),
    ("trt8", "qdq-zero-point", zero_point(np.int8(1)), "c/QuantizeLinear", "stem.conv"),
    ("ort", "qdq-scale", scale(np.float32([0.5])), "c/QuantizeLinear", "stem.conv"),
    ("trt10", "qdq-scale", scale(np.float32(0)), "c/QuantizeLinear", "stem.conv"),
    ("trt10", "qdq-scale", scale(np.float32(-1)), "c/QuantizeLinear", "stem.conv"),
    ("trt10", "qdq-scale", scale(np.float32("inf")), "c/QuantizeLinear", "stem.conv"),
    ("trt8", "qdq-scale", scale(np.float32("nan")), "c/QuantizeLinear", "stem.conv"),
    ("ort", "qdq-pair", unlike_pair, "c/DequantizeLinear", "stem.conv"),
    ("trt10", "qdq-pair", unread_pair, "c/QuantizeLinear", "stem.conv"),
    ("ort", "qdq-pair", read_by_another, "c/QuantizeLinear", "stem.conv"),
    ("trt10", "qdq-pair", fed_by_another, "c/DequantizeLinear", "stem.conv"),
    ("ort", "qdq-pair", fed_by_an_input, "c/DequantizeLinear", "stem.conv"),
    ("trt10", "qdq-channel", few_channels, "k/DequantizeLinear", "stem.conv"),
    ("trt10", "qdq-scale", weight_scale, "k/DequantizeLinear", "stem.conv"),
    ("ort", "qdq-zero-point", weight_zero, "k/DequantizeLinear", "stem.conv"),
    ("ort", "qdq-zero-point", weight_dtype, "k/DequantizeLinear", "stem.conv"),
    ("ort-u8u8", "qdq-zero-point", weight_dtype, "k/DequantizeLinear", "stem.conv"),
    ("trt10", "qdq-bias", quantized_bias, "stem.conv/Conv:c", "stem.conv"),
    ("ort", "qdq-bias", quantized_bias, "stem.conv/Conv:c", "stem.conv"),
]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_clean_graph(dialect: str) -> None:
    model = clean(dialect)
    assert lint_target(model, dialect) == []
    assert lint_qdq(model, dialect) == []
    require_target(model, dialect)


@pytest.mark.parametrize(
    ("dialect", "rule", "change", "where", "module"),
    BROKEN,
    ids=[f"{d}-{r}-{getattr(c, '__name__', '')}-{i}" for i, (d, r, c, *_) in enumerate(BROKEN)],
)
def test_every_rule_fires(dialect: str, rule: str, change: Change, where: str, module: str) -> None:
    model = clean(dialect)
    change(model)
    found = [*lint_target(model, dialect), *lint_qdq(model, dialect)]
    assert (rule, where, module) in [(f.rule, f.node, f.module) for f in found]
    with pytest.raises(ExportError) as caught:
        require_target(model, dialect)
    assert caught.value.code == "export-target"
    assert dialect in caught.value.what
    assert module in caught.value.why


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    """The rules in the source are those that are broken above."""
    import re

    from refedge.export import targets

    text = Path(targets.__file__).read_text()
    rules = set(re.findall(r'(?:Finding|_finding)\(\s*"([a-z0-9-]+)"', text))
    assert rules == {rule for _, rule, *_ in BROKEN}


@pytest.mark.parametrize("dialect", ["ort", "ort-u8u8"])
def test_onnx_runtime_has_no_list(dialect: str) -> None:
    """It takes what TensorRT does not: any operator, any K, bytes anywhere."""
    for change in (operator("Bernoulli"), large_k, bytes_read):
        model = clean(dialect)
        change(model)
        assert lint_target(model, dialect) == []


def test_the_encodings_are_not_each_others() -> None:
    """A graph of one dialect is not fit for another that encodes differently."""
    for dialect, other in (("ort", "trt10"), ("trt10", "ort"), ("ort", "ort-u8u8")):
        assert {f.rule for f in lint_qdq(clean(dialect), other)} == {"qdq-zero-point"}
    assert {f.rule for f in lint_target(clean("trt8"), "trt10")} == {"opset"}


def test_every_dialect_has_a_target() -> None:
    assert set(TARGETS) == {*DIALECTS, *WITH_PLUGIN}


def test_the_real_graphs_are_fit(quantized: Path) -> None:
    """Three plans in four dialects, both parts; with the pairs that int8 needs."""
    opened = open_bundle(quantized)
    seen = set()
    for spec in opened.manifest.dialects:
        for file in spec.graphs.values():
            model = onnx.load(opened.file(file))
            assert lint_target(model, spec.name) == []
            assert lint_qdq(model, spec.name) == []
            pairs = sum(n.op_type == "QuantizeLinear" for n in model.graph.node)
            assert (pairs > 0) == (spec.plan in ("int8", "naive"))
            onnx.checker.check_model(model, full_check=True)
            seen.add((spec.plan, spec.name))
    assert seen >= {(plan, name) for plan in ("fp16", "int8", "naive") for name in DIALECTS}
