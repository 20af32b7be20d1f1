"""A plan applied to the canonical graph, for one family of runtimes.

This file holds the fp32 plan of the ``ort`` dialect: ONNX Runtime takes the canonical graph as it
is, and shares its weights. Lower precisions and TensorRT's dialects join it here.
"""

from __future__ import annotations

import onnx

DIALECT = "refedge.dialect"
PLAN = "refedge.plan"


def ort_fp32(model: onnx.ModelProto) -> onnx.ModelProto:
    """The canonical graph, marked; a copy that shares no memory with its source."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    for key, value in ((DIALECT, "ort"), (PLAN, "fp32")):
        out.metadata_props.append(onnx.StringStringEntryProto(key=key, value=value))
    return out
