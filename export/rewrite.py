"""Rules that rewrite a graph: how they are applied, and the steps that they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from .graph import GraphIndex, attribute, drop_unread

Rule = Callable[[GraphIndex, onnx.NodeProto], bool]


def rewrite(model: onnx.ModelProto, rules: Sequence[Rule]) -> onnx.ModelProto:
    """Apply all rules until none fits any more, in place; what nobody reads then goes."""
    while any(_apply(rule, model) for rule in rules):
        pass
    graph = model.graph
    drop_unread(graph)
    made = {name for node in graph.node for name in node.output}
    for value in [v for v in graph.value_info if v.name not in made]:
        graph.value_info.remove(value)
    return model


def _apply(rule: Rule, model: onnx.ModelProto) -> bool:
    index = GraphIndex(model)
    return any(rule(index, node) for node in index.nodes)


def own_weights(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether all inputs but the first are constants that nobody else reads."""
    return all(n in index.tensors and len(index.readers[n]) == 1 for n in node.input[1:])


def pointwise(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """A dense 1x1 convolution of stride 1 without padding whose weights nobody else reads."""
    return node.op_type == "Conv" and own_weights(index, node) and dense(index, node)


def dense(index: GraphIndex, conv: onnx.NodeProto) -> bool:
    """Whether a convolution is dense, 1x1, of constant weights, stride 1 and no padding."""
    dims = list(index.tensors[conv.input[1]].dims) if conv.input[1] in index.tensors else []
    plain = attribute(conv, "pads", [0, 0, 0, 0]) == [0, 0, 0, 0]
    single = attribute(conv, "strides", [1, 1]) == [1, 1] and attribute(conv, "group", 1) == 1
    return dims[2:] == [1, 1] and plain and single


def only(index: GraphIndex, name: str) -> bool:
    """Whether one node reads the tensor, and it is no output of the graph."""
    return len(index.readers[name]) == 1 and name not in index.outputs


def maker_of(index: GraphIndex, name: str, kind: str) -> onnx.NodeProto | None:
    """What makes a tensor for one reader alone, if it is of a kind."""
    node = index.maker.get(name)
    return node if node is not None and node.op_type == kind and only(index, name) else None


def reader_of(index: GraphIndex, name: str, kind: str) -> onnx.NodeProto | None:
    """The only reader of a tensor, if it is of a kind."""
    node = index.readers[name][0] if only(index, name) else None
    return node if node is not None and node.op_type == kind else None


def add(index: GraphIndex, name: str, value: npt.NDArray[np.generic]) -> str:
    """A new initializer."""
    index.model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name


def declare(index: GraphIndex, name: str, like: str, dims: Iterable[int] | None = None) -> None:
    """A new tensor has the type and batch of another; dims: its other axes, if they differ."""
    graph = index.model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    value = next((v for v in values if v.name == like), None)
    if value is None:
        return
    copy = index.model.graph.value_info.add()
    copy.CopyFrom(value)
    copy.name = name
    if dims is not None:
        shape = copy.type.tensor_type.shape
        del shape.dim[1:]
        for size in dims:
            shape.dim.add().dim_value = size


def node_of(
    source: onnx.NodeProto,
    kind: str,
    inputs: Iterable[str],
    outputs: Iterable[str],
    name: str,
    **attributes: Any,
) -> onnx.NodeProto:
    """A node of the same torch module as another."""
    made = helper.make_node(kind, list(inputs), list(outputs), name, **attributes)
    made.metadata_props.extend(source.metadata_props)
    return made


def replace(index: GraphIndex, node: onnx.NodeProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put nodes where one was."""
    field = index.model.graph.node
    position = next(i for i, n in enumerate(field) if n.name == node.name and n == node)
    rest = [onnx.NodeProto.FromString(n.SerializeToString()) for n in field[position + 1 :]]
    del field[position:]
    field.extend([*nodes, *rest])
