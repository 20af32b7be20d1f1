"""torch to canonical ONNX: one part of a model, traced by torch's dynamo exporter.

The only file of ``export`` besides ``parity`` that needs torch.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from torch import Tensor

from ..errors import ExportError
from ..models.parts import BATCH, IMAGES, Part
from .canonical import OPSET, canonical

_TRACED = {BATCH: 4, IMAGES: 2}  # a size of 1 would be taken for a constant
_LARGEST_BATCH = 64


def to_onnx(part: Part, *, squeeze: bool = True) -> onnx.ModelProto:
    """Trace one part and bring the graph into refedge's canonical form.

    squeeze: as in ``linear.reorder``; without it, a graph to compare with.

    Expressions and pictures are dynamic, everything else fixed: fp32, opset 20, ``ir_version`` 10.
    Raises ExportError where torch cannot trace the module.
    """
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                part.module,
                _zeros(part),
                dynamo=True,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
                input_names=[port.name for port in part.inputs],
                output_names=[port.name for port in part.outputs],
                dynamic_shapes=_dynamic(part),
            )
    except Exception as error:  # whatever a user's forward raises while it is traced
        raise ExportError(
            "export-trace",
            f"torch cannot trace the part {part.name!r}",
            why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="avoid data-dependent shapes and control flow in forward",
        ) from error
    if program is None:
        raise ExportError(
            "export-trace",
            f"torch exported nothing for the part {part.name!r}",
            why="torch.onnx.export returned None",
            fix="use torch 2.11 or later",
        )
    return canonical(program.model_proto, part.name, squeeze=squeeze)


def _zeros(part: Part) -> tuple[Tensor, ...]:
    """Inputs to trace with; only their shapes matter."""
    return tuple(
        torch.zeros(
            [_TRACED[n] if isinstance(n, str) else n for n in port.shape],
            dtype=getattr(torch, port.dtype),
        )
        for port in part.inputs
    )


def _dynamic(part: Part) -> Any:
    """Axis 0 of every input is dynamic; a ``*args`` forward wants all of them as one tuple."""
    dims = {n: torch.export.Dim(n, min=1, max=_LARGEST_BATCH) for n in (BATCH, IMAGES)}
    return (tuple({0: dims[str(port.shape[0])]} for port in part.inputs),)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's chatter about packages that refedge does not use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
