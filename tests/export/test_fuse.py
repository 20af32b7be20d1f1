"""One node for a folded block: the same numbers once its function is back, in every dialect."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
import pytest
from onnx import TensorProto, helper
from refedge.export.canonical import MODULE
from refedge.export.dialects import WITH_PLUGIN, write_dialect
from refedge.export.fuse import fuse
from refedge.export.graph import GraphIndex
from refedge.export.targets import lint_target, require_target
from refedge.export.words import fold_words
from refedge.plugins.onnx_function import DOMAIN, attach
from refedge.runtime.plan import PartPlan, Plan, WeightScale

from .small_graphs import node, run
from .test_words import CASES, SLICES, T, feeds, parts

Feeds = dict[str, np.ndarray]


def mask_part(*, folded: bool = True, relevance: bool = True) -> onnx.ModelProto:
    """SLViT's two blocks, folded or not; the first one's relevance is an output."""
    models = parts()
    mask = models["mask"]
    if relevance:
        mask.graph.initializer.append(onnx.numpy_helper.from_array(np.int64([1]), "over"))
        mask.graph.node.append(node("ReduceMax", ["p0", "over"], "seen", "block.0", keepdims=0))
        shape = ["batch", 49]
        mask.graph.output.append(helper.make_tensor_value_info("seen", TensorProto.FLOAT, shape))
    if folded:
        fold_words({"mask": mask}, lambda block: True)
    return mask


def given(case: str = "plain") -> Feeds:
    host = feeds(case)
    values = run(parts()["text"], {"states": host["states"]})["values"]
    return {"x": host["x"], "words": host["words"], "values": values}


def with_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """What a runtime without the plugin needs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return attach(copy)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("folded", [True, False])
def test_a_fused_block_computes_the_same(folded: bool, case: str) -> None:
    """Against the folded block: the same operations; the first gate's map is rounded once more."""
    wanted = run(mask_part(), given(case))
    model = mask_part(folded=folded)
    assert len(fuse(model)) == SLICES
    assert sum(n.op_type == "NormAttention_float32" for n in model.graph.node) == SLICES
    assert not {"Softmax", "Tanh", "ReduceMax"} & {n.op_type for n in model.graph.node}
    again = with_functions(model)
    onnx.checker.check_model(again, full_check=True)
    found = run(again, given(case))
    inlined = run(onnx.inliner.inline_local_functions(again), given(case))
    for name, value in wanted.items():
        size = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6 * size)
        np.testing.assert_array_equal(inlined[name], found[name])


def test_the_node_says_what_it_is() -> None:
    model = mask_part()
    names = fuse(model)
    made = [n for n in model.graph.node if n.domain == DOMAIN]
    assert [n.name for n in made] == names == ["block.0/NormAttention", "block.1/NormAttention"]
    for item in made:
        settings = {a.name: helper.get_attribute_value(a) for a in item.attribute}
        assert settings == {
            "plugin_namespace": b"refedge",
            "plugin_version": b"1",
            "epsilon": pytest.approx(1e-5),
        }
        assert [p.value for p in item.metadata_props if p.key == MODULE] == [item.name[:7]]
    index = GraphIndex(model)
    assert index.shape(made[0].input[0]) is not None
    assert not model.functions


@pytest.mark.parametrize("form", [{"gated": False}, {"bias": True}, {"projected": False}])
def test_other_blocks_stay_as_they_are(form: dict[str, bool]) -> None:
    """LAVT's block has no gate; a gate with a bias, and values without a projection, no node."""
    model = parts(**form)["mask"]
    before = run(model, given())
    assert fuse(model) == []
    assert [o.domain for o in model.opset_import] == [""]
    for name, value in run(model, given()).items():
        np.testing.assert_allclose(value, before[name], rtol=1e-4, atol=1e-4)


def plan_for(model: onnx.ModelProto, rest: str) -> tuple[Plan, PartPlan]:
    """Integers around the blocks: what enters the second one, and the last map of its gate."""
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    weight = conv.input[1]
    channels = GraphIndex(model).tensors[weight].dims[0]
    part = PartPlan(
        graph="0" * 64,
        int8=(conv.name,) if rest != "fp16" else (),
        high=tuple(n.name for n in model.graph.node if "/statistics/" in n.name),
        activations={"y0": 0.05, "r0": 0.05} if rest != "fp16" else {},
        weights={weight: WeightScale(0, (0.02,) * channels)} if rest != "fp16" else {},
        stored=(),
    )
    return Plan("p", rest=rest, parts={"mask": part}), part


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
@pytest.mark.parametrize("dialect", ["trt10-plugin", "trt8-plugin"])
def test_dialects_with_the_plugin(dialect: str, rest: str) -> None:
    """Fit for their target; on ONNX Runtime, with the functions, near what fp32 gives."""
    model = mask_part()
    plan, part = plan_for(model, rest)
    before = model.SerializeToString(deterministic=True)
    out, _ = write_dialect(model, dialect, plan, part)
    assert model.SerializeToString(deterministic=True) == before
    require_target(out, dialect)
    half = rest == "fp16" and dialect.startswith("trt10")
    kind = "NormAttention_float16" if half else "NormAttention_float32"
    fused = [n for n in out.graph.node if n.domain == DOMAIN]
    assert [n.op_type for n in fused] == [kind] * SLICES
    quantized = {o for n in out.graph.node if n.op_type == "QuantizeLinear" for o in n.output}
    assert not quantized & {i for n in fused for i in n.input}
    assert {f.rule for f in lint_target(out, WITH_PLUGIN[dialect])} >= {"operator"}
    if dialect.startswith("trt10"):
        wanted, found = run(mask_part(), given()), run(with_functions(out), given())
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, atol=0.1 * np.abs(value).max())
    assert T in GraphIndex(model).shape("words")
