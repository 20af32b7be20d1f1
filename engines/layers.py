"""What a built engine runs in: the engine inspector's JSON, read and held against the plan.

TensorRT fuses and chooses; what it chose is known only afterwards. The inspector lists an engine's
layers with their tensors' types. Its words changed: 8.6 and 10 have ``Format/Datatype`` in one
string and ``Bindings``, 11 has ``Datatype`` beside ``Format`` and ``I/O Tensors``; without an
execution context, types of dynamic shapes read "N/A", and only weights and kernel names are left.

Convolutions and matrix products are judged; fused regions ("Myelin") do not say what is in them and
are listed as opaque. An engine fails on positive evidence only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..errors import EngineError

SHORT = 0.05  # share of the visible multiply-accumulates that may miss the plan's precision
_TYPES = (
    ("int8", re.compile(r"int8", re.I)),
    ("bf16", re.compile(r"bfloat16|bf16", re.I)),
    ("fp16", re.compile(r"half|fp16|float16", re.I)),
    ("fp32", re.compile(r"float|fp32", re.I)),
)
_KERNELS = (
    ("int8", re.compile(r"i8i8|i8f32|i8f16|imma|igmma|_int8", re.I)),
    ("fp16", re.compile(r"f16f16|h16816|h884|h1688|hmma|hgmma_fp16|_fp16", re.I)),
    ("fp32", re.compile(r"f32f32|tf32|sgemm|scudnn|_fp32", re.I)),
)
_NUMBERED = re.compile(r"(_myl\d+)?_\d+$")  # a further layer of the same node
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_OPAQUE = ("myelin", "kgen", "fusion", "foreignnode")
_GEMM = ("gemm", "matrixmultiply", "fullyconnected", "matmul")
_HEIGHT = {"int8": 0, "fp16": 1, "bf16": 1, "fp32": 2}


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    kind:      ``conv``, ``gemm``, ``plugin``, ``opaque`` or ``other``.
    precision: ``int8``, ``fp16``, ``bf16``, ``fp32``, or '' where nothing tells.
    nodes:     ONNX nodes that it came from, as far as it says.
    macs:      multiply-accumulates of a conv or gemm; 0 where the shapes are not known.
    """

    name: str
    kind: str
    precision: str
    nodes: tuple[str, ...]
    macs: int


@dataclass(frozen=True)
class Wanted:
    """What the plan wants of a part.

    int8, high: names of nodes in integers, and of nodes that stay in float32; rest: of the others.
    typed:      TensorRT takes the types from the graph and has no choice.
    """

    int8: frozenset[str] = frozenset()
    high: frozenset[str] = frozenset()
    rest: str = "fp32"
    typed: bool = True

    def of(self, nodes: Iterable[str]) -> str:
        """The lowest precision that the plan wants of any of these nodes; '' for unknown ones."""
        named = {n for node in nodes for n in (node, _NUMBERED.sub("", node))}
        if named & self.int8:
            return "int8"
        return self.rest if named and not named & self.high else ""


@dataclass(frozen=True)
class Inspection:
    """Layers counted, and what is wrong with them; see ``docs/engines.md``."""

    layers: int = 0
    precision: dict[str, int] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()


def read_layers(raw: str) -> list[Layer]:
    """Layers from the inspector's JSON; raises EngineError ``engine-inspector``."""
    try:
        found = msgspec.json.decode(raw)["Layers"]
        return [_layer(entry if isinstance(entry, dict) else {"Name": entry}) for entry in found]
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise EngineError(
            "engine-inspector",
            "what TensorRT's engine inspector says cannot be read",
            why=f"{type(error).__name__}: {error}",
            fix="report it with TensorRT's version; build with --no-inspect until then",
        ) from error


def inspect_layers(layers: list[Layer], wanted: Wanted) -> Inspection:
    """Count, and find what the plan wanted lower."""
    work = [x for x in layers if x.kind in ("conv", "gemm")]
    high = [(x, w) for x in work if (w := wanted.of(x.nodes)) and _higher(x.precision, w)]
    total, missed = sum(x.macs for x in work), sum(x.macs for x, _ in high)
    findings = []
    if total and missed / total > SHORT:
        share = f"{100 * missed / total:.1f} % of the visible multiply-accumulates"
        findings.append(f"{share} run in a higher precision than the plan's")
    if findings or wanted.typed:  # where TensorRT chooses, a small layer in fp32 is its right
        findings += [
            f"{x.name} runs in {x.precision}, the plan says {w}"
            for x, w in high
            if x.precision == "fp32"
        ]
    macs: Counter[str] = Counter()
    for x in work:
        macs[x.precision or "unknown"] += x.macs
    return Inspection(
        layers=len(layers),
        precision=dict(Counter(x.precision or "unknown" for x in work)),
        macs=dict(macs),
        plugins=tuple(x.name for x in layers if x.kind == "plugin"),
        opaque=tuple(x.name for x in layers if x.kind == "opaque"),
        findings=tuple(findings),
    )


def require_plan(inspection: Inspection, part: str, plan: str) -> None:
    """Raise EngineError ``engine-precision`` with the first findings."""
    if inspection.findings:
        raise EngineError(
            "engine-precision",
            f"the engine of the part {part!r} is not what the plan {plan!r} says",
            why="; ".join(inspection.findings[:4]),
            fix="build again with --no-inspect to keep it anyway, and report the layers",
        )


def _higher(precision: str, wanted: str) -> bool:
    return precision in _HEIGHT and _HEIGHT[precision] > _HEIGHT[wanted]


def _layer(entry: dict[str, Any]) -> Layer:
    name = str(entry["Name"])
    kind = _kind(entry, name)
    nodes = tuple(dict.fromkeys(_ONNX.findall(str(entry.get("Metadata", "")))))
    if not nodes:
        nodes = tuple(part.strip() for part in name.split(" + "))
    return Layer(name, kind, _precision(entry), nodes, _macs(entry, kind))


def _kind(entry: dict[str, Any], name: str) -> str:
    said = str(entry.get("LayerType", "")).lower()
    parameter = str(entry.get("ParameterType", "")).lower()
    if "plugin" in said:
        return "plugin"
    if "conv" in said or parameter in ("convolution", "deconvolution"):
        return "conv"
    if any(word in said for word in _GEMM):
        return "gemm"
    if said in _OPAQUE or "foreignnode" in name.lower() or name.startswith("__myl"):
        return "opaque"
    return "other"


def _precision(entry: dict[str, Any]) -> str:
    weights = entry.get("Weights")
    said = [str(weights.get("Type", ""))] if isinstance(weights, dict) else []
    said += [_type_of(tensor) for tensor in entry.get("Inputs", [])[:1]]
    for text in said:
        for precision, pattern in _TYPES:
            if pattern.search(text):
                return precision
    tactic = str(entry.get("TacticName", ""))
    return next((p for p, pattern in _KERNELS if pattern.search(tactic)), "")


def _type_of(tensor: dict[str, Any]) -> str:
    for key in ("Format/Datatype", "Datatype", "DataType"):
        if key in tensor:
            return str(tensor[key])
    return ""


def _macs(entry: dict[str, Any], kind: str) -> int:
    """Output elements times what each of them sums over; 0 where a dimension is not known."""
    if kind not in ("conv", "gemm") or not entry.get("Inputs") or not entry.get("Outputs"):
        return 0
    source, result = (_shape(entry[side][0]) for side in ("Inputs", "Outputs"))
    if not source or not result or min(*source, *result) < 1:
        return 0
    if kind == "conv" and "Kernel" in entry and len(source) > 1:
        depth = source[1] // max(int(entry.get("Groups", 1)), 1)
        return math.prod(result) * math.prod(int(k) for k in entry["Kernel"]) * depth
    if kind == "gemm":  # [.., M, K] x [.., K, N]: K is what the left side has beside M and batch
        return math.prod(source) * result[-1]
    return 0


def _shape(tensor: dict[str, Any]) -> list[int]:
    return [int(d) for d in tensor.get("Dimensions", [])]
