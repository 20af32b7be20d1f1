"""What ONNX Runtime's kernels like better, for the ``ort`` dialects alone; equal to rounding."""

from __future__ import annotations

import numpy as np
import onnx

from .graph import GraphIndex, attribute
from .rewrite import add, declare, node_of, replace, rewrite

_MASKED = -1e3  # what a masked score is at most
_FLOOR = -30.0  # below the largest score; exp(-30) = 9e-14 is nothing beside 1 in float32


def for_ort(model: onnx.ModelProto) -> onnx.ModelProto:
    """Apply all rules until none fits any more; changes the model in place."""
    return rewrite(model, (_floor_scores,))


def _floor_scores(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``softmax(where(mask, x, -1e4))``: no score more than 30 below the largest.

    The exponential of less is smaller than float32 can hold without falling out of the processor's
    fast path.
    """
    where = index.maker.get(node.input[0]) if node.op_type == "Softmax" else None
    if where is None or where.op_type != "Where" or where.input[2] not in index.tensors:
        return False
    shape = index.shape(node.input[0])
    if shape is None or index.constant(where.input[2]).max() > _MASKED:
        return False
    axis, out = int(str(attribute(node, "axis", -1))), node.output[0]
    reduced = [1 if i == axis % len(shape) else n for i, n in enumerate(shape)][1:]
    axes = add(index, f"{out}/axis", np.array([axis], np.int64))
    floor = add(index, f"{out}/floor", np.array(_FLOOR, np.float32))
    made = []
    for kind, inputs, name in (
        ("ReduceMax", [node.input[0], axes], "largest"),
        ("Sub", [node.input[0], f"{out}/largest"], "below"),
        ("Max", [f"{out}/below", floor], "floored"),
    ):
        made.append(node_of(node, kind, inputs, [f"{out}/{name}"], f"{node.name}/{name}"))
        declare(index, f"{out}/{name}", out, reduced if name == "largest" else None)
    made.append(node_of(node, "Softmax", [f"{out}/floored"], [out], node.name, axis=axis))
    replace(index, node, made)
    return True
