"""Opset 20 to 17, for TensorRT 8.6: only what refedge's own graphs hold, and nothing silently.

Gelu becomes Div, Erf, Add, Mul, Mul; reductions carry their axes as an attribute; attributes that
came later are dropped where they hold their default. Every node is then checked against the schema
of opset 17; what does not fit is an error that names the torch module.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..errors import ExportError
from ..plugins.onnx_function import DOMAIN
from .canonical import module_of, place
from .graph import GraphIndex, drop_unread, set_nodes

OPSET = 17
IR_VERSION = 8
_DEFAULTS: dict[str, dict[str, object]] = {
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
    "Cast": {"saturate": 1},
    "QuantizeLinear": {"saturate": 1, "block_size": 0, "output_dtype": 0, "precision": 0},
    "DequantizeLinear": {"block_size": 0, "output_dtype": 0},
    "Reshape": {"allowzero": 0},
}
_AXES_AS_ATTRIBUTE = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceL2")
_DEFAULTS |= {name: {"noop_with_empty_axes": 0} for name in _AXES_AS_ATTRIBUTE}


def to_opset_17(model: onnx.ModelProto) -> onnx.ModelProto:
    """Lower a graph in place and return it."""
    index = GraphIndex(model)
    nodes: list[onnx.NodeProto] = []
    for node in index.nodes:
        nodes += _gelu(node) if node.op_type == "Gelu" else [_lowered(index, node)]
    if any(n.op_type == "Erf" for n in nodes):
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(np.float32(value)), name)
            for name, value in (
                ("gelu/root", math.sqrt(2.0)),
                ("gelu/one", 1.0),
                ("gelu/half", 0.5),
            )
        )
    set_nodes(model.graph, nodes)
    drop_unread(model.graph)
    for node in model.graph.node:
        _require(node)
    model.opset_import[0].version = OPSET
    model.ir_version = IR_VERSION
    return model


def _gelu(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """x / 2 * (1 + erf(x / sqrt 2)), the exact form; the tanh form is not used by our models."""
    if any(a.name == "approximate" and a.s not in (b"", b"none") for a in node.attribute):
        raise _refused(node, "the tanh form of Gelu")
    x, y = node.input[0], node.output[0]
    steps = (
        ("Div", [x, "gelu/root"], "scaled"),
        ("Erf", [f"{y}/scaled"], "erf"),
        ("Add", [f"{y}/erf", "gelu/one"], "sum"),
        ("Mul", [x, f"{y}/sum"], "product"),
        ("Mul", [f"{y}/product", "gelu/half"], ""),
    )
    out = []
    for operator, inputs, suffix in steps:
        name = f"{node.name}/{operator}{'_half' if not suffix else ''}"
        made = helper.make_node(operator, inputs, [f"{y}/{suffix}" if suffix else y], name)
        place(made, module_of(node))
        out.append(made)
    return out


def _lowered(index: GraphIndex, node: onnx.NodeProto) -> onnx.NodeProto:
    defaults = _DEFAULTS.get(node.op_type, {})
    kept = []
    for a in node.attribute:
        if (
            a.name in defaults
            and a.name not in onnx.defs.get_schema(node.op_type, OPSET).attributes
        ):
            if helper.get_attribute_value(a) != defaults[a.name]:
                raise _refused(node, f"{a.name} of {node.op_type}")
        elif not (node.op_type == "Split" and a.name == "num_outputs"):
            kept.append(a)
    if node.op_type == "Split" and len(node.input) == 1 and not _even(index, node):
        raise _refused(node, "Split into parts that are not known to be equal")
    copies = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in kept]
    del node.attribute[:]
    node.attribute.extend(copies)
    if node.op_type in _AXES_AS_ATTRIBUTE and len(node.input) > 1:
        if node.input[1] not in index.tensors:
            raise _refused(node, f"{node.op_type} with computed axes")
        axes = index.constant(node.input[1]).tolist()
        node.attribute.append(helper.make_attribute("axes", axes))
        del node.input[1:]
    return node


def _even(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether a Split without sizes makes equal parts; the last may be smaller since opset 18."""
    shapes = {index.shape(name) for name in node.output}
    return len(shapes) == 1 and None not in shapes


def _require(node: onnx.NodeProto) -> None:
    if node.domain == DOMAIN:
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET)
    except onnx.defs.SchemaError as error:
        raise _refused(node, node.op_type) from error
    unknown = [a.name for a in node.attribute if a.name not in schema.attributes]
    if unknown or len(node.input) > schema.max_input:
        raise _refused(node, f"{node.op_type} with {', '.join(unknown) or 'so many inputs'}")


def _refused(node: onnx.NodeProto, what: str) -> ExportError:
    return ExportError(
        "export-lower",
        f"opset {OPSET} has no form of {what}",
        why=f"the node {node.name} of {module_of(node) or 'the top'} needs it",
        fix="leave out the dialect trt8, or rewrite the module",
    )
