"""What ONNX Runtime's kernels like better, for the ``ort`` dialects alone; equal to rounding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx

from .graph import GraphIndex, attribute
from .rewrite import add, declare, maker_of, node_of, only, replace, rewrite

_MASKED = -1e3  # what a masked score is at most
_FLOOR = -30.0  # below the largest score; exp(-30) = 9e-14 is nothing beside 1 in float32
_CENTRES = (b"half_pixel", b"pytorch_half_pixel")  # where Resize says that pixels have centres


def for_ort(model: onnx.ModelProto) -> onnx.ModelProto:
    """Apply all rules until none fits any more; changes the model in place.

    The rules for integers read weights, which lie beside a float graph by now.
    """
    integers = (_pixels_by_rows, _upsample_by_products, _sum_last, _one_product)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    return rewrite(model, (_floor_scores, *(integers if quantized else ()), _one_affine))


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


def _pixels_by_rows(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``quantize(turned(x) - mean)``, x a picture channels last, the mean a number per channel.

    ONNX Runtime moves the turn behind the difference, where three numbers then repeat along the
    last axis; a row of the picture at a time takes less (``benchmarks/forms.py``).
    """
    chain, name = [], node.input[0] if node.op_type == "QuantizeLinear" else ""
    while (step := index.maker.get(name)) is not None and step.op_type in ("Mul", "Sub", "Add"):
        if not only(index, name) or step.input[1] not in index.tensors:
            return False
        chain.append(step)
        name = step.input[0]
    turn = maker_of(index, name, "Transpose")
    shape = index.shape(turn.input[0]) if turn is not None else None
    if not chain or turn is None or shape is None or attribute(turn, "perm") != [0, 3, 1, 2]:
        return False
    _, height, width, channels = shape
    dims = (1, channels, 1, 1)
    values = [index.constant(step.input[1]) for step in chain]
    if channels > 4 or any(v.size > 1 and v.shape != dims for v in values):
        return False
    if all(v.size == 1 for v in values):
        return False
    flat, full = f"{name}/rows", f"{node.input[0]}/picture"
    sizes = [np.array([-1, height, width * channels]), np.array([-1, height, width, channels])]
    to_rows, to_picture = (
        add(index, f"{n}/shape", s) for n, s in zip((flat, full), sizes, strict=True)
    )
    made = [node_of(turn, "Reshape", [turn.input[0], to_rows], [flat], flat)]
    declare(index, flat, turn.input[0], (height, width * channels))
    for step, value in zip(reversed(chain), reversed(values), strict=True):
        row = value.reshape(-1) if value.size == 1 else np.tile(value.reshape(-1), width)
        constant, out = add(index, f"{step.output[0]}/row", row), f"{step.output[0]}/rows"
        made.append(node_of(step, step.op_type, [made[-1].output[0], constant], [out], step.name))
        declare(index, out, flat)
    made.append(node_of(turn, "Reshape", [made[-1].output[0], to_picture], [full], full))
    declare(index, full, turn.input[0])
    made.append(node_of(turn, "Transpose", [full], [node.input[0]], turn.name, perm=[0, 3, 1, 2]))
    replace(index, chain[0], made)
    for gone in (*chain[1:], turn):
        replace(index, gone, [])
    return True


def _upsample_by_products(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """A bilinear upsampling of what was integers, by a matrix for rows and one for columns.

    Its operator computes one number at a time; only float convolutions hand it the blocked layout
    that it is fast in.
    """
    source = index.maker.get(node.input[0]) if node.op_type == "Resize" else None
    if source is None or source.op_type != "DequantizeLinear":
        return False
    out, quantize = node.output[0], index.maker.get(source.input[0])
    before, after = index.shape(quantize.input[0] if quantize else ""), index.shape(out)
    if before is None or after is None or len(after) != 4 or before[:2] != after[:2]:
        return False
    if any(a % b for a, b in zip(after[2:], before[2:], strict=True)):
        return False
    if attribute(node, "mode") != b"linear" or attribute(node, "axes") is not None:
        return False
    if attribute(node, "antialias", 0) or attribute(node, "exclude_outside", 0):
        return False
    if attribute(node, "coordinate_transformation_mode", b"half_pixel") not in _CENTRES:
        return False
    if any(r.op_type == "QuantizeLinear" for r in index.readers[out]):
        return False
    rows, columns = (_shares(b, a) for b, a in zip(before[2:], after[2:], strict=True))
    wide = f"{out}/wide"
    names = add(index, f"{out}/rows", rows), add(index, f"{out}/columns", columns.T)
    first = node_of(node, "MatMul", [node.input[0], names[1]], [wide], f"{node.name}/wide")
    declare(index, wide, out, (before[1], before[2], after[3]))
    replace(index, node, [first, node_of(node, "MatMul", [names[0], wide], [out], node.name)])
    return True


def _shares(few: int, many: int) -> npt.NDArray[np.float32]:
    """What each of ``many`` pixels takes of each of ``few``, [many, few]; pixels have centres."""
    place = ((np.arange(many) + 0.5) * few / many - 0.5).clip(0, few - 1)
    distance = np.abs(place[:, None] - np.arange(few))
    return np.asarray((1.0 - distance).clip(0.0, None), np.float32)


def _product(index: GraphIndex, name: str) -> onnx.NodeProto | None:
    """What makes a tensor for one reader, if it is a product of a constant matrix with a map."""
    node = maker_of(index, name, "MatMul")
    left = index.tensors.get(node.input[0]) if node is not None else None
    return node if left is not None and len(left.dims) == 2 else None


def _sum_last(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``(x + a @ b) + c @ d`` to ``x + (a @ b + c @ d)``."""
    total = maker_of(index, node.input[0], "Add") if node.op_type == "Add" else None
    if total is None or _product(index, node.input[1]) is None:
        return False
    if _product(index, total.input[0]) or _product(index, total.input[1]) is None:
        return False
    both = f"{node.output[0]}/both"
    made = node_of(node, "Add", [total.input[1], node.input[1]], [both], f"{node.name}/both")
    declare(index, both, node.output[0])
    last = node_of(node, "Add", [total.input[0], both], node.output, node.name)
    replace(index, node, [made, last])
    replace(index, total, [])
    return True


def _one_product(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``a @ b + c @ d``, a and c constant, to the product of both side by side."""
    found = [_product(index, name) for name in node.input] if node.op_type == "Add" else [None]
    terms = [term for term in found if term is not None]
    if len(terms) != len(found) or len({*node.input}) < 2:
        return False
    (left, right), out = (t.input for t in terms), node.output[0]
    known = [index.shape(t.input[1]) for t in terms]
    shapes = [shape for shape in known if shape is not None]
    if len(shapes) < len(known):
        return False
    matrices = [index.constant(t.input[0]) for t in terms]
    if len({(s[:-2], s[-1:]) for s in shapes}) > 1 or matrices[0].shape[0] != matrices[1].shape[0]:
        return False
    stacked, matrix = f"{out}/stacked", add(index, f"{out}/matrix", np.concatenate(matrices, 1))
    maps = [left[1], right[1]]
    gone = terms
    inner = maker_of(index, left[1], "Concat")
    if inner is not None and inner.name == f"{terms[0].name}/stacked":
        maps, gone = [*inner.input, right[1]], [*terms, inner]
    concat = node_of(node, "Concat", maps, [stacked], f"{node.name}/stacked", axis=-2)
    height = sum(s[-2] for s in shapes)
    declare(index, stacked, maps[0], (*shapes[0][1:-2], height, shapes[0][-1]))
    replace(index, node, [concat, node_of(node, "MatMul", [matrix, stacked], [out], node.name)])
    for term in gone:
        replace(index, term, [])
    return True


def _one_affine(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``x * scale + shift``, a number each per channel, in one pass: a batch norm of no effect.

    Nodes change the shape of both, whose values may lie beside the graph.
    """
    product = maker_of(index, node.input[0], "Mul") if node.op_type == "Add" else None
    shape = index.shape(node.output[0])
    if product is None or shape is None or len(shape) != 4:
        return False
    names = (product.input[1], node.input[1])
    if any(index.shape(n) != (shape[1], 1, 1) or n not in index.tensors for n in names):
        return False
    if product.input[0] in index.tensors or index.shape(product.input[0]) != shape:
        return False
    flat = add(index, f"{node.output[0]}/flat", np.array([-1], np.int64))
    steps = [
        node_of(node, "Reshape", [name, flat], [f"{node.output[0]}/{key}"], f"{node.name}/{key}")
        for name, key in zip(names, ("scale", "shift"), strict=True)
    ]
    mean = add(index, f"{node.output[0]}/mean", np.zeros(shape[1], np.float32))
    variance = add(index, f"{node.output[0]}/variance", np.ones(shape[1], np.float32))
    inputs = [product.input[0], steps[0].output[0], steps[1].output[0], mean, variance]
    norm = node_of(node, "BatchNormalization", inputs, node.output, node.name, epsilon=0.0)
    replace(index, node, [*steps, norm])
    replace(index, product, [])
    return True
