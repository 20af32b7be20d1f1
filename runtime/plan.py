"""Precision plans: which node runs in what, and which tensor carries which scale.

A plan is a file of a bundle (``plans/<name>.json``). It is made once, from calibration samples or
by hand, and applied to the canonical graph once per dialect; every dialect of a plan quantizes the
same tensors by the same scales. Quantization is symmetric: ``real = scale * integer``, integers
from -128 to 127 for activations and -127 to 127 for weights, rounded half to even.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..errors import BundleError

SCHEMA = 1
RESTS = ("fp32", "fp16")


@dataclass(frozen=True)
class WeightScale:
    """Scales of a constant: one per channel along ``axis``, or a single one (``axis`` None)."""

    axis: int | None
    scales: tuple[float, ...]


@dataclass(frozen=True)
class ChannelScale:
    """Factors of channels that are made larger before they are quantized (``export/equalize.py``).

    tensors: name to the axis of its channels; all of them have these factors.
    factors: one per channel.
    readers: tensors that something reads that cannot take the inverse into its weights.
    writers: tensors whose maker cannot take the factors into its weights.
    """

    tensors: dict[str, int]
    factors: tuple[float, ...]
    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()


@dataclass(frozen=True)
class PartPlan:
    """The plan of one part's graph.

    graph:       SHA-256 of the canonical graph file that the plan is for.
    int8:        names of the nodes that compute in integers.
    high:        names of the nodes that stay in float32 whatever the rest is.
    activations: scale of every quantized tensor.
    stored:      those of them that only an integer convolution's own output makes necessary:
                 ONNX Runtime needs them, TensorRT is better off without.
    factors:     those of them that only a product with another quantized tensor reads as integers;
                 everything else reads the float values.
    weights:     scales of every quantized constant; ONNX Runtime's dialects keep those of nodes
                 outside ``int8`` as integers on disk too.
    channels:    factors that go into the float graph first; every name and scale above is of the
                 graph with them.
    """

    graph: str
    int8: tuple[str, ...] = ()
    high: tuple[str, ...] = ()
    activations: dict[str, float] = field(default_factory=dict)
    stored: tuple[str, ...] = ()
    weights: dict[str, WeightScale] = field(default_factory=dict)
    factors: tuple[str, ...] = ()
    channels: tuple[ChannelScale, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """Where the scales come from.

    data, ids: the dataset's name and the samples that were seen, in order.
    method:    how a range was chosen (``minmax``, ``percentile``, ``entropy``, ``mse``).
    """

    data: str
    method: str
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A whole plan; ``rest`` is the precision of every node that is not named."""

    name: str
    rest: str
    parts: dict[str, PartPlan]
    calibration: Calibration | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA


def encode_plan(plan: Plan) -> bytes:
    """Indented JSON in the plan's own order, which is that of what a dialect writes of it."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n"


def decode_plan(raw: bytes) -> Plan:
    """Parse and validate; raises BundleError ``plan-damaged``."""
    try:
        plan = msgspec.json.decode(raw, type=Plan)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(str(error)) from error
    if plan.schema != SCHEMA or plan.rest not in RESTS:
        raise _damaged(f"schema {plan.schema}, rest {plan.rest!r}")
    for part in plan.parts.values():
        scales = [*part.activations.values(), *(s for w in part.weights.values() for s in w.scales)]
        scales += [factor for c in part.channels for factor in c.factors]
        if not all(0.0 < s < float("inf") for s in scales):
            raise _damaged("a scale is not a positive number")
        if not set(part.stored) <= set(part.activations):
            raise _damaged("a stored tensor has no scale")
        if not set(part.factors) <= set(part.stored):
            raise _damaged("a factor is not stored")
        if any(not {*c.readers, *c.writers} <= set(c.tensors) for c in part.channels):
            raise _damaged("a tensor has a product for channels, and no factors")
    return plan


def require_graph(plan: Plan, part: str, canonical: bytes) -> PartPlan:
    """The plan of a part, if it was made for this very graph."""
    found = plan.parts.get(part)
    digest = hashlib.sha256(canonical).hexdigest()
    if found is None or found.graph != digest:
        raise BundleError(
            "plan-graph",
            f"the plan {plan.name!r} was not made for this {part!r} graph",
            why=f"it is for {found.graph[:16]}…, the bundle holds {digest[:16]}…"
            if found
            else f"it has parts {', '.join(plan.parts) or 'none'}",
            fix="quantize this bundle anew",
        )
    return found


def _damaged(why: str) -> BundleError:
    return BundleError(
        "plan-damaged",
        "the precision plan cannot be read",
        why=why,
        fix="quantize the bundle anew",
    )
