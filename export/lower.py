"""Opset 20 to 17, for TensorRT 8.6: only what refedge's own graphs hold, and nothing silently.

Gelu becomes Div, Erf, Add, Mul, Mul; an instance norm is a layer norm over the pixels of a channel,
because 8.6.0's parser makes a plugin of the former, which needs cuDNN, and its bindings cannot ask
for the native layer; reductions carry their axes as an attribute; attributes that came later are
dropped where they hold their default. Every node is then checked against the schema
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
from .rewrite import add

OPSET = 17
PLAIN = "norm/"  # begins the names of constants that are ones or zeros throughout
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
        if node.op_type == "Gelu":
            nodes += _gelu(node)
        elif node.op_type == "InstanceNormalization":
            nodes += _instance_norm(index, node)
        else:
            nodes.append(_lowered(index, node))
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


def _instance_norm(index: GraphIndex, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """LayerNormalization over all axes behind the channel's, then its factors and terms if any."""
    x, y = node.input[0], node.output[0]
    shape = index.shape(x) or index.shape(y) or ()
    sides = [d for d in shape[2:] if isinstance(d, int)]
    if len(shape) < 3 or len(sides) != len(shape) - 2:
        raise _refused(node, "InstanceNormalization of unknown pixels")
    area = "x".join(map(str, sides))
    scale, shift = (index.constant(name).astype(np.float32) for name in node.input[1:3])
    wide = (-1, *[1] * len(sides))
    steps: list[tuple[str, list[str], str]] = []
    names = []
    for kind, value in (("ones", 1.0), ("zeros", 0.0)):
        name = f"{PLAIN}{kind}_{area}"
        if name not in index.tensors:
            add(index, name, np.full(sides, value, np.float32))
            index.tensors[name] = index.model.graph.initializer[-1]
        names.append(name)
    steps.append(("LayerNormalization", [x, *names], "normed"))
    if (scale != 1.0).any():
        factor = add(index, f"{y}/scale", scale.reshape(wide))
        steps.append(("Mul", [f"{y}/normed", factor], "scaled"))
    if (shift != 0.0).any():
        term = add(index, f"{y}/shift", shift.reshape(wide))
        steps.append(("Add", [f"{y}/{steps[-1][2]}", term], "shifted"))
    out = []
    for i, (operator, inputs, suffix) in enumerate(steps):
        made = helper.make_node(
            operator,
            inputs,
            [y if i == len(steps) - 1 else f"{y}/{suffix}"],
            f"{node.name}/{operator}" if i else node.name,
        )
        place(made, module_of(node))
        out.append(made)
    out[0].attribute.append(helper.make_attribute("axis", 2))
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    out[0].attribute.append(helper.make_attribute("epsilon", epsilon))
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
