"""A graph with its arrows: who makes a tensor, who reads it, what is constant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper


class GraphIndex:
    """Lookups over a model's graph; build it anew after the graph has changed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.tensors = {t.name: t for t in model.graph.initializer}
        self.maker: dict[str, onnx.NodeProto] = {o: n for n in self.nodes for o in n.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                if name:
                    self.readers[name].append(node)
        self.inputs = {v.name for v in model.graph.input}
        self.outputs = {v.name for v in model.graph.output}
        values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
        self._types = {v.name: v.type.tensor_type for v in values}

    def constant(self, name: str) -> npt.NDArray[np.generic]:
        """The value of an initializer."""
        return np.asarray(numpy_helper.to_array(self.tensors[name]))

    def doubles(self, name: str) -> npt.NDArray[np.float64]:
        """The same in float64."""
        return self.constant(name).astype(np.float64)

    def is_float(self, name: str) -> bool:
        """Whether a tensor is float32, as far as shape inference knows."""
        if name in self.tensors:
            return bool(self.tensors[name].data_type == onnx.TensorProto.FLOAT)
        kind = self._types.get(name)
        return kind is not None and bool(kind.elem_type == onnx.TensorProto.FLOAT)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor with the batch as 1, or None where it is not known."""
        if name in self.tensors:
            return tuple(self.tensors[name].dims)
        kind = self._types.get(name)
        if kind is None:
            return None
        return tuple(d.dim_value if d.HasField("dim_value") else 1 for d in kind.shape.dim)

    def weight_of(self, node: onnx.NodeProto) -> str | None:
        """The constant matrix or kernel of a Conv, MatMul or Gemm, if it has one."""
        if node.op_type in ("Conv", "Gemm"):
            return node.input[1] if node.input[1] in self.tensors else None
        if node.op_type == "MatMul":
            constants = [i for i in node.input if i in self.tensors]
            return constants[0] if len(constants) == 1 else None
        return None


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, sharing no memory."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    return out


def set_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Let a graph have these nodes, of which some may be its own, and no others."""
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Remove the constants that no node reads."""
    used = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    """An attribute's value, or the default."""
    for a in node.attribute:
        if a.name == name:
            return onnx.helper.get_attribute_value(a)
    return default
