"""Channels of one size before they are quantized, exact in float.

An int8 tensor has one step for all of its channels, so that small ones are lost beside large ones.
A channel of a map may be scaled if whoever writes it takes the factor into its weights and whoever
reads it the inverse: cross-layer equalization (Nagel et al., ICCV 2019), between activations and
weights as in SmoothQuant (Xiao et al., ICML 2023). ``streams`` finds maps that allow it, whole
residual streams included; ``equalize`` writes the factors into a graph. Where weights take all of
them the model takes no longer; a reader or writer without weights needs a product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from ..runtime.plan import ChannelScale
from .graph import GraphIndex, attribute, copy_of
from .rewrite import add, declare, node_of
from .words import recognise

Key = tuple[str, int]  # a tensor and the axis of its channels
Vector = npt.NDArray[np.float64]
Links = tuple[list[tuple[Key, Key]], list[Key], list[Key]]

_SAME = ("Relu", "LeakyRelu", "Resize", "AveragePool", "MaxPool")


@dataclass(frozen=True)
class Stream:
    """Tensors whose channels can only be scaled together.

    tensors: name to the axis of its channels.
    readers: those of them that something reads that cannot take the inverse; it gets a product.
    writers: those whose maker cannot take the factor; a product follows it.
    """

    tensors: dict[str, int]
    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()


def streams(index: GraphIndex) -> list[Stream]:
    """All of a graph, in its order, one axis per tensor."""
    groups = _Groups()
    absorbed: set[Key] = set()
    fixed = {*index.inputs, *index.outputs, *_inside_blocks(index)}
    written: set[Key] = set()
    pinned: set[Key] = set()
    for node in index.nodes:
        same, reads, writes = _links(index, node)
        for a, b in same:
            groups.join(a, b)
        through = {key for pair in same for key in pair}
        absorbed |= {*reads, *writes}
        pinned |= _all(index, _variables(index, node)) - through - {*reads}
        written |= _all(index, node.output) - through - {*writes}
    members: dict[Key, list[Key]] = defaultdict(list)
    for key in dict.fromkeys(k for n in index.nodes for k in _all_in_order(index, n.output)):
        members[groups.root(key)].append(key)
    forbidden = {groups.root(key) for key in _all(index, fixed)}
    found, taken = [], set[str]()
    for root, keys in members.items():
        tensors = dict(keys)
        if root in forbidden or not absorbed & {*keys} or taken & tensors.keys():
            continue
        if len(tensors) < len(keys):  # a transposed map is added to itself: both axes are one
            continue
        taken |= tensors.keys()
        readers = tuple(name for name, axis in keys if (name, axis) in pinned)
        writers = tuple(name for name, axis in keys if (name, axis) in written)
        found.append(Stream(tensors, readers, writers))
    return found


def _links(index: GraphIndex, node: onnx.NodeProto) -> Links:
    """What a node does to channels: keys that are scaled alike, and reads and writes whose factors
    its constants can take. Everything else about its tensors is fixed."""
    reads, out = _variables(index, node), node.output[0]
    shape = index.shape(out) or ()
    rank = len(shape)
    alike = len({index.shape(name) for name in (*reads, out)}) == 1
    if alike and (node.op_type == "Add" or (node.op_type == "Mul" and len(reads) == 1)):
        return [((n, a), (out, a)) for n in reads for _, a in _keys(index, out)], [], []
    if alike and node.op_type == "Mul" and len({*reads}) == 2:
        weighted = [n for n in reads if _weighted(index, n) and not _of_block(index, n)]
        keys = _keys(index, out) if weighted else []
        return [((weighted[0], axis), (out, axis)) for _, axis in keys], [], []
    if not reads or reads[0] != node.input[0]:
        return [], [], []
    if node.op_type == "Conv" and rank == 4 and _constant(index, node) and _simple(index, node):
        return [], [(reads[0], 1)], [(out, 1)]
    if node.op_type == "InstanceNormalization" and _constant(index, node):
        return [], [(reads[0], 1)], [(out, 1)]  # it takes any factor away
    if node.op_type == "LayerNormalization" and _constant(index, node) and _last(index, node):
        return [], [], [(out, rank - 1)]
    if node.op_type == "MatMul" and _constant(index, node) and _matrix(index, node):
        return [], [(reads[0], rank - 1)], [(out, rank - 1)]
    if node.op_type in _SAME and rank == 4 and (index.shape(reads[0]) or ())[1:2] == shape[1:2]:
        return [((reads[0], 1), (out, 1))], [], []
    order = attribute(node, "perm")
    if node.op_type == "Transpose" and rank > 2 and isinstance(order, list):
        return [((reads[0], axis), (out, order.index(axis))) for axis in (1, rank - 1)], [], []
    if node.op_type == "Reshape":
        return _through_reshape(index, reads[0], out), [], []
    return [], [], []


def _inside_blocks(index: GraphIndex) -> list[str]:
    """Tensors from a product with words to the norm behind it, where no product may come between:
    a block of attention has to be recognised when it becomes one node."""
    found = [f for f in (recognise(index, node) for node in index.nodes) if f is not None]
    nodes = [node for f in found for node in (f.product, *f.between, f.norm)]
    return [name for node in nodes for name in node.output]


def _weighted(index: GraphIndex, name: str) -> bool:
    """Whether a factor of a product comes from weights, which take its scale."""
    maker = index.maker.get(name)
    return maker is not None and bool(_links(index, maker)[2])


def _of_block(index: GraphIndex, name: str) -> bool:
    return recognise(index, index.maker[name]) is not None


def _through_reshape(index: GraphIndex, name: str, out: str) -> list[tuple[Key, Key]]:
    before, after = index.shape(name) or (), index.shape(out) or ()
    same = []
    if len(before) > 2 and len(after) > 2 and before[:2] == after[:2]:
        same.append(((name, 1), (out, 1)))
    if before and after and before[-1] == after[-1] and len(before) != len(after):
        same.append(((name, len(before) - 1), (out, len(after) - 1)))
    return same


def _constant(index: GraphIndex, node: onnx.NodeProto) -> bool:
    return all(name in index.tensors for name in node.input[1:])


def _simple(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether a convolution is dense, or has one kernel for each channel."""
    out, inner = index.tensors[node.input[1]].dims[:2]
    group = attribute(node, "group", 1)
    return group == 1 or (inner == 1 and group == out)


def _matrix(index: GraphIndex, node: onnx.NodeProto) -> bool:
    return len(index.tensors[node.input[1]].dims) == 2


def _last(index: GraphIndex, node: onnx.NodeProto) -> bool:
    return attribute(node, "axis", -1) in (-1, len(index.shape(node.output[0]) or ()) - 1)


def _variables(index: GraphIndex, node: onnx.NodeProto) -> list[str]:
    return [name for name in node.input if name and name not in index.tensors]


def _keys(index: GraphIndex, name: str) -> list[Key]:
    rank = len(index.shape(name) or ())
    return [(name, axis) for axis in dict.fromkeys((1, rank - 1))] if rank > 2 else []


def _all(index: GraphIndex, names: Iterable[str]) -> set[Key]:
    return set(_all_in_order(index, names))


def _all_in_order(index: GraphIndex, names: Iterable[str]) -> list[Key]:
    return [key for name in names for key in _keys(index, name)]


class _Groups:
    """Sets of keys that are joined as links are found."""

    def __init__(self) -> None:
        self._above: dict[Key, Key] = {}

    def root(self, key: Key) -> Key:
        while key in self._above:
            key = self._above[key]
        return key

    def join(self, a: Key, b: Key) -> None:
        a, b = self.root(a), self.root(b)
        if a != b:
            self._above[a] = b


def equalize(model: onnx.ModelProto, scales: Iterable[ChannelScale]) -> onnx.ModelProto:
    """A copy in which the channels of the named tensors are ``factors`` times as large.

    Results stay what they were, up to float32's rounding and the epsilon of instance norms.
    """
    out = copy_of(model)
    index = GraphIndex(out)
    factors: dict[str, tuple[int, Vector]] = {}
    for scale in scales:
        values = np.array(scale.factors, np.float64)
        factors |= {name: (axis, values) for name, axis in scale.tensors.items()}
    for node in index.nodes:
        _scale_constants(index, node, factors)
    for name in (n for s in scales for n in s.readers):
        _restore(index, name, *factors[name])
    for name in (n for s in scales for n in s.writers):
        _follow(index, name, *factors[name])
    return out


def _scale_constants(
    index: GraphIndex,
    node: onnx.NodeProto,
    factors: dict[str, tuple[int, Vector]],
) -> None:
    same, takes, gives = _links(index, node)
    reads = [factors[n][1] for n, _ in takes if n in factors]
    axis, writes = factors.get(node.output[0], (0, None)) if same or gives else (0, None)
    if not reads and writes is None:
        return
    if node.op_type == "Conv" and takes:
        weight = index.doubles(node.input[1])
        if reads:
            grouped = attribute(node, "group", 1) != 1
            weight = weight / reads[0].reshape((-1, 1, 1, 1) if grouped else (1, -1, 1, 1))
        if writes is not None:
            weight = weight * writes.reshape(-1, 1, 1, 1)
        _put(index, node, 1, weight)
    elif node.op_type == "MatMul" and takes:
        weight = index.doubles(node.input[1])
        weight = weight / reads[0][:, None] if reads else weight
        _put(index, node, 1, weight if writes is None else weight * writes)
    if writes is None:
        return
    rank = len(index.shape(node.output[0]) or ())
    if node.op_type in ("Conv", "InstanceNormalization", "LayerNormalization"):
        for position in range(1 + (node.op_type == "Conv"), len(node.input)):
            _put(index, node, position, index.doubles(node.input[position]) * writes)
    elif node.op_type == "Add":
        along = writes.reshape([-1 if i == axis else 1 for i in range(rank)])
        for position, name in enumerate(node.input):
            if name in index.tensors:
                _put(index, node, position, index.doubles(name) * along)


def _put(
    index: GraphIndex, node: onnx.NodeProto, position: int, value: npt.NDArray[np.floating]
) -> None:
    """A new value for a node's constant, which others may go on reading as it was."""
    name = node.input[position]
    tensor = numpy_helper.from_array(np.asarray(value, np.float32), name)
    if len(index.readers[name]) == 1:
        index.tensors[name].CopyFrom(tensor)
        return
    tensor.name = node.input[position] = f"{name}/{node.name}"
    index.model.graph.initializer.append(tensor)
    index.tensors[tensor.name] = index.model.graph.initializer[-1]
    index.readers[tensor.name] = [node]


def _restore(index: GraphIndex, name: str, axis: int, values: Vector) -> None:
    """A product with the inverse for every reader that cannot take it."""
    plain = f"{name}/plain"
    for node in index.readers[name]:
        same, reads, _ = _links(index, node)
        if (name, axis) in reads or any((name, axis) in pair for pair in same):
            continue
        for position in (i for i, value in enumerate(node.input) if value == name):
            node.input[position] = plain
    _product(index, name, plain, (axis, 1.0 / values), index.maker[name])


def _follow(index: GraphIndex, name: str, axis: int, values: Vector) -> None:
    """A product with the factors behind a maker that cannot take them."""
    maker, plain = index.maker[name], f"{name}/made"
    maker.output[list(maker.output).index(name)] = plain
    _product(index, plain, name, (axis, values), maker)


def _product(
    index: GraphIndex, source: str, result: str, by: tuple[int, Vector], maker: onnx.NodeProto
) -> None:
    graph, (axis, values) = index.model.graph, by
    known = source if index.shape(source) is not None else result
    shape = [-1 if i == axis else 1 for i in range(len(index.shape(known) or ()))]
    factor = add(index, f"{result}/factor", np.asarray(values.reshape(shape), np.float32))
    product = node_of(maker, "Mul", [source, factor], [result], f"{result}/Mul")
    declare(index, source if known == result else result, known)
    at = next(i for i, n in enumerate(graph.node) if n.output == maker.output)
    graph.node.insert(at + 1, product)
