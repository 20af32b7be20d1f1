"""Where Q/DQ pairs go: TensorRT's rules, decided on the canonical graph.

- the activation and the weight of every Conv, Gemm and MatMul that has a constant weight;
- one pair per tensor, shared by all its readers;
- weights per output channel (one scale where kernels take no more), activations per tensor,
  symmetric, biases not at all;
- through nodes that only move or blend values, so that the move is in integers;
- the outputs of integer convolutions, and of additions and products of quantized maps, are
  ``stored``: ONNX Runtime's integer kernels have to write integers; TensorRT does better without
  the pair where a reader computes in float.

Norms, softmax, ratios, attention products and the choice of regions have no constant weight and
stay in float; so do the modules that the model calls ``high``. The padding mask never passes
through a quantized tensor, because it enters behind the products that it masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from ..export.canonical import module_of
from ..export.graph import GraphIndex, attribute
from ..export.words import STATISTICS

MOVERS = ("Transpose", "Reshape", "Resize")  # one input, values unchanged or blended
ELEMENTWISE = ("Add", "Mul")
# in no integers, and in float32 even where the rest is float16
WIDE = ("Softmax", "LayerNormalization", "InstanceNormalization", "Div", "TopK")
HIGH = (*WIDE, "Tanh")


@dataclass(frozen=True)
class Placement:
    """Names of nodes and tensors.

    int8, high: nodes that compute in integers; those that are in float32 where the rest is float16.
    inputs:     tensors that integer nodes read, and what movers before them read.
    stored:     tensors that only ONNX Runtime's integer kernels write as integers.
    weights:    constant to the axis of its channels, None for one scale in all; those of spared
                nodes as well, whose activations alone stay in float.
    same:       tensors that must have one scale, because a node only moves values.
    factors:    stored tensors that only a product with a stored map reads as integers; sums over
                all pixels depend on their largest values, so that no range may cut them.
    rectified:  what a Relu alone reads, and what it writes, whose scale both have: the negative
                side needs no range, and nothing is rounded twice.
    """

    int8: tuple[str, ...]
    high: tuple[str, ...]
    inputs: tuple[str, ...]
    stored: tuple[str, ...]
    weights: dict[str, int | None]
    same: tuple[tuple[str, str], ...]
    factors: tuple[str, ...] = ()
    rectified: tuple[tuple[str, str], ...] = ()


def place(
    index: GraphIndex, high_modules: Iterable[str] = (), spared: frozenset[str] = frozenset()
) -> Placement:
    """Decide for a graph; nodes of ``high_modules`` and ``spared`` nodes stay in float."""
    high = {n.name for n in index.nodes if is_high(n, tuple(high_modules))}
    int8: list[str] = []
    weights: dict[str, int | None] = {}
    inputs: dict[str, None] = {}
    stored: dict[str, None] = {}
    for node in index.nodes:
        weight = index.weight_of(node)
        if weight is None or node.name in high:
            continue
        weights[weight] = channel_axis(index, node, weight)
        if node.name in spared:
            continue
        int8.append(node.name)
        inputs[next(i for i in node.input[:2] if i != weight)] = None
        if node.op_type == "Conv":
            stored[node.output[0]] = None
    factors, moved = _products(index, high, stored, weights)
    same = (*_spread(index, inputs), *moved, *_store_elementwise(index, inputs, stored, high))
    return Placement(
        tuple(int8),
        tuple(n.name for n in index.nodes if is_high(n, tuple(high_modules), WIDE)),
        tuple(inputs),
        tuple(t for t in stored if t not in inputs and t not in index.outputs),
        weights,
        same,
        factors,
        _rectified(index, {*inputs, *stored}),
    )


def is_high(node: onnx.NodeProto, modules: tuple[str, ...], kinds: tuple[str, ...] = HIGH) -> bool:
    """Whether a node stays out of integers, by its kind or by its module; ``WIDE``: in float32."""
    module = module_of(node)
    inside = any(module == m or module.startswith(f"{m}.") for m in modules)
    return inside or node.op_type in kinds or STATISTICS in node.name


def channel_axis(index: GraphIndex, node: onnx.NodeProto, weight: str) -> int | None:
    """The axis of a weight's output channels, or None where it gets one scale in all.

    ONNX Runtime's fused products refuse, at run time, scales per channel of a left factor or of a
    factor of more than two axes.
    """
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    plain = node.input[1] == weight and len(index.tensors[weight].dims) == 2
    return 1 if plain else None


def _spread(index: GraphIndex, inputs: dict[str, None]) -> tuple[tuple[str, str], ...]:
    """Quantize what a mover reads wherever what it writes is quantized; Concat reads several.

    A constant that a Concat reads has no maker whose output a pair could follow; it stays in float.
    """
    same = []
    pending = list(inputs)
    while pending:
        name = pending.pop()
        maker = index.maker.get(name)
        if maker is None or maker.op_type not in (*MOVERS, "Concat"):
            continue
        moved = list(maker.input[:1]) if maker.op_type in MOVERS else list(maker.input)
        for source in moved:
            if source in index.tensors or not index.is_float(source):
                continue
            if maker.op_type in MOVERS:
                same.append((source, name))
            if source not in inputs:
                inputs[source] = None
                pending.append(source)
    return tuple(same)


def _products(
    index: GraphIndex, high: set[str], stored: dict[str, None], weights: dict[str, int | None]
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Products in ``high`` modules whose left factor an integer convolution wrote.

    It is in integers already, and rounding the right factor averages out over the long sum; ONNX
    Runtime alone multiplies them as integers. Adds to ``stored`` and ``weights``; returns the right
    factors, and which tensors have one scale.
    """
    factors: dict[str, None] = {}
    maps: dict[str, None] = {}
    for node in index.nodes:
        if node.op_type != "MatMul" or node.name not in high:
            continue
        left, right = node.input
        if not _written(index, left, stored):
            continue
        maps[left] = None
        if right in index.tensors:
            weights[right] = channel_axis(index, node, right)
        else:
            factors[right] = None
    same = _spread(index, maps)
    stored |= maps | factors
    return tuple(factors), same


def _rectified(index: GraphIndex, quantized: set[str]) -> tuple[tuple[str, str], ...]:
    pairs = [(n.input[0], n.output[0]) for n in index.nodes if n.op_type == "Relu"]
    return tuple(p for p in pairs if quantized.issuperset(p) and len(index.readers[p[0]]) == 1)


def _written(index: GraphIndex, name: str, quantized: dict[str, None]) -> bool:
    """Whether a tensor holds what a quantized one holds, moved and rectified."""
    while name not in quantized:
        maker = index.maker.get(name)
        if maker is None or maker.op_type not in (*MOVERS, "Relu"):
            return False
        name = maker.input[0]
    return True


def _store_elementwise(
    index: GraphIndex, inputs: dict[str, None], stored: dict[str, None], high: set[str]
) -> tuple[tuple[str, str], ...]:
    """Sums and products of quantized maps are written as integers where the next one reads them.

    Chains of them, such as the residual path, then stay in integers; what only a float node reads
    is not rounded for nothing. A sum with a quantized map before a Relu whose result is quantized
    is made in integers throughout. Returns which tensors have one scale.
    """
    same: list[tuple[str, str]] = []
    for node in index.nodes:
        out, readers = node.output[0], index.readers[node.output[0]]
        if node.op_type not in ELEMENTWISE or node.name in high:
            continue
        relus = [r.output[0] for r in readers if r.op_type == "Relu" and r.output[0] in inputs]
        terms = dict.fromkeys(i for i in node.input if i not in inputs)
        if node.op_type == "Add" and relus and any(_written(index, i, inputs) for i in node.input):
            same += _spread(index, terms)
            stored |= terms
        read_on = relus or any(r.op_type in ELEMENTWISE for r in readers)
        if read_on and not terms.keys() - stored.keys():
            stored[out] = None
    return tuple(same)


def macs(index: GraphIndex, node: onnx.NodeProto) -> int:
    """Multiply-accumulates of a Conv, MatMul or Gemm for a batch of one; 0 for other nodes."""
    if node.op_type not in ("Conv", "MatMul", "Gemm"):
        return 0
    out, left, right = (index.shape(n) for n in (node.output[0], node.input[0], node.input[1]))
    if out is None or left is None or right is None:
        return 0
    inner = math.prod(right[1:]) if node.op_type == "Conv" else left[-1]
    return math.prod(out) * inner


def weighted_macs(index: GraphIndex) -> dict[str, int]:
    """Multiply-accumulates of every node with a constant weight, for a batch of one."""
    return {n.name: macs(index, n) for n in index.nodes if index.weight_of(n) is not None}
