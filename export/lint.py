"""What a canonical graph must not hold, each rule with the module at fault.

The rules are what TensorRT, ONNX Runtime and a later quantizer rely on; ``../docs/bundle.md`` lists
them for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from ..errors import ExportError
from .canonical import IR_VERSION, OPSET, module_of

CONTROL_FLOW = {"If", "Loop", "Scan"}
DATA_DEPENDENT = {"NonZero", "Unique", "Compress", "NonMaxSuppression"}
SHAPE_ARITHMETIC = {"Shape", "Size", "ConstantOfShape", "Range"}
DECOMPOSED = {"Erf": "Gelu", "Pow": "LayerNormalization or Gelu"}
INPUT_DTYPES = {TensorProto.UINT8, TensorProto.INT32, TensorProto.BOOL, TensorProto.FLOAT}


@dataclass(frozen=True)
class Finding:
    """One broken rule: its name, the node, the torch module it came from, what is wrong."""

    rule: str
    node: str
    module: str
    message: str

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.rule}: {self.message} ({self.node}{where})"


def lint(model: onnx.ModelProto) -> list[Finding]:
    """Every rule the graph breaks; empty for a canonical graph."""
    findings = _header(model)
    for value in (*model.graph.input, *model.graph.output):
        findings += _border(value)
    findings += _bytes(model)
    for node in model.graph.node:
        findings += _node(node)
    return findings


def require_clean(model: onnx.ModelProto) -> None:
    """Raise ExportError with the first findings, or run onnx's own full check."""
    fix = "rewrite the named modules; docs/bundle.md explains each rule"
    refuse(lint(model), "export-lint", f"the part {model.graph.name!r} breaks rules", fix)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            "export-lint",
            f"the part {model.graph.name!r} is not valid ONNX",
            why=str(error).splitlines()[0],
            fix="report this: the exporter wrote it",
        ) from error


def refuse(findings: Sequence[Finding], code: str, what: str, fix: str) -> None:
    """Raise ExportError with the first of the findings, if there are any."""
    if findings:
        why = "; ".join(map(str, findings[:5]))
        raise ExportError(code, f"{what} ({len(findings)} findings)", why=why, fix=fix)


def _header(model: onnx.ModelProto) -> list[Finding]:
    findings = []
    versions = {o.domain: o.version for o in model.opset_import}
    if versions != {"": OPSET}:
        findings.append(Finding("opset", "-", "", f"opsets {versions}, not only {OPSET}"))
    if model.ir_version != IR_VERSION:
        findings.append(Finding("ir-version", "-", "", f"ir_version {model.ir_version}"))
    return findings


def _border(value: onnx.ValueInfoProto) -> list[Finding]:
    kind = value.type.tensor_type
    findings = []
    if kind.elem_type not in INPUT_DTYPES:
        findings.append(
            Finding("border-dtype", value.name, "", TensorProto.DataType.Name(kind.elem_type))
        )
    for axis, dim in enumerate(kind.shape.dim):
        if axis == 0 and dim.dim_param not in ("batch", "images"):
            findings.append(Finding("batch", value.name, "", "the batch is not dynamic"))
        if axis > 0 and dim.dim_value <= 0:
            findings.append(Finding("static", value.name, "", f"axis {axis} is not fixed"))
    return findings


def _bytes(model: onnx.ModelProto) -> list[Finding]:
    """uint8 may enter, and only a Cast may read it."""
    pixels = {
        v.name for v in model.graph.input if v.type.tensor_type.elem_type == TensorProto.UINT8
    }
    return [
        Finding("uint8", node.name, module_of(node), f"{node.op_type} reads uint8")
        for node in model.graph.node
        for value in node.input
        if value in pixels and node.op_type != "Cast"
    ]


def _node(node: onnx.NodeProto) -> list[Finding]:
    here = (node.name, module_of(node))
    if node.op_type in CONTROL_FLOW:
        return [Finding("control-flow", *here, f"{node.op_type} is not allowed")]
    if node.op_type in DATA_DEPENDENT:
        return [Finding("dynamic-shape", *here, f"the shape of {node.op_type} depends on data")]
    if node.op_type in SHAPE_ARITHMETIC:
        return [Finding("shape", *here, f"{node.op_type}: shapes are to be constants")]
    if node.op_type in DECOMPOSED:
        return [
            Finding(
                "decomposed", *here, f"{node.op_type} where {DECOMPOSED[node.op_type]} was meant"
            )
        ]
    return []
