"""Where Q/DQ pairs go: TensorRT's rules, decided on the canonical graph.

- the activation and the weight of every Conv, Gemm and MatMul that has a constant weight;
- one pair per tensor, shared by all its readers;
- weights per output channel, activations per tensor, symmetric, biases not at all;
- through nodes that only move or blend values (Concat, Resize), so that the move is in integers;
- the output of an integer convolution is ``stored``: ONNX Runtime's integer convolution has to
  write integers, TensorRT does better without the pair where the reader computes in float;
- norms, softmax, the ratios of the matrix factorisation, attention products and the choice of
  regions are no candidates: they have no constant weight. The padding mask never passes through a
  quantized tensor, because it enters behind the products it masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from ..export.canonical import module_of
from ..export.graph import GraphIndex, attribute

CARRIERS = ("Concat", "Resize")
HIGH = (
    "Softmax",
    "LayerNormalization",
    "InstanceNormalization",
    "Div",
    "TopK",
    "Tanh",
)


@dataclass(frozen=True)
class Placement:
    """Names of nodes and tensors; ``weights`` maps a constant to the axis of its channels.

    same: pairs of tensors that must have one scale, because a node only moves values.
    """

    int8: tuple[str, ...]
    high: tuple[str, ...]
    inputs: tuple[str, ...]
    stored: tuple[str, ...]
    weights: dict[str, int]
    same: tuple[tuple[str, str], ...]


def place(index: GraphIndex, keep: Callable[[onnx.NodeProto], bool] = lambda _: False) -> Placement:
    """Decide for a graph; nodes for which ``keep`` holds stay in float."""
    int8, inputs, stored, weights = [], {}, {}, {}
    for node in index.nodes:
        weight = index.weight_of(node)
        if weight is None or keep(node) or not index.is_float(node.output[0]):
            continue
        int8.append(node.name)
        weights[weight] = channel_axis(index, node, weight)
        activation = next(i for i in node.input[:2] if i != weight)
        inputs[activation] = None
        if node.op_type == "Conv":
            stored[node.output[0]] = None
    same = _spread(index, inputs)
    return Placement(
        tuple(int8),
        tuple(n.name for n in index.nodes if n.op_type in HIGH),
        tuple(inputs),
        tuple(t for t in stored if t not in inputs and t not in index.outputs),
        weights,
        same,
    )


def channel_axis(index: GraphIndex, node: onnx.NodeProto, weight: str) -> int:
    """The axis of a weight's output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    rank = len(index.tensors[weight].dims)
    return rank - 1 if node.input[1] == weight else rank - 2


def _spread(index: GraphIndex, inputs: dict[str, None]) -> tuple[tuple[str, str], ...]:
    """Quantize what a carrier reads wherever its output is quantized."""
    same = []
    pending = list(inputs)
    while pending:
        name = pending.pop()
        maker = index.maker.get(name)
        if maker is None or maker.op_type not in CARRIERS:
            continue
        sources = maker.input[:1] if maker.op_type == "Resize" else maker.input
        for source in sources:
            if maker.op_type == "Resize":
                same.append((source, name))
            if source not in inputs:
                inputs[source] = None
                pending.append(source)
    return tuple(same)


def macs(index: GraphIndex, node: onnx.NodeProto) -> int:
    """Multiply-accumulates of a Conv, MatMul or Gemm for a batch of one; 0 for other nodes."""
    if node.op_type not in ("Conv", "MatMul", "Gemm"):
        return 0
    out = index.shape(node.output[0])
    weight = index.shape(node.input[1])
    if out is None or weight is None:
        return 0
    total = 1
    for size in out:
        total *= size
    if node.op_type == "Conv":
        inner = 1
        for size in weight[1:]:
            inner *= size
        return total * inner
    left = index.shape(node.input[0])
    return total * (left[-1] if left else 0)


def module(node: onnx.NodeProto) -> str:
    """The torch module a node came from, for messages."""
    return module_of(node) or node.name
