"""A fused node as a chain of passes: the same operands, each handed on under its own name."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from refedge.export.canonical import MODULE
from refedge.export.dialects import write_dialect
from refedge.export.targets import lint_target, require_target
from refedge.plugins.onnx_function import DOMAIN
from refedge.plugins.quick import CHAINS, PASSES

from .test_fuse import mask_part, plan_for
from .test_words import SLICES


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_the_chain_has_the_operands_of_the_node(rest: str) -> None:
    model = mask_part()
    plan, part = plan_for(model, rest)
    fused, _ = write_dialect(model, "trt10-plugin", plan, part)
    out, _ = write_dialect(model, "trt10-quick", plan, part)
    require_target(out, "trt10-quick")
    assert {f.rule for f in lint_target(out, "trt10-plugin")} >= {"operator"}
    made = [n for n in out.graph.node if n.domain == DOMAIN]
    chain = CHAINS["NormAttention"]
    assert [n.op_type for n in made] == list(chain.passes) * SLICES
    weights = {t.name: numpy_helper.to_array(t) for t in out.graph.initializer}
    for node in (n for n in fused.graph.node if n.domain == DOMAIN):
        tensors = defaultdict(set)
        for one in (n for n in made if n.name.startswith(f"{node.name}/")):
            declared = PASSES[one.op_type]
            names = (*declared.inputs, *declared.outputs)
            for name, tensor in zip(names, (*one.input, *one.output), strict=True):
                tensors[name].add(tensor)
            settings = {a.name: helper.get_attribute_value(a) for a in one.attribute}
            assert settings == {"plugin_namespace": b"refedge", "plugin_version": b"1", "aot": 1}
            assert [p.value for p in one.metadata_props if p.key == MODULE] == [node.name[:7]]
        assert [tensors[n] for n in chain.inputs] == [{name} for name in node.input]
        assert [tensors[n] for n in chain.outputs] == [{name} for name in node.output]
        assert all(len(found) == 1 for found in tensors.values())
        (epsilon,) = tensors["epsilon"]
        np.testing.assert_array_equal(weights[epsilon], np.float32([1e-5]))


def test_every_tensor_is_there_when_it_is_read() -> None:
    model = mask_part()
    out, _ = write_dialect(model, "trt10-quick", *plan_for(model, "fp16"))
    known = {v.name for v in out.graph.input} | {t.name for t in out.graph.initializer} | {""}
    for node in out.graph.node:
        assert known.issuperset(node.input), node.name
        assert known.isdisjoint(node.output)
        known |= set(node.output)
    assert known.issuperset(v.name for v in out.graph.output)
    assert len({n.name for n in out.graph.node}) == len(out.graph.node)
    onnx.checker.check_model(out)
