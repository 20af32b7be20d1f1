"""Embedding tables as integers: a row becomes numbers after it was looked up.

A table is read a row per word, so a scale per row costs as many steps as the expression has words,
and a quarter of the bytes is on disk and in memory. A DequantizeLinear in front of the Gather
would compute the whole table at every call.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from .graph import GraphIndex, attribute
from .rewrite import add, declare, node_of, only, replace, rewrite

_LEAST = 1 << 20  # bytes in float32; smaller tables are not worth four nodes


def store_tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store large tables that a Gather alone reads as int8 by row; changes the model in place."""
    return rewrite(model, (_by_rows,))


def _by_rows(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``gather(W, i)`` to ``gather(integers, i) * gather(scales, i)``."""
    if node.op_type != "Gather" or attribute(node, "axis", 0) != 0:
        return False
    name, rows = node.input
    shape = index.shape(node.output[0])
    if name not in index.tensors or not index.is_float(name) or not only(index, name):
        return False
    table = index.constant(name)
    if table.ndim != 2 or table.nbytes < _LEAST or shape is None:
        return False
    scales = np.abs(table).max(axis=1) / np.float32(127)
    scales[scales == 0] = 1
    integers = np.rint(table / scales[:, None]).astype(np.int8)
    out, stem = node.output[0], node.name
    kept = add(index, f"{name}/int8", integers), add(index, f"{name}/scale", scales)
    last = add(index, f"{stem}/last", np.array([-1], np.int64))
    names = [f"{out}/{step}" for step in ("int8", "numbers", "steps", "scale")]
    made = [
        node_of(node, "Gather", [kept[0], rows], names[:1], f"{stem}/int8"),
        node_of(node, "Cast", names[:1], names[1:2], f"{stem}/numbers", to=TensorProto.FLOAT),
        node_of(node, "Gather", [kept[1], rows], names[2:3], f"{stem}/steps"),
        node_of(node, "Unsqueeze", [names[2], last], names[3:], f"{stem}/scale"),
        node_of(node, "Mul", [names[1], names[3]], [out], stem),
    ]
    declare(index, names[1], out)
    declare(index, names[2], out, shape[1:-1])
    declare(index, names[3], out, (*shape[1:-1], 1))
    replace(index, node, made)
    return True
