"""One node for attention to words: the same numbers once its function is back, in every dialect."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import onnx
import onnx.inliner
import pytest
from onnx import TensorProto, helper
from refedge.calibration.placement import is_high
from refedge.export.canonical import MODULE
from refedge.export.dialects import WITH_PLUGIN, write_dialect
from refedge.export.fuse import Fusion, fuse
from refedge.export.graph import GraphIndex, attribute
from refedge.export.heads import fold_heads
from refedge.export.targets import lint_target, require_target
from refedge.export.words import fold_words
from refedge.plugins.onnx_function import DOMAIN, attach
from refedge.runtime.plan import PartPlan, Plan, WeightScale

from . import test_heads
from .small_graphs import node, run, small
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
    names = [f.node for f in fuse(model)]
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
    done = fuse(model)
    assert {f.operator for f in done} == {""}
    assert all("no gate" in f.why for f in done)
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
    out, *_ = write_dialect(model, dialect, plan, part)
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


def type_of(model: onnx.ModelProto, name: str) -> int:
    """The type of a tensor."""
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return int(next(v.type.tensor_type.elem_type for v in values if v.name == name))


def heads_part(*, folded: bool = True, **form: bool) -> tuple[onnx.ModelProto, Feeds]:
    """The mask part of two blocks of several heads, words folded in the text part, and feeds."""
    models = test_heads.parts(**form)
    if folded:
        fold_heads(models, lambda block: True)
    host = test_heads.feeds()
    words = run(models["text"], {"states": host.pop("states")})
    return models["mask"], host | words


@pytest.mark.parametrize("form", [{}, {"bias": False}, {"stacked": False}, {"folded": False}])
def test_several_heads_are_one_node(form: dict[str, bool]) -> None:
    """The function does what the folded block did, in the same order."""
    model, fed = heads_part(**form)
    wanted = run(model, fed)
    names = [f"layer.{j}/CrossAttention" for j in range(test_heads.LAYERS)]
    assert fuse(model) == [Fusion(name, "CrossAttention") for name in names]
    assert not {"Softmax", "Where"} & {n.op_type for n in model.graph.node}
    made = [n for n in model.graph.node if n.domain == DOMAIN]
    assert [n.name for n in made] == names
    n, c, h, t = test_heads.N, test_heads.C, test_heads.H, test_heads.T
    index = GraphIndex(model)
    shapes = [(1, n, c), (1, c, h, t), (1, h, t, c), (1, t), (1, h, t)]
    assert [index.shape(name) for name in made[0].input] == shapes
    again = with_functions(model)
    onnx.checker.check_model(again, full_check=True)
    found = run(again, fed)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)


def test_heads_that_are_left_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, _ = heads_part(folded=False, shared=True)
    done = fuse(shared)
    assert [f.operator for f in done] == ["", "CrossAttention"]
    assert "serve something else" in done[0].why
    assert asdict(done[0]) == {"node": done[0].node, "operator": "", "why": done[0].why}
    assert done[0].node in {n.name for n in shared.graph.node}
    monkeypatch.setattr(test_heads, "C", 5)
    wide, _ = heads_part(folded=False)
    assert {(f.operator, f.why) for f in fuse(wide)} == {
        ("", "2 x 3 columns of words are no fewer than 5 channels")
    }


def mutual_part(share: float = (2 * 4) ** -0.5, nothing: float = 0.0) -> onnx.ModelProto:
    """M3Att's mutual attention as torch exports it: 2 heads of 4 channels, 5 words, 9 pixels."""
    weights = {
        "sides": np.int64([1, 3]),
        "scale": np.float32(4**-0.5),
        "masked": np.float32(-1e4),
        "share": np.float32(share),
        "nothing": np.float32(nothing),
        "rows": np.int64([-1, 5, 2 * 5]),
        "columns": np.int64([-1, 2 * 5, 9]),
    }
    steps = [
        ("Mul", ["keys", "scale"], "scaled", {}),
        ("MatMul", ["scaled", "seen_keys"], "scores", {}),
        ("Softmax", ["scores"], "by_pixel", {"axis": 3}),
        ("MatMul", ["by_pixel", "seen_values"], "seen", {}),
        ("Unsqueeze", ["words", "sides"], "valid", {}),
        ("Where", ["valid", "scores", "masked"], "kept", {}),
        ("Softmax", ["kept"], "by_word", {"axis": 2}),
        ("Mul", ["seen", "share"], "shared", {}),
        ("Transpose", ["values"], "turned", {"perm": [0, 1, 3, 2]}),
        ("MatMul", ["shared", "turned"], "pairs", {}),
        ("Where", ["valid", "pairs", "nothing"], "pairs_kept", {}),
        ("Transpose", ["pairs_kept"], "swapped", {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["swapped", "rows"], "joined", {}),
        ("Reshape", ["by_word", "columns"], "told", {}),
        ("MatMul", ["joined", "told"], "product", {}),
    ]
    side = ("batch", 2, 5, 4)
    inputs = {"keys": side, "values": side, "words": ("batch", 5)}
    inputs |= {"seen_keys": ("batch", 2, 4, 9), "seen_values": ("batch", 2, 9, 4)}
    nodes = [node(kind, given, made, "mutual.0", **rest) for kind, given, made, rest in steps]
    return small(nodes, inputs, ["product"], weights, {"words": TensorProto.BOOL})


def mutual_feeds() -> Feeds:
    rng = np.random.default_rng(0)
    sizes = {"keys": (3, 2, 5, 4), "values": (3, 2, 5, 4), "seen_keys": (3, 2, 4, 9)}
    sizes["seen_values"] = (3, 2, 9, 4)
    fed = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    return fed | {"words": np.arange(5)[None] < np.array([[1], [3], [5]])}


def test_mutual_attention_is_one_node() -> None:
    model = mutual_part()
    wanted = run(model, mutual_feeds())
    assert fuse(model) == [Fusion("mutual.0/MutualAttention", "MutualAttention")]
    assert not {"Softmax", "Where", "Reshape"} & {n.op_type for n in model.graph.node}
    again = with_functions(model)
    onnx.checker.check_model(again, full_check=True)
    # the scale of the pairs comes at another place
    np.testing.assert_allclose(
        run(again, mutual_feeds())["product"], wanted["product"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("form", [{"share": 0.5}, {"nothing": -1.0}])
def test_what_is_nearly_mutual_attention_stays(form: dict[str, float]) -> None:
    model = mutual_part(**form)
    before = model.SerializeToString(deterministic=True)
    done = fuse(model)
    assert [f.operator for f in done] == [""]
    assert "a softmax over pixels too" in done[0].why
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
@pytest.mark.parametrize("dialect", ["trt10-plugin", "trt8-plugin"])
@pytest.mark.parametrize("operator", ["CrossAttention", "MutualAttention"])
def test_dialects_of_the_other_operators(operator: str, dialect: str, rest: str) -> None:
    model, fed = heads_part() if operator == "CrossAttention" else (mutual_part(), mutual_feeds())
    wanted = run(model, fed)
    part = PartPlan("0" * 64, high=tuple(n.name for n in model.graph.node if is_high(n, ())))
    out, _, done = write_dialect(model, dialect, Plan("p", rest, {}), part)
    require_target(out, dialect)
    half = rest == "fp16" and dialect.startswith("trt10")
    made = [n for n in out.graph.node if n.domain == DOMAIN]
    assert {n.op_type for n in made} == {f"{operator}_{'float16' if half else 'float32'}"}
    words = {n.input[2 if operator == "MutualAttention" else 3] for n in made}
    if dialect.startswith("trt8"):  # whose plugins take no booleans
        (cast,) = (n for n in out.graph.node if n.output[0] in words)
        assert (cast.op_type, attribute(cast, "to")) == ("Cast", onnx.TensorProto.INT32)
        assert type_of(out, cast.input[0]) == onnx.TensorProto.BOOL
    else:
        assert {type_of(out, name) for name in words} == {onnx.TensorProto.BOOL}
    assert {f.operator for f in done} == {operator}
    if dialect.startswith("trt10"):
        found = run(with_functions(out), fed)
        for name, value in wanted.items():
            size = float(np.abs(value).max())
            np.testing.assert_allclose(found[name], value, atol=(2e-2 if half else 1e-5) * size)
