"""What each family of runtimes accepts, and what a Q/DQ graph must look like.

Operators and types are those of the parsers' own tables (``operators.py``). Every finding names the
torch module at fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from ..plugins.onnx_function import DOMAIN
from ..plugins.quick import PASSES
from .canonical import module_of
from .dialects import WITH_PLUGIN
from .graph import GraphIndex, attribute
from .lint import CONTROL_FLOW, DATA_DEPENDENT, Finding, refuse
from .operators import TYPES

_TOPK_LIMIT = 3840  # TensorRT takes no larger K


@dataclass(frozen=True)
class Target:
    """Rules of a dialect.

    operators:   what may occur, and of which types; None for no list.
    zero_points: dtypes that activations' zero-points may have, with the only value allowed.
    uint8_nodes: operators that may read or write uint8 besides the pairs; None for any.
    """

    opset: int
    ir_version: int
    operators: Mapping[str, frozenset[int]] | None
    zero_point: tuple[int, int]
    uint8_nodes: tuple[str, ...] | None


_FUSED = {
    f"{operator}_{name}": frozenset({kind})
    for operator in ("CrossAttention", "NormAttention", "MutualAttention")
    for name, kind in (("float32", TensorProto.FLOAT), ("float16", TensorProto.FLOAT16))
}
_PASSES = {name: frozenset({TensorProto.FLOAT, TensorProto.FLOAT16}) for name in PASSES}
_UNSIGNED = (TensorProto.UINT8, 128)
_SIGNED = (TensorProto.INT8, 0)
TARGETS = {
    "ort": Target(20, 10, None, _UNSIGNED, None),
    "ort-u8u8": Target(20, 10, None, _UNSIGNED, None),
    "trt10": Target(20, 10, TYPES["trt10"], _SIGNED, ("Cast",)),
    "trt8": Target(17, 8, TYPES["trt8"], _SIGNED, ("Cast",)),
    "trt10-plugin": Target(20, 10, TYPES["trt10"] | _FUSED, _SIGNED, ("Cast",)),
    "trt10-quick": Target(20, 10, TYPES["trt10"] | _PASSES, _SIGNED, ("Cast",)),
    "trt8-plugin": Target(17, 8, TYPES["trt8"] | _FUSED, _SIGNED, ("Cast",)),
}


def require_target(model: onnx.ModelProto, dialect: str) -> None:
    """Raise ExportError with the first findings."""
    findings = [*lint_target(model, dialect), *lint_qdq(model, dialect)]
    what = f"the part {model.graph.name!r} is not fit for {dialect}"
    refuse(findings, "export-target", what, "leave out this dialect, or rewrite the named modules")


def lint_target(model: onnx.ModelProto, dialect: str) -> list[Finding]:
    """Opset, operators, types and limits of a dialect."""
    target = TARGETS[dialect]
    findings = []
    versions = {o.domain: o.version for o in model.opset_import}
    if dialect in WITH_PLUGIN:
        versions.pop(DOMAIN, None)
    if versions != {"": target.opset} or model.ir_version != target.ir_version:
        found = f"opsets {versions}, ir_version {model.ir_version}"
        findings.append(Finding("opset", "-", "", f"{found} for {dialect}"))
    index = GraphIndex(model)
    for node in index.nodes:
        here = (node.name, module_of(node))
        if node.op_type in CONTROL_FLOW | DATA_DEPENDENT:
            findings.append(Finding("dynamic-shape", *here, node.op_type))
        if target.operators is not None and node.op_type not in target.operators:
            findings.append(Finding("operator", *here, f"{dialect} has no {node.op_type}"))
        if target.operators is not None and node.op_type == "TopK":
            findings += _topk(index, node)
    if target.uint8_nodes is not None:
        findings += _uint8(index, target.uint8_nodes)
    if target.operators is not None:
        findings += _types(model, target.operators)
    return findings


def lint_qdq(model: onnx.ModelProto, dialect: str) -> list[Finding]:
    """The shape of every quantization pair; see the rules in ``docs/quantization.md``."""
    index = GraphIndex(model)
    findings = []
    for node in index.nodes:
        if node.op_type == "QuantizeLinear":
            findings += _activation(index, node, dialect)
        elif node.op_type == "DequantizeLinear":
            findings += _dequantized(index, node, dialect)
        elif node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
            maker = index.maker.get(node.input[2])
            if maker is not None and maker.op_type == "DequantizeLinear":
                findings.append(_finding("qdq-bias", node, "a bias is quantized"))
    return findings


def _activation(index: GraphIndex, node: onnx.NodeProto, dialect: str) -> list[Finding]:
    zero_point = TARGETS[dialect].zero_point
    findings = []
    scale, zero = (index.constant(n) for n in node.input[1:3])
    if scale.ndim != 0 or not np.isfinite(scale) or float(scale) <= 0:
        findings.append(
            _finding("qdq-scale", node, f"the scale is {scale!r}, not one positive number")
        )
    kind = index.tensors[node.input[2]].data_type
    readers = index.readers[node.output[0]]
    integers = "MatMulInteger" if dialect.startswith("ort") else ""
    products = [r for r in readers if r.op_type == integers]
    if dialect == "ort" and any(r.input[1] == node.output[0] for r in products):
        zero_point = _SIGNED  # a right factor has the type of weights
    if (kind, int(zero)) != zero_point:
        wanted = f"{TensorProto.DataType.Name(zero_point[0])} {zero_point[1]}"
        findings.append(_finding("qdq-zero-point", node, f"the zero-point is not {wanted}"))
    pairs = [r for r in readers if r not in products]
    if not readers or any(r.op_type != "DequantizeLinear" for r in pairs):
        findings.append(
            _finding("qdq-pair", node, "something else than a DequantizeLinear reads it")
        )
    others = [r for r in pairs if list(r.input[1:]) != list(node.input[1:])]
    return findings + [_finding("qdq-pair", r, "its scale is not that of its pair") for r in others]


def _dequantized(index: GraphIndex, node: onnx.NodeProto, dialect: str) -> list[Finding]:
    maker = index.maker.get(node.input[0])
    if maker is not None:
        wrong = maker.op_type != "QuantizeLinear"
        return [_finding("qdq-pair", node, f"{maker.op_type} feeds it")] if wrong else []
    if node.input[0] not in index.tensors:
        return [_finding("qdq-pair", node, "neither a pair nor a constant feeds it")]
    findings = []
    weight, scales = (index.constant(n) for n in node.input[:2])
    axis = attribute(node, "axis", 1)
    if scales.ndim and weight.shape[int(str(axis))] != scales.size:
        findings.append(_finding("qdq-channel", node, "there is not one scale per channel"))
    if not (np.isfinite(scales).all() and (scales.astype(np.float64) > 0).all()):
        findings.append(_finding("qdq-scale", node, "a weight's scale is not positive"))
    unsigned = dialect == "ort-u8u8"
    zero = index.constant(node.input[2])
    if (zero != (128 if unsigned else 0)).any() or (weight.dtype == np.uint8) != unsigned:
        findings.append(_finding("qdq-zero-point", node, "weights are not symmetric int8"))
    return findings


def _topk(index: GraphIndex, node: onnx.NodeProto) -> Iterable[Finding]:
    if node.input[1] not in index.tensors or int(index.constant(node.input[1]).max()) > _TOPK_LIMIT:
        yield _finding("topk", node, f"K must be a constant of at most {_TOPK_LIMIT}")


def _types(model: onnx.ModelProto, operators: Mapping[str, frozenset[int]]) -> Iterable[Finding]:
    """Nodes whose data is of a type that the parser does not take there.

    Behind a fused node types are not known to onnx; there nothing is said.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {t.name: t.data_type for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    for node in graph.node:
        data = node.input[1 if node.op_type == "Where" else 0]
        kind = types.get(data, TensorProto.UNDEFINED)
        if kind == TensorProto.UNDEFINED and any(n.domain == DOMAIN for n in graph.node):
            continue
        if node.op_type in operators and kind not in operators[node.op_type]:
            name = TensorProto.DataType.Name(kind)
            yield _finding("operator-type", node, f"{node.op_type} takes no {name}")


def _uint8(index: GraphIndex, allowed: tuple[str, ...]) -> Iterable[Finding]:
    graph = index.model.graph
    bytes_in = {v.name for v in graph.input if v.type.tensor_type.elem_type == TensorProto.UINT8}
    bytes_in |= {n for n, t in index.tensors.items() if t.data_type == TensorProto.UINT8}
    for name in bytes_in:
        for node in index.readers[name]:
            if node.op_type not in allowed:
                yield _finding("uint8", node, f"{node.op_type} reads uint8")


def _finding(rule: str, node: onnx.NodeProto, message: str) -> Finding:
    return Finding(rule, node.name, module_of(node), message)
