"""``refedge quantize``: calibration samples to a precision plan, and the plan into the bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..data.items import Items, open_items
from ..data.protocols import protocol_named
from ..errors import DataError
from ..export.apply import apply_plan
from ..export.dialects import require_dialects
from ..export.equalize import equalize
from ..export.graph import GraphIndex
from ..runtime.bundle import Bundle, open_bundle
from ..runtime.manifest import Manifest
from ..runtime.plan import Calibration, ChannelScale, PartPlan, Plan, WeightScale, decode_plan
from ..runtime.segmenter import load
from .equalization import SAMPLES as CHANNEL_SAMPLES
from .equalization import channel_scales
from .naive import naive_placement
from .placement import WIDE, Placement, is_high, place, weighted_macs
from .ranges import METHODS, scale_of, weight_scales
from .sensitivity import Array, Node, node_errors, run_part, spared
from .statistics import Arrays, Collector

Progress = Callable[[Iterable[Any], str], Iterable[Any]]

PLANS = ("fp16", "int8", "naive")
RESTS = ("fp32", "fp16")
METHOD = "mse"
SAMPLES = 256
SENSITIVITY_SAMPLES = 32  # that nodes are quantized one by one on
SPARE = 0.1
EVALUATION = ("val", "test", "testA", "testB", "testC", "testAB")


def quantize(
    path: Path,
    plan: str,
    *,
    data: str | None = None,
    root: Path | None = None,
    method: str | None = None,
    samples: int | None = None,
    spare: float | None = None,
    rest: str | None = None,
    dialects: Sequence[str] = ("ort",),
    progress: Progress | None = None,
) -> tuple[Plan, Manifest]:
    """Make a plan for a bundle and write its dialects into it.

    plan:    ``fp16``, ``int8``, or ``naive`` (every tensor in int8, for contrast).
    data:    calibration set such as ``refshapes:calibration`` or ``refcoco:train`` (under
             ``root``); int8 needs one. Without it a plan that the bundle has is written in more
             dialects, as it is.
    method:  how a range is chosen; None is ``mse``.
    samples: image-expression pairs to see, spread over all families; None is 256.
    spare:   share of the multiply-accumulates that may stay in float, where int8 hurts most; None
             is 0.1 for trained weights and 0 for others, whose masks mean nothing. At 0 nothing
             that takes time is added for accuracy, products for channels neither.
    rest:    precision of what is not in int8, ``fp32`` or ``fp16``; int8 plans only. None is fp32,
             or what the plan has that is there. Scales do not depend on it.
    progress: wraps an iterable with a label.
    """
    _require_one_of("plan", plan, PLANS)
    _require_one_of("rest", rest or RESTS[0], RESTS)
    require_dialects(dialects)  # before the minutes of calibration, not after
    bundle = open_bundle(path)
    if plan == "fp16":
        made = half_plan(bundle)
    elif data is None and plan in bundle.manifest.plans:
        _require_none(method=method, samples=samples, spare=spare)
        made = decode_plan(bundle.file(bundle.manifest.plans[plan]).read_bytes())
        made = replace(made, rest=rest or made.rest)
    else:
        share, shown = _spare(bundle, spare), progress or _silently
        how, many = method or METHOD, SAMPLES if samples is None else samples
        made = calibrated_plan(bundle, plan, data, root, how, many, share, shown)
        made = replace(made, rest=rest or RESTS[0])
    return made, apply_plan(path, made, dialects)


def _require_none(**given: object) -> None:
    """A plan that is there is written as it is: what says how to calibrate asks for data."""
    said = [name for name, value in given.items() if value is not None]
    if said:
        raise DataError(
            "calibrate-data",
            f"{' and '.join(said)} say how to calibrate, and there is no data",
            why="the plan that is there is written as it is",
            fix="name a calibration set, for example refshapes:calibration",
        )


def _spare(bundle: Bundle, spare: float | None) -> float:
    if spare is None:
        return SPARE if bundle.manifest.provenance.get("trained") else 0.0
    if not 0.0 <= spare < 1.0:
        raise DataError(
            "calibrate-spare",
            f"a share of {spare} cannot stay in float",
            why="it is a share of the multiply-accumulates, from 0 to below 1",
            fix=f"for example {SPARE}",
        )
    return spare


def _labelled(progress: Progress, label: str, items: Iterable[str]) -> Iterable[str]:
    return progress(items, label)


def _silently(items: Iterable[Any], _: str) -> Iterable[Any]:
    return items


def half_plan(bundle: Bundle) -> Plan:
    """Everything in float16 but the nodes that stay high."""
    parts = {}
    for name, file in bundle.manifest.canonical.graphs.items():
        raw = bundle.file(file).read_bytes()
        nodes = onnx.ModelProto.FromString(raw).graph.node
        high = tuple(n.name for n in nodes if is_high(n, bundle.manifest.high, WIDE))
        parts[name] = PartPlan(hashlib.sha256(raw).hexdigest(), high=high)
    return Plan("fp16", "fp16", parts)


def calibrated_plan(
    bundle: Bundle,
    name: str,
    data: str | None,
    root: Path | None,
    method: str,
    samples: int,
    spare: float,
    progress: Progress,
) -> Plan:
    """Scales from what the calibration samples show in the canonical graphs."""
    _require_one_of("method", method, tuple(METHODS))
    pairs = calibration_pairs(bundle, data, samples, root)
    choose = naive_placement if name == "naive" else place
    high = bundle.manifest.high
    parts = {part: _Part(bundle, part) for part in bundle.manifest.canonical.graphs}
    shown: list[tuple[str, dict[str, Arrays]]] = []
    if name != "naive":
        first = range(min(len(pairs), _as_many(bundle, CHANNEL_SAMPLES)))
        shown = [pairs[at] for at in progress(first, "channels")]
        for part, p in parts.items():
            p.equalize(choose(p.index, high), [i[part] for _, i in shown], spare > 0.0)
    placements = {part: choose(p.index, high) for part, p in parts.items()}
    for part, p in parts.items():
        placement = placements[part]
        p.collector = Collector(p.model, (*placement.inputs, *placement.stored))
    ids: list[str] = []
    some: list[dict[str, Arrays]] = []
    for at in progress(range(len(pairs)), "ranges"):
        query, inputs = shown[at] if at < len(shown) else pairs[at]
        ids.append(query)
        for part, p in parts.items():
            p.collector.add(inputs[part])
        if at < _as_many(bundle, SENSITIVITY_SAMPLES):
            some.append(inputs)
    for part, p in parts.items():
        p.plan = _part_plan(p, placements[part], method)
    if spare > 0.0 and name != "naive":
        stacked = {part: _stack([inputs[part] for inputs in some]) for part in parts}
        for part, kept in _spared(parts, stacked, spare, progress).items():
            parts[part].plan = _part_plan(parts[part], place(parts[part].index, high, kept), method)
    return Plan(
        name,
        "fp32",
        {part: p.plan for part, p in parts.items()},
        Calibration(str(data), method, tuple(ids)),
        {"int8_macs": _int8_macs(parts)},
    )


class _Part:
    """A part's graph, and what becomes of it."""

    plan: PartPlan
    collector: Collector

    def __init__(self, bundle: Bundle, name: str) -> None:
        file = bundle.file(bundle.manifest.canonical.graphs[name])
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.model = onnx.load(file)
        self.index = GraphIndex(self.model)
        self.channels: tuple[ChannelScale, ...] = ()

    def equalize(self, placement: Placement, inputs: Sequence[Arrays], products: bool) -> None:
        """From here on the graph has channels of one size where that can be had."""
        quantized = (*placement.inputs, *placement.stored)
        self.channels = channel_scales(self.model, quantized, inputs, products)
        self.model = equalize(self.model, self.channels)
        self.index = GraphIndex(self.model)


def _spared(
    parts: dict[str, _Part], inputs: dict[str, Arrays], spare: float, progress: Progress
) -> dict[str, frozenset[str]]:
    """Nodes of each part that stay in float, the budget being one for all parts."""
    mask = parts["mask"].model

    def logits(outputs: Arrays) -> Array:
        """The mask part's own, or what it makes of another part's outputs."""
        if "logits" in outputs:
            return outputs["logits"]
        return run_part(mask, {**inputs["mask"], **outputs})["logits"]

    errors: dict[Node, float] = {}
    work: dict[Node, int] = {}
    for name, part in parts.items():
        label = partial(_labelled, progress, f"{name}: sensitivity")
        found = node_errors(part.model, part.plan, inputs[name], logits, label)
        errors |= {(name, node): error for node, error in found.items()}
        work |= {(name, node): count for node, count in weighted_macs(part.index).items()}
    chosen = spared(work, errors, spare)
    return {name: frozenset(node for part, node in chosen if part == name) for name in parts}


def _int8_macs(parts: dict[str, _Part]) -> dict[str, float]:
    """Share of the multiply-accumulates with constant weights in integers: each part's, and all."""
    work = {name: weighted_macs(part.index) for name, part in parts.items()}
    done = {name: sum(work[name][n] for n in part.plan.int8) for name, part in parts.items()}
    total = {name: sum(counts.values()) for name, counts in work.items()}
    done["all"], total["all"] = sum(done.values()), sum(total.values())
    shares = {name: done[name] / max(total[name], 1) for name in total}
    return {name: round(share, 6) for name, share in shares.items()}


def _as_many(bundle: Bundle, samples: int) -> int:
    """As many samples as have the pixels of ``samples`` of the tiny model's, at least one."""
    size = bundle.manifest.preprocess
    return max(1, samples * 96 * 96 // (size.height * size.width))


def _stack(inputs: Sequence[Arrays]) -> Arrays:
    """One batch of several inputs, each with its own picture."""
    stacked = {name: np.concatenate([i[name] for i in inputs]) for name in inputs[0]}
    if "image_index" in stacked:
        stacked["image_index"] = np.arange(len(inputs), dtype=np.int32)
    return stacked


class Pairs:
    """Calibration pairs, made one by one: a picture each, and of its expressions one in turn.

    Many pictures teach more than many words.
    """

    def __init__(self, bundle: Bundle, items: Items, count: int) -> None:
        self._segmenter = load(bundle.path, threads=1)
        self._items, self._count = items, min(count, len(items))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: int) -> tuple[str, dict[str, Arrays]]:
        """The id, and what each part takes, a batch of one, text products included."""
        item = self._items[at]
        query = item.queries[at % len(item.queries)]
        tokens = self._segmenter.tokenize(query.text)
        ids, words = tokens.ids[None], tokens.words[None]
        pixels = item.pixels[None]
        index = np.zeros(1, np.int32)
        known = {
            **self._segmenter.run_text(ids, words),
            **self._segmenter.image(pixels),
            **{"ids": ids, "words": words, "pixels": pixels, "image_index": index},
        }
        parts = self._segmenter.manifest.parts
        return query.id, {p.name: {t.name: known[t.name] for t in p.inputs} for p in parts}


def calibration_pairs(bundle: Bundle, data: str | None, samples: int, root: Path | None) -> Pairs:
    """The first samples of a set that no score is computed on."""
    if not data:
        raise DataError(
            "calibrate-data",
            "int8 needs calibration data",
            why="ranges that nobody has seen are guesses",
            fix="--data refshapes:calibration",
        )
    if data.partition(":")[2] in EVALUATION:
        raise DataError(
            "calibrate-split",
            f"{data} is an evaluation split",
            why="scales that were fitted to the test are no proof",
            fix="calibrate on :calibration or :train",
        )
    if samples < 1:
        raise DataError(
            "calibrate-samples",
            f"{samples} calibration samples were asked for",
            why="at least one has to be seen; 256 are usual",
            fix=f"--samples {SAMPLES}",
        )
    manifest = bundle.manifest
    protocol = protocol_named(manifest.protocol)
    items = open_items(data, manifest.preprocess, protocol, root=root, limit=samples)
    return Pairs(bundle, items, samples)


def _part_plan(part: _Part, placement: Placement, method: str) -> PartPlan:
    tensors = (*placement.inputs, *placement.stored)
    histograms = part.collector.histograms
    whole = frozenset(placement.factors)
    scales = {
        name: scale_of(histograms[name], "minmax" if name in whole else method) for name in tensors
    }
    _unify(scales, placement.same)
    scales |= {source: scales[relu] for source, relu in placement.rectified}
    weights = {
        name: WeightScale(axis, weight_scales(part.index.constant(name), axis))
        for name, axis in placement.weights.items()
    }
    return PartPlan(
        part.digest,
        placement.int8,
        placement.high,
        scales,
        placement.stored,
        weights,
        placement.factors,
        part.channels,
    )


def _unify(scales: dict[str, float], same: Iterable[tuple[str, str]]) -> None:
    """Tensors on both sides of a mover get the larger scale, along whole chains."""
    pairs = [(a, b) for a, b in same if a in scales and b in scales]
    changed = True
    while changed:
        changed = False
        for a, b in pairs:
            if scales[a] != scales[b]:
                scales[a] = scales[b] = max(scales[a], scales[b])
                changed = True


def _require_one_of(kind: str, found: str, known: Sequence[str]) -> None:
    if found not in known:
        raise DataError(
            f"calibrate-{kind}",
            f"there is no {kind} called {found!r}",
            why=f"quantize knows {', '.join(known)}",
            fix="choose one of these",
        )
