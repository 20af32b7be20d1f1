"""A fused node as a chain of passes: the same operands, handed on as the kernels want them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from refedge.calibration.placement import is_high
from refedge.export.canonical import module_of
from refedge.export.dialects import write_dialect
from refedge.export.targets import lint_target, require_target
from refedge.plugins.onnx_function import DOMAIN
from refedge.plugins.quick import CHAINS, PASSES
from refedge.runtime.plan import PartPlan, Plan

from ..conftest import exported
from ..plugins.emulated import Fences, run_pass
from .small_graphs import run
from .test_fuse import Feeds, given, heads_part, mask_part, mutual_feeds, mutual_part

OPERATORS = list(CHAINS)


def part_of(operator: str) -> tuple[onnx.ModelProto, Feeds]:
    if operator == "NormAttention":
        model, fed = mask_part(), given()
        for tensor in model.graph.initializer:
            if tensor.name[0] == "k":  # keys, which a model makes of its words
                keys = np.stack([numpy_helper.to_array(tensor)] * len(fed["x"]))
                tensor.CopyFrom(numpy_helper.from_array(keys, tensor.name))
        return model, fed
    return heads_part() if operator == "CrossAttention" else (mutual_part(), mutual_feeds())


def written(model: onnx.ModelProto, dialect: str, rest: str) -> onnx.ModelProto:
    high = tuple(node.name for node in model.graph.node if is_high(node, ()))
    out, _, _ = write_dialect(model, dialect, Plan("p", rest, {}), PartPlan("0" * 64, high=high))
    require_target(out, dialect)
    return out


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_chain_has_the_operands_of_the_node(operator: str, rest: str) -> None:
    model, _ = part_of(operator)
    fused, out = written(model, "trt10-plugin", rest), written(model, "trt10-quick", rest)
    assert {f.rule for f in lint_target(out, "trt10-plugin")} >= {"operator"}
    made = [n for n in out.graph.node if n.domain == DOMAIN]
    nodes = [n for n in fused.graph.node if n.domain == DOMAIN]
    chain = CHAINS[operator]
    assert nodes
    assert [n.op_type for n in made] == list(chain.passes) * len(nodes)
    weights = {t.name: numpy_helper.to_array(t) for t in out.graph.initializer}
    for node in nodes:
        tensors = defaultdict(set)
        for one in (n for n in made if n.name.startswith(f"{node.name}/")):
            declared = PASSES[one.op_type]
            names = (*declared.inputs, *declared.outputs)
            for name, tensor in zip(names, (*one.input, *one.output), strict=True):
                tensors[name].add(tensor)
            settings = {a.name: helper.get_attribute_value(a) for a in one.attribute}
            assert settings == {"plugin_namespace": b"refedge", "plugin_version": b"1", "aot": 1}
            assert module_of(one) == module_of(node)
        assert [tensors[n] for n in chain.inputs] == [{name} for name in node.input]
        assert [tensors[n] for n in chain.outputs] == [{name} for name in node.output]
        assert all(len(found) == 1 for found in tensors.values())
        for epsilon in tensors["epsilon"]:
            np.testing.assert_array_equal(weights[epsilon], np.float32([1e-5]))
    assert [n.name for n in out.graph.node if n.domain != DOMAIN] == [
        n.name for n in fused.graph.node if n.domain != DOMAIN
    ]


def emulated(kind: str) -> type[OpRun]:
    """A pass for onnx's own interpreter: the kernel's source on this machine."""
    one = PASSES[kind]

    def compute(self: Any, *inputs: np.ndarray, **settings: Any) -> tuple[np.ndarray, ...]:
        tensors = {n: np.ascontiguousarray(v) for n, v in zip(one.inputs, inputs, strict=True)}
        half = any(value.dtype == np.float16 for value in inputs)
        place = Fences().place
        found = run_pass(
            one, tensors, "float16" if half else "float32", lambda _, *size: place(*size)
        )
        return tuple(value.copy() for value in found.values())

    return type(kind, (OpRun,), {"op_domain": DOMAIN, "_run": compute})


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_graph_computes_the_same_with_the_kernels(operator: str, rest: str) -> None:
    model, fed = part_of(operator)
    out = written(model, "trt10-quick", rest)
    wanted = run(model, fed)
    session = ReferenceEvaluator(out, new_ops=[emulated(kind) for kind in PASSES])
    for name, found in zip(session.output_names, session.run(None, fed), strict=True):
        size = float(np.abs(wanted[name]).max())
        np.testing.assert_allclose(
            found, wanted[name], atol=(2e-2 if rest == "fp16" else 1e-5) * size
        )


@pytest.mark.parametrize(("rest", "most"), [("fp32", 3e-5), ("fp16", 0.1)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", ["slvit-tiny", "m3att-tiny", "cm_masksd-tiny"])
def test_a_checkpoint_s_mask_part_by_the_kernels(name: str, rest: str, most: float) -> None:
    """All passes of a trained network in a row; logits in their standard deviations."""
    graphs, rng = exported(name) / "graphs", np.random.default_rng(0)
    known: Feeds = {
        "ids": rng.integers(3, 30, (1, 20)).astype(np.int32),
        "words": np.arange(20)[None] < 8,
        "pixels": rng.integers(0, 256, (1, 96, 96, 3)).astype(np.uint8),
        "image_index": np.zeros(1, np.int32),
    }
    for part in ("text", "image", "mask"):
        if (graphs / f"{part}.onnx").is_file():
            session = onnxruntime.InferenceSession(graphs / f"{part}.onnx")
            fed = {i.name: known[i.name] for i in session.get_inputs()}
            made = session.run(None, fed)
            known |= dict(zip((o.name for o in session.get_outputs()), made, strict=True))
    out = written(onnx.load(graphs / "mask.onnx"), "trt10-quick", rest)
    fed = {
        i.name: known[i.name].astype(helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type))
        for i in out.graph.input
    }
    found = ReferenceEvaluator(out, new_ops=[emulated(kind) for kind in PASSES]).run(None, fed)
    wanted = known["logits"].astype(np.float64)
    assert np.abs(found[0] - wanted).max() <= most * wanted.std()
