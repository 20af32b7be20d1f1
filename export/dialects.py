"""A plan applied to the canonical graph, once per family of runtimes.

ort       ONNX Runtime: fp32 rest, uint8 activations with zero-point 128, int8 weights; fp16 plans
          store weights in float16 and compute in float32.
ort-u8u8  the same with uint8 weights, for processors whose u8 x s8 kernels saturate (x86 without
          VNNI). The runtime chooses by the processor's flags.
trt10     TensorRT 10.3 to 11.4, strongly typed: int8 with zero-point 0, fp16 or fp32 rest.
trt8      TensorRT 8.6: made from the fp32 graph, opset 17, Gelu in pieces, fp32 scales; a sidecar
          names the layers that the builder must keep in float32.
trt10-plugin, trt8-plugin: the same where attention to words is one node that the
          TensorRT plugin computes; integers stop at its border.
trt10-quick: the same for 10.9 and later, with a node for each pass of the block: TensorRT's
          ahead-of-time plugins, for which nothing is compiled on the board.

All dialects of a plan quantize by the same scales; they differ in encoding and in what surrounds
the integers. Only the ``ort`` dialects quantize ``stored`` tensors, which their kernels need.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import onnx

from ..errors import ExportError
from ..runtime.plan import PartPlan, Plan
from .equalize import equalize
from .fuse import Fusion, fuse, integer_words
from .graph import copy_of
from .half import store_half, to_half
from .lower import to_opset_17
from .ort import for_ort
from .passes import split_passes
from .qdq import write_qdq
from .tables import store_tables

DIALECTS = ("ort", "ort-u8u8", "trt10", "trt8")
WITH_PLUGIN = {"trt10-plugin": "trt10", "trt8-plugin": "trt8", "trt10-quick": "trt10"}
DIALECT = "refedge.dialect"
PLAN = "refedge.plan"


def require_dialects(names: Iterable[str]) -> None:
    """Raise ExportError ``dialect-unknown`` for a name that no dialect has."""
    for name in names:
        if name not in (*DIALECTS, *WITH_PLUGIN):
            raise ExportError(
                "dialect-unknown",
                f"there is no dialect called {name!r}",
                why=f"the dialects are {', '.join((*DIALECTS, *WITH_PLUGIN))}",
                fix="choose among these",
            )


def mark(model: onnx.ModelProto, dialect: str, plan: str) -> onnx.ModelProto:
    """A copy that says what it is and shares no memory with its source."""
    out = copy_of(model)
    for key, value in ((DIALECT, dialect), (PLAN, plan)):
        out.metadata_props.append(onnx.StringStringEntryProto(key=key, value=value))
    return out


def write_dialect(
    model: onnx.ModelProto, dialect: str, plan: Plan, part: PartPlan
) -> tuple[onnx.ModelProto, bytes, list[Fusion]]:
    """The graph of a part in a dialect, its sidecar (empty where it has none), what was fused."""
    ort, family = dialect.startswith("ort"), WITH_PLUGIN.get(dialect, dialect)
    model = equalize(model, part.channels)
    fusions: list[Fusion] = []
    if dialect in WITH_PLUGIN:
        model = copy_of(model)
        fusions = fuse(model)
    out = write_qdq(model, part, unsigned=ort, stored=ort, unsigned_weights=dialect == "ort-u8u8")
    if ort and part.weights:
        store_tables(out)
    sidecar = b""
    if family == "trt10" and plan.rest == "fp16":
        out = to_half(out, part.high)
    elif family == "trt8":
        out = to_opset_17(out)
        if dialect != family:
            integer_words(out)
        record = {"precision": plan.rest, "float32": sorted(part.high)}
        sidecar = json.dumps(record, indent=1).encode() + b"\n"
    elif ort and plan.rest == "fp16":
        out = store_half(out)
    if dialect == "trt10-quick":
        split_passes(out)
    return mark(for_ort(out) if ort else out, dialect, plan.name), sidecar, fusions
