"""Affine maps per channel folded into their neighbours: exact, and worth it on every backend.

Batch normalization in evaluation and layer scale multiply and shift each channel by constants. A
convolution before them takes both, a 1x1 convolution behind them takes both too; where a shortcut
leads around, ``x + s * (f(x) + norm(x))`` becomes ``s * f(x) + d(x)``, with one affine map d. In
float64, then rounded once. Maps that are flattened and transposed are transposed first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from .graph import GraphIndex, attribute
from .rewrite import add, declare, node_of, only, own_weights, pointwise, replace, rewrite

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """``x * scale + shift`` per channel, both [C]."""

    scale: Doubles
    shift: Doubles


def fold_affine(model: onnx.ModelProto) -> onnx.ModelProto:
    """Apply all rules until none fits any more; changes the model in place."""
    rules = (
        _distribute,
        _scale_convolution,
        _scale_norm,
        _norm_over_places,
        _merge_shortcut,
        _norm_into_convolutions,
        _pixels_first,
    )
    return rewrite(model, rules)


def _distribute(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``c * (conv + norm)`` to ``c * conv + c * norm``."""
    found = _scaled(index, node)
    if found is None:
        return False
    name, scale = found
    total = index.maker.get(name)
    if total is None or total.op_type != "Add" or not only(index, name):
        return False
    kinds = [index.maker[i].op_type if i in index.maker else "" for i in total.input]
    if sorted(kinds) != ["BatchNormalization", "Conv"]:
        return False
    parts = []
    for term in total.input:
        output = f"{term}/scaled_by/{scale}"
        parts.append(node_of(node, "Mul", [term, scale], [output], f"{output}/Mul"))
        declare(index, output, term)
    total_scaled = node_of(total, "Add", [p.output[0] for p in parts], node.output, total.name)
    replace(index, node, [*parts, total_scaled])
    replace(index, total, [])
    return True


def _scale_convolution(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``c * conv(x)`` to a convolution with larger weights."""
    found = _scaled(index, node)
    conv = None if found is None else index.maker.get(found[0])
    if found is None or conv is None or conv.op_type != "Conv" or not only(index, found[0]):
        return False
    if not own_weights(index, conv):
        return False
    _scale_weights(index, conv, index.doubles(found[1]).reshape(-1))
    conv.output[0] = node.output[0]
    replace(index, node, [])
    return True


def _scale_norm(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``c * norm(x)`` to a normalization of its own."""
    found = _scaled(index, node)
    norm = None if found is None else index.maker.get(found[0])
    if found is None or norm is None or norm.op_type != "BatchNormalization":
        return False
    scale = index.doubles(found[1]).reshape(-1)
    names = [f"{node.output[0]}/{kind}" for kind in ("weight", "bias")]
    for name, source in zip(names, norm.input[1:3], strict=True):
        add(index, name, (index.doubles(source) * scale).astype(np.float32))
    made = node_of(norm, "BatchNormalization", [], node.output, f"{node.name}/folded")
    made.input.extend([norm.input[0], *names, *norm.input[3:]])
    made.attribute.extend(norm.attribute)
    replace(index, node, [made])
    if only(index, norm.output[0]):
        replace(index, norm, [])
    return True


def _norm_over_places(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``norm(conv(x) + places)``, with a constant map, to the same sum of other constants."""
    total = index.maker.get(node.input[0]) if node.op_type == "BatchNormalization" else None
    if total is None or total.op_type != "Add" or not only(index, node.input[0]):
        return False
    for name, places in (tuple(total.input), tuple(total.input)[::-1]):
        conv = index.maker.get(name)
        if conv is None or conv.op_type != "Conv" or not only(index, name):
            continue
        if not own_weights(index, conv) or places not in index.tensors:
            continue
        if len(index.tensors[places].dims) != 4 or len(index.readers[places]) != 1:
            continue
        affine = _affine(index, node)
        scale, shift = (a.reshape(1, -1, 1, 1) for a in (affine.scale, affine.shift))
        _scale_weights(index, conv, affine.scale)
        _set(index, places, index.doubles(places) * scale + shift)
        total.output[0] = node.output[0]
        replace(index, node, [])
        return True
    return False


def _scale_weights(index: GraphIndex, conv: onnx.NodeProto, scale: Doubles) -> None:
    weight = index.doubles(conv.input[1])
    _set(index, conv.input[1], weight * scale.reshape(-1, *([1] * (weight.ndim - 1))))
    for bias in conv.input[2:3]:
        _set(index, bias, index.doubles(bias) * scale)


def _merge_shortcut(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``x + (conv + norm(x))`` to ``conv + d(x)``, d a depthwise 1x1 convolution."""
    if node.op_type != "Add":
        return False
    for x, name in (tuple(node.input), tuple(node.input)[::-1]):
        inner = index.maker.get(name)
        if inner is None or inner.op_type != "Add" or not only(index, name):
            continue
        for term, other in (tuple(inner.input), tuple(inner.input)[::-1]):
            norm = index.maker.get(term)
            if norm is None or norm.op_type != "BatchNormalization" or norm.input[0] != x:
                continue
            if not only(index, term):
                continue
            affine = _affine(index, norm)
            weight, bias = (f"{node.output[0]}/shortcut.{kind}" for kind in ("weight", "bias"))
            add(index, weight, (1.0 + affine.scale).astype(np.float32).reshape(-1, 1, 1, 1))
            add(index, bias, affine.shift.astype(np.float32))
            output = f"{node.output[0]}/shortcut"
            made = node_of(
                norm,
                "Conv",
                [x, weight, bias],
                [output],
                f"{node.name}/shortcut/Conv",
                group=len(affine.scale),
                kernel_shape=[1, 1],
            )
            total = node_of(node, "Add", [other, output], node.output, node.name)
            replace(index, node, [made, total])
            for gone in (inner, norm):
                replace(index, gone, [])
            declare(index, output, x)
            return True
    return False


def _norm_into_convolutions(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """``conv(norm(x))`` to a convolution of x, if all readers are 1x1 convolutions."""
    if node.op_type != "BatchNormalization" or node.output[0] in index.outputs:
        return False
    readers = index.readers[node.output[0]]
    if not readers or not all(pointwise(index, r) and len(r.input) == 3 for r in readers):
        return False
    affine = _affine(index, node)
    for conv in readers:
        weight = index.doubles(conv.input[1])
        shift = weight.reshape(len(weight), -1) @ affine.shift
        _set(index, conv.input[1], weight * affine.scale.reshape(1, -1, 1, 1))
        _set(index, conv.input[2], index.doubles(conv.input[2]) + shift)
        conv.input[0] = node.input[0]
    replace(index, node, [])
    return True


def _pixels_first(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """[B, C, H, W] flattened and then transposed, to transposed and then flattened.

    The same values; where the map is kept channels last, as integer convolutions do, nothing is
    left to move, and a product with the result needs no transposition of its own.
    """
    flat = index.maker.get(node.input[0]) if node.op_type == "Transpose" else None
    if flat is None or flat.op_type != "Reshape" or attribute(node, "perm") != [0, 2, 1]:
        return False
    source, before = index.shape(flat.input[0]), index.shape(node.input[0])
    if source is None or before is None or len(source) != 4:
        return False
    channels, pixels = source[1], source[2] * source[3]
    if before[1:] != (channels, pixels):
        return False
    made = f"{flat.input[0]}/pixels"
    last, shape = f"{made}/channels_last", f"{made}/shape"
    add(index, shape, np.array([-1, pixels, channels], np.int64))
    name = f"{node.name}/channels_last"
    transpose = node_of(node, "Transpose", [flat.input[0]], [last], name, perm=[0, 2, 3, 1])
    reshape = node_of(node, "Reshape", [last, shape], [made], f"{node.name}/pixels")
    for reader in index.readers[node.output[0]]:
        reader.input[:] = [made if i == node.output[0] else i for i in reader.input]
    for value in index.model.graph.value_info:
        if value.name == node.output[0]:
            value.name = made
    declare(index, last, flat.input[0], (*source[2:], channels))
    replace(index, node, [transpose, reshape])
    if only(index, flat.output[0]):
        replace(index, flat, [])
    return True


def _scaled(index: GraphIndex, node: onnx.NodeProto) -> tuple[str, str] | None:
    """The data and the constant of a product with one constant per channel of [B, C, H, W]."""
    if node.op_type != "Mul":
        return None
    for data, constant in (tuple(node.input), tuple(node.input)[::-1]):
        shape = index.shape(data)
        if constant not in index.tensors or data in index.tensors or shape is None:
            continue
        dims = list(index.tensors[constant].dims)
        if len(shape) == 4 and dims in ([shape[1], 1, 1], [1, shape[1], 1, 1]):
            return data, constant
    return None


def _affine(index: GraphIndex, norm: onnx.NodeProto) -> Affine:
    weight, bias, mean, variance = (index.doubles(n) for n in norm.input[1:5])
    scale = weight / np.sqrt(variance + float(str(attribute(norm, "epsilon", 1e-5))))
    return Affine(scale, bias - mean * scale)


def _set(index: GraphIndex, name: str, value: Doubles) -> None:
    index.tensors[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
