"""Linear maps in a cheaper order: exact, fewer multiplications.

A 1x1 convolution of a product of two thin matrices takes the smaller factor; what it gives is
rows of channels, and stays so until a convolution reads it. A constant factor is a matrix.
Upsampling takes the same share of its neighbours in every channel, so that a 1x1 convolution of an
upsampled map may come first, over fewer pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from .graph import GraphIndex, attribute
from .rewrite import add, declare, node_of, only, pointwise, replace, rewrite


def reorder(model: onnx.ModelProto, *, squeeze: bool = True) -> onnx.ModelProto:
    """Apply all rules until none fits any more; changes the model in place.

    squeeze: 1x1 convolutions before upsampling too.
    """
    rules = (_convolve_thin_factor, _sum_channels_last, _own_factor)
    return rewrite(model, (*rules, _squeeze_first) if squeeze else rules)


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


# nanoseconds per element or multiply-add on one core, fitted to ONNX Runtime; ../docs/folding.md
_MAC, _UPSAMPLE, _SUM, _CONCAT = 0.0165, 2.0, 0.3, 1.8


def _squeeze_first(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``conv(concat(up(a), b))`` to ``conv(b) + up(conv(a))``, where that takes less time.

    The bias stays with what is not upsampled, or goes with the first map: shares sum to one.
    """
    shape = index.shape(node.output[0])
    concat = index.maker.get(node.input[0]) if pointwise(index, node) else None
    if concat is None or shape is None:
        return False
    names = [node.input[0]]
    if concat.op_type == "Concat" and attribute(concat, "axis") == 1 and only(index, names[0]):
        names = list(concat.input)
    widths = [(index.shape(name) or (0, 0))[1] for name in names]
    weight = index.constant(node.input[1])
    if sum(widths) != weight.shape[1]:
        return False
    pieces = np.split(weight, np.cumsum(widths)[:-1], axis=1)
    first = [_small_map(index, name, node) for name in names]
    if not any(first):
        return False
    out, bias, made = node.output[0], list(node.input[2:]), []
    dims = {"kernel_shape": [1, 1]}
    terms = []
    rest = [i for i, resize in enumerate(first) if resize is None]
    if rest:
        kept = add(index, f"{node.input[1]}/kept", np.concatenate([pieces[i] for i in rest], 1))
        source = names[rest[0]]
        if len(rest) > 1:
            source = f"{out}/kept"
            kept_names = [names[i] for i in rest]
            made.append(node_of(concat, "Concat", kept_names, [source], concat.name, axis=1))
            declare(index, source, out, (sum(widths[i] for i in rest), *shape[2:]))
        terms.append(f"{out}/rest")
        made.append(node_of(node, "Conv", [source, kept, *bias], terms[-1:], node.name, **dims))
        bias = []
    for i, resize in enumerate(first):
        if resize is None:
            continue
        part = add(index, f"{node.input[1]}/{i}", pieces[i])
        small, large = f"{out}/small_{i}", f"{out}/large_{i}"
        inputs = [resize.input[0], part, *bias]
        made.append(node_of(node, "Conv", inputs, [small], f"{node.name}/small_{i}", **dims))
        declare(index, small, out, (shape[1], *(index.shape(resize.input[0]) or ())[2:]))
        up = node_of(node, "Resize", [small, *resize.input[1:]], [large], f"{node.name}/up_{i}")
        up.attribute.extend(resize.attribute)
        made.append(up)
        bias = []
        terms.append(large)
    for name in terms:
        declare(index, name, out)
    total = terms[0]
    for i, term in enumerate(terms[1:]):
        last = out if i == len(terms) - 2 else f"{out}/sum_{i}"
        made.append(node_of(node, "Add", [total, term], [last], f"{node.name}/sum_{i}"))
        declare(index, last, out)
        total = last
    if len(terms) == 1:
        made[-1].output[0] = out
    resizes = [resize for resize in first if resize is not None]
    replace(index, node, made)
    if concat not in resizes:
        replace(index, concat, [])
    for resize in resizes:
        replace(index, resize, [])
    return True


def _small_map(index: GraphIndex, name: str, conv: onnx.NodeProto) -> onnx.NodeProto | None:
    """The upsampling that made a tensor, if the convolution should come before it."""
    resize = index.maker.get(name)
    if resize is None or resize.op_type != "Resize" or not only(index, name):
        return None
    before, after, out = (index.shape(n) for n in (resize.input[0], name, conv.output[0]))
    if before is None or after is None or out is None or before[:2] != after[:2]:
        return None
    if len(after) != 4 or attribute(resize, "mode", b"nearest") not in (b"linear", b"nearest"):
        return None
    many, few = after[2] * after[3], before[2] * before[3]
    width, channels = after[1], out[1]
    spared = (many - few) * width * channels * _MAC + many * width * (_UPSAMPLE + _CONCAT)
    return resize if spared > many * channels * (_UPSAMPLE + _SUM) else None
