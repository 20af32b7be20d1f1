"""The Q/DQ writer: a plan's scales into a graph, in one of two encodings of one quantizer.

``signed``: int8 activations with zero-point 0, as TensorRT wants them. ``unsigned``: uint8 with
zero-point 128 and the same scales, which is the same quantizer shifted, and what ONNX Runtime's
x86 kernels are fast with. Weights are int8 on disk with a DequantizeLinear per channel.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from ..runtime.plan import PartPlan, WeightScale
from .canonical import module_of, place
from .graph import GraphIndex, attribute, copy_of, drop_unread, set_nodes


def quantize_weight(weight: npt.NDArray[Any], spec: WeightScale) -> npt.NDArray[np.int8]:
    """Integers of a constant, -127 to 127, rounded half to even."""
    shape = [1] * weight.ndim
    if spec.axis is not None:
        shape[spec.axis] = -1
    scales = np.array(spec.scales, np.float32).reshape(shape)
    rounded = np.rint(weight.astype(np.float32) / scales)
    return np.asarray(np.clip(rounded, -127, 127), np.int8)


def write_qdq(
    model: onnx.ModelProto,
    plan: PartPlan,
    *,
    unsigned: bool,
    stored: bool,
    unsigned_weights: bool = False,
) -> onnx.ModelProto:
    """A copy of a graph with the plan's Q/DQ pairs.

    unsigned: encoding of activations; stored: for ONNX Runtime, so that ``plan.stored`` tensors get
    their pair, and nodes that compute in float have their weights in int8 on disk all the same. For
    TensorRT those of depthwise convolutions get it: it would fuse what follows into such a node,
    and has no int8 kernel for that (NVIDIA/TensorRT 3385).
    """
    out = copy_of(model)
    graph = out.graph
    index = GraphIndex(out)
    left = set() if stored else {name for name in plan.stored if not _depthwise(index, name, plan)}
    tensors = {name: scale for name, scale in plan.activations.items() if name not in left}
    zero = np.uint8(128) if unsigned else np.int8(0)
    names = _Constants(graph)
    zero_name = names.add("zero_point", np.asarray(zero))
    renamed = {name: f"{name}/dequantized" for name in tensors}
    nodes: list[onnx.NodeProto] = []
    for name in (v.name for v in graph.input):
        if name in tensors:
            nodes += _pair(name, names.scale(tensors[name]), zero_name, "")
    if not stored:  # TensorRT takes int8 weights only beside int8 activations
        readers = {r.name: w for w in plan.weights for r in index.readers[w]}
        kept_weights = {readers[name] for name in plan.int8 if name in readers}
        plan = replace(plan, weights={w: s for w, s in plan.weights.items() if w in kept_weights})
    nodes += _weights(index, plan, names, renamed, unsigned_weights)
    factors = {name: renamed.pop(name) for name in plan.factors if name in renamed}
    done: set[str] = set()  # factors that a product before has quantized
    kind: type[np.generic] = np.uint8 if unsigned_weights else np.int8
    for node in graph.node:
        if stored and node.op_type == "Relu" and {*node.input, *node.output} <= renamed.keys():
            node.op_type = "LeakyRelu"  # which ONNX Runtime has for integers
            node.attribute.append(helper.make_attribute("alpha", 0.0))
        if _multiplies(node, renamed.keys(), factors.keys()):
            factor_zero = names.add("zero_point_factor", np.asarray(kind(128 * unsigned_weights)))
            steps = _product(node, tensors, names, (zero_name, factor_zero))
            nodes += steps[1:] if node.input[1] in done else steps
            done.add(node.input[1])
            continue
        for position, value in enumerate(node.input):
            if value in renamed:
                node.input[position] = renamed[value]
        nodes.append(node)
        for value in node.output:
            if value in renamed:
                scale = names.scale(tensors[value])
                nodes += _pair(value, scale, zero_name, module_of(node))
    set_nodes(graph, nodes)
    drop_unread(graph)
    return out


def _depthwise(index: GraphIndex, name: str, plan: PartPlan) -> bool:
    """Whether a grouped convolution in integers writes a tensor for more than rectifiers."""
    maker, readers = index.maker.get(name), index.readers[name]
    if maker is None or maker.op_type != "Conv" or maker.name not in plan.int8:
        return False
    bent = all(reader.op_type == "Relu" for reader in readers)
    return attribute(maker, "group", 1) != 1 and not bent and name not in plan.factors


def _weights(
    index: GraphIndex,
    plan: PartPlan,
    names: _Constants,
    renamed: dict[str, str],
    unsigned: bool,
) -> list[onnx.NodeProto]:
    """DequantizeLinear nodes of the quantized constants, which replace the float ones."""
    nodes = []
    for name, spec in plan.weights.items():
        integers: npt.NDArray[Any] = quantize_weight(index.constant(name), spec)
        steps = np.array(spec.scales, np.float32)
        if spec.axis is None:
            steps = steps.reshape(())
        zero: npt.NDArray[Any] = np.zeros(steps.shape, np.int8)
        if unsigned:
            integers, zero = (_shifted(v) for v in (integers, zero))
        stored = names.add(f"{name}/int8", integers)
        scales = names.add(f"{name}/scale", steps)
        zeros = names.add(f"zeros_{steps.size if steps.ndim else 'single'}", zero)
        reader = index.readers[name][0]
        node = helper.make_node(
            "DequantizeLinear",
            [stored, scales, zeros],
            [f"{name}/dequantized"],
            name=f"{name}/DequantizeLinear",
            axis=spec.axis,
        )
        place(node, module_of(reader))
        nodes.append(node)
        renamed[name] = f"{name}/dequantized"
    return nodes


def _shifted(integers: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """int8 as uint8 with zero-point 128: the same real values."""
    return (integers.astype(np.int16) + 128).astype(np.uint8)


def _pair(name: str, scale: str, zero: str, module: str) -> list[onnx.NodeProto]:
    quantize = helper.make_node(
        "QuantizeLinear", [name, scale, zero], [f"{name}/quantized"], name=f"{name}/QuantizeLinear"
    )
    dequantize = helper.make_node(
        "DequantizeLinear",
        [f"{name}/quantized", scale, zero],
        [f"{name}/dequantized"],
        name=f"{name}/DequantizeLinear",
    )
    for node in (quantize, dequantize):
        place(node, module)
    return [quantize, dequantize]


def _multiplies(node: onnx.NodeProto, maps: Set[str], factors: Set[str]) -> bool:
    return node.op_type == "MatMul" and node.input[0] in maps and node.input[1] in factors


def _product(
    node: onnx.NodeProto, tensors: dict[str, float], names: _Constants, zeros: tuple[str, str]
) -> list[onnx.NodeProto]:
    """A product of integers, back in float; the right factor is quantized for this reader alone.

    It has the type of weights, and no pair: ONNX Runtime would make int8 uint8, whose kernels are
    four times slower on processors with VNNI or AMX.
    """
    left, right = node.input
    out = node.output[0]
    scale = names.scale(tensors[right])
    both = names.scale(float(np.float32(tensors[left]) * np.float32(tensors[right])))
    integers = [f"{left}/quantized", f"{right}/quantized", *zeros]
    steps = [
        helper.make_node(
            "QuantizeLinear", [right, scale, zeros[1]], integers[1:2], f"{right}/QuantizeLinear"
        ),
        helper.make_node("MatMulInteger", integers, [f"{out}/int32"], f"{node.name}/integers"),
        helper.make_node("Cast", [f"{out}/int32"], [f"{out}/steps"], f"{node.name}/Cast", to=1),
        helper.make_node("Mul", [f"{out}/steps", both], [out], node.name),
    ]
    for made in steps:
        place(made, module_of(node))
    return steps


class _Constants:
    """Initializers by name, each once."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._names: set[str] = set()

    def add(self, name: str, value: npt.NDArray[np.generic]) -> str:
        if name not in self._names:
            self._names.add(name)
            self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def scale(self, value: float) -> str:
        """A 0-d float32 scale; equal values share one constant."""
        single = np.asarray(np.float32(value))
        return self.add(f"scale_{single.tobytes()[::-1].hex()}", single)
