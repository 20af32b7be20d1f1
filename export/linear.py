"""Linear maps in a cheaper order: exact, fewer multiplications.

A 1x1 convolution of a product of two thin matrices takes the smaller factor; what it gives is
rows of channels, and stays so until a convolution reads it. A constant factor is a matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from .graph import GraphIndex, attribute
from .rewrite import add, declare, node_of, only, pointwise, replace, rewrite


def reorder(model: onnx.ModelProto) -> onnx.ModelProto:
    """Apply all rules until none fits any more; changes the model in place."""
    return rewrite(model, (_convolve_thin_factor, _sum_channels_last, _own_factor))


def _convolve_thin_factor(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``conv(a @ c^T)``, a [B, D, R] and c [B, N, R], to ``c @ (a^T @ w^T)`` and its bias.

    The result is made channels last, as integer kernels want it.
    """
    flat = index.maker.get(node.input[0]) if pointwise(index, node) else None
    product = index.maker.get(flat.input[0]) if flat and flat.op_type == "Reshape" else None
    if flat is None or product is None or product.op_type != "MatMul":
        return False
    second = index.maker.get(product.input[1])
    factors = [index.shape(name) for name in product.input]
    out, shape = node.output[0], index.shape(node.output[0])
    if second is None or second.op_type != "Transpose" or shape is None:
        return False
    if not only(index, flat.input[0]) or not only(index, node.input[0]):
        return False
    left, right = factors
    if left is None or right is None or not len(left) == len(right) == 3:
        return False
    (_, width, rank), pixels, channels = left, right[2], shape[1]
    before, after = index.shape(flat.input[0]), index.shape(node.input[0])
    if before != (1, width, pixels) or after != (1, width, *shape[2:]):
        return False
    if attribute(second, "perm") != [0, 2, 1] or rank * (width + pixels) >= width * pixels:
        return False
    weight = index.constant(node.input[1]).reshape(channels, width)
    matrix = add(index, f"{node.input[1]}/transposed", weight.T)
    size = add(index, f"{out}/shape", np.array([-1, *shape[2:], channels], np.int64))
    steps: list[tuple[onnx.NodeProto, str, list[str], str, tuple[int, ...], dict[str, Any]]] = [
        (product, "Transpose", [product.input[0]], "turned", (rank, width), {"perm": [0, 2, 1]}),
        (product, "MatMul", [f"{out}/turned", matrix], "factor", (rank, channels), {}),
        (product, "MatMul", [second.input[0], f"{out}/factor"], "rows", (pixels, channels), {}),
        (node, "Add", [f"{out}/rows", *node.input[2:]], "biased", (pixels, channels), {}),
    ]
    if len(node.input) == 2:
        del steps[-1]
    rows = f"{out}/{steps[-1][3]}"
    steps.append((flat, "Reshape", [rows, size], "map", (*shape[2:], channels), {}))
    made = []
    for source, kind, inputs, name, dims, attributes in steps:
        made.append(
            node_of(source, kind, inputs, [f"{out}/{name}"], f"{node.name}/{name}", **attributes)
        )
        declare(index, f"{out}/{name}", out, dims)
    name = f"{node.name}/first"
    made.append(node_of(node, "Transpose", [f"{out}/map"], [out], name, perm=[0, 3, 1, 2]))
    replace(index, node, made)
    for gone in (flat, product, *([second] if only(index, second.output[0]) else [])):
        replace(index, gone, [])
    return True


def _sum_channels_last(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``relu(x + turned(y))`` to ``turned(relu(back(x) + y))``, if y is a map, channels last."""
    if node.op_type != "Relu" or not only(index, node.input[0]):
        return False
    total = index.maker.get(node.input[0])
    if total is None or total.op_type != "Add":
        return False
    for x, turned in (tuple(total.input), tuple(total.input)[::-1]):
        turn, shape = index.maker.get(turned), index.shape(turned)
        if turn is None or turn.op_type != "Transpose" or not only(index, turned):
            continue
        if attribute(turn, "perm") != [0, 3, 1, 2] or index.shape(x) != shape or shape is None:
            continue
        names = [f"{node.output[0]}/{name}" for name in ("back", "sum", "relu")]
        back = node_of(total, "Transpose", [x], [names[0]], f"{total.name}/back", perm=[0, 2, 3, 1])
        summed = node_of(total, "Add", [names[0], turn.input[0]], [names[1]], total.name)
        relu = node_of(node, "Relu", [names[1]], [names[2]], node.name)
        last = node_of(
            node, "Transpose", [names[2]], node.output, f"{node.name}/first", perm=[0, 3, 1, 2]
        )
        for name in names:
            declare(index, name, turned, (*shape[2:], shape[1]))
        replace(index, node, [back, summed, relu, last])
        for gone in (total, turn):
            replace(index, gone, [])
        return True
    return False


def _own_factor(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """A constant right factor [1, K, N] becomes a matrix of its own, which can be packed."""
    if node.op_type != "MatMul" or node.input[1] not in index.tensors:
        return False
    factor = index.constant(node.input[1])
    if factor.ndim < 3 or factor.shape[:-2] != (1,) * (factor.ndim - 2):
        return False
    left = index.shape(node.input[0])
    if left is None or len(left) < factor.ndim or node.input[0] in index.tensors:
        return False
    node.input[1] = add(index, f"{node.name}/factor", factor.reshape(factor.shape[-2:]))
    return True
