"""Half precision: a strongly typed float16 graph, or float16 weights under a float32 graph."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..plugins.onnx_function import DOMAIN
from .canonical import module_of, place
from .graph import GraphIndex, set_nodes

_LARGEST = 65504.0
# operators whose float inputs are not data: sizes and regions of interest stay float32
_FLOAT_SETTINGS = {"Resize": (1, 2)}
# outputs that are float32 whatever the operator computes in
_FLOAT_OUTPUTS = {"NormAttention_float32": (1,), "MutualAttention_float32": (1,)}


def store_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights as float16 with a Cast behind each; the arithmetic stays in float32.

    Half the file; a runtime folds the casts when it loads. Changes the model in place.
    """
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        value = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or value.ndim < 2:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half(value), f"{name}/half"))
        casts.append(
            helper.make_node("Cast", [tensor.name], [name], f"{name}/Cast", to=TensorProto.FLOAT)
        )
    set_nodes(graph, [*casts, *graph.node])
    return model


def to_half(model: onnx.ModelProto, high: Iterable[str]) -> onnx.ModelProto:
    """A strongly typed float16 graph whose ``high`` nodes compute in float32; in place.

    Inputs and outputs of the part keep their float32. A Cast stands wherever a value passes from
    one precision to the other, once per tensor and direction. Quantization pairs are float16, as
    TensorRT wants the type around them, except next to high nodes.
    """
    return _Typer(model, set(high)).run()


def half(value: npt.NDArray[np.generic]) -> npt.NDArray[np.float16]:
    """float16 with finite ends: what is too large becomes the largest."""
    return np.clip(value.astype(np.float64), -_LARGEST, _LARGEST).astype(np.float16)


class _Typer:
    def __init__(self, model: onnx.ModelProto, high: set[str]) -> None:
        self._model = model
        self._index = GraphIndex(model)
        self._high = high
        self._kind: dict[str, int] = {}
        self._made: dict[tuple[str, int], str] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, TensorProto] = {}

    def run(self) -> onnx.ModelProto:
        graph = self._model.graph
        for value in graph.input:
            self._kind[value.name] = value.type.tensor_type.elem_type
        for node in self._index.nodes:
            self._type(node)
        for value in graph.output:
            self._restore(value.name)
        used = {i for n in self._nodes for i in n.input}
        kept = [t for t in graph.initializer if t.name in used]
        kept += [t for t in self._constants.values() if t.name in used]
        tensors = [TensorProto.FromString(t.SerializeToString()) for t in kept]
        set_nodes(graph, self._nodes)
        del graph.initializer[:], graph.value_info[:]
        graph.initializer.extend(tensors)
        return self._model

    def _type(self, node: onnx.NodeProto) -> None:
        """Give the node inputs of its precision, and note the precision of its outputs."""
        wanted = TensorProto.FLOAT if self._stays_high(node) else TensorProto.FLOAT16
        settings = _FLOAT_SETTINGS.get(node.op_type, ())
        for position, name in enumerate(node.input):
            if name and position not in settings and self._floating(name):
                node.input[position] = self._as(name, wanted, module_of(node))
        if node.op_type == "Cast":
            (to,) = [a for a in node.attribute if a.name == "to"]
            if to.i == TensorProto.FLOAT:
                to.i = wanted
            self._kind[node.output[0]] = to.i
        else:
            fixed = _FLOAT_OUTPUTS.get(node.op_type, ())
            for position, name in enumerate(node.output):
                made = TensorProto.FLOAT if position in fixed else wanted
                self._kind[name] = made if self._index.is_float(name) else TensorProto.UNDEFINED
            if node.domain == DOMAIN and wanted == TensorProto.FLOAT16:
                node.op_type = node.op_type.replace("float32", "float16")
            if node.op_type == "DequantizeLinear":
                self._kind[node.output[0]] = wanted
        self._nodes.append(node)

    def _stays_high(self, node: onnx.NodeProto) -> bool:
        """High nodes, and the pairs and casts that only serve high nodes."""
        if node.name in self._high:
            return True
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast"):
            readers = [r for o in node.output for r in self._index.readers[o]]
            return bool(readers) and all(self._stays_high(r) for r in readers)
        return False

    def _floating(self, name: str) -> bool:
        if name in self._index.tensors:
            return self._index.is_float(name)
        return self._kind.get(name) in (TensorProto.FLOAT, TensorProto.FLOAT16)

    def _as(self, name: str, wanted: int, module: str) -> str:
        """The tensor in the wanted precision, through a shared Cast if need be."""
        if name in self._index.tensors:
            return self._constant(name, wanted)
        if self._kind[name] == wanted:
            return name
        if (name, wanted) not in self._made:
            suffix = "half" if wanted == TensorProto.FLOAT16 else "single"
            made = f"{name}/{suffix}"
            cast = helper.make_node("Cast", [name], [made], f"{made}/Cast", to=wanted)
            place(cast, module)
            self._nodes.append(cast)
            self._kind[made] = wanted
            self._made[name, wanted] = made
        return self._made[name, wanted]

    def _constant(self, name: str, wanted: int) -> str:
        if wanted == TensorProto.FLOAT:
            return name
        made = f"{name}/half"
        if made not in self._constants:
            value = half(self._index.constant(name))
            self._constants[made] = numpy_helper.from_array(value, made)
        return made

    def _restore(self, name: str) -> None:
        """A float32 output that a float16 node makes gets a Cast under its own name."""
        if self._kind[name] != TensorProto.FLOAT16:
            return
        inner = f"{name}/half"
        for node in self._nodes:
            for field in (node.input, node.output):
                for position, value in enumerate(field):
                    if value == name:
                        field[position] = inner
        self._nodes.append(
            helper.make_node("Cast", [inner], [name], f"{name}/Cast", to=TensorProto.FLOAT)
        )
