"""Weights beside the graphs: one file per part, shared by every dialect that uses it.

Tensors of 1 KiB and more go there, in the order of the graph, each aligned (large ones to a memory
page, so that a runtime can map them). The file is named by its hash: dialects with equal weights
name the same file; what lowering adds that is no weight stays in the graph.
"""

from __future__ import annotations

import hashlib

import onnx
from onnx import TensorProto, numpy_helper

from .lower import PLAIN

_LEAST = 1024
_PAGE = 4096
_LINE = 64


def split_weights(model: onnx.ModelProto) -> tuple[str, bytes]:
    """Move the weights out of a graph, in place; returns the file's name and content."""
    content = bytearray()
    moved: list[tuple[TensorProto, int, int]] = []
    for tensor in model.graph.initializer:
        raw = numpy_helper.to_array(tensor).tobytes()
        if len(raw) < _LEAST or tensor.name.startswith(PLAIN):
            continue
        content.extend(bytes(-len(content) % (_PAGE if len(raw) >= 16 * _PAGE else _LINE)))
        moved.append((tensor, len(content), len(raw)))
        content.extend(raw)
    name = f"{model.graph.name}-{hashlib.sha256(content).hexdigest()[:16]}.weights"
    for tensor, offset, length in moved:
        for field in ("raw_data", "float_data", "int32_data", "int64_data"):
            tensor.ClearField(field)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", offset), ("length", length)):
            tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))
    return name, bytes(content)
