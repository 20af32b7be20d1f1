"""``refedge quantize``: calibration samples to a precision plan, and the plan into the bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ..data.items import Items, open_items
from ..data.protocols import protocol_named
from ..errors import DataError
from ..export.apply import apply_plan
from ..export.graph import GraphIndex
from ..runtime.bundle import Bundle, open_bundle
from ..runtime.manifest import Manifest
from ..runtime.plan import Calibration, PartPlan, Plan, WeightScale
from ..runtime.segmenter import Segmenter, load
from .naive import naive_placement
from .placement import Placement, is_high, place, weighted_macs
from .ranges import METHODS, scale_of, weight_scales
from .sensitivity import Array, Node, node_errors, run_part, spared
from .statistics import Arrays, Collector

Progress = Callable[[Iterable[Any], str], Iterable[Any]]

PLANS = ("fp16", "int8", "naive")
RESTS = ("fp32", "fp16")
SAMPLES = 256
SPARE = 0.1
EVALUATION = ("val", "test", "testA", "testB", "testC", "testAB")


def quantize(
    path: Path,
    plan: str,
    *,
    data: str | None = None,
    root: Path | None = None,
    method: str = "mse",
    samples: int = SAMPLES,
    spare: float | None = None,
    rest: str = "fp32",
    dialects: Sequence[str] = ("ort",),
    progress: Progress | None = None,
) -> tuple[Plan, Manifest]:
    """Make a plan for a bundle and write its dialects into it.

    plan:    ``fp16``, ``int8``, or ``naive`` (every tensor in int8, for contrast).
    data:    calibration set such as ``refshapes:calibration`` or ``refcoco:train`` (under
             ``root``); int8 needs one.
    samples: image-expression pairs to see, spread over all families.
    spare:   share of the multiply-accumulates that may stay in float, where int8 hurts most; None
             is 0.1 for trained weights and 0 for others, whose masks mean nothing.
    rest:    precision of what is not in int8, ``fp32`` or ``fp16``; int8 plans only.
    progress: wraps an iterable with a label.
    """
    _require_one_of("plan", plan, PLANS)
    _require_one_of("rest", rest, RESTS)
    bundle = open_bundle(path)
    made = (
        half_plan(bundle)
        if plan == "fp16"
        else calibrated_plan(
            bundle, plan, data, root, method, samples, _spare(bundle, spare), progress or _silently
        )
    )
    if plan != "fp16":
        made = replace(made, rest=rest)
    return made, apply_plan(path, made, dialects)


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
        high = tuple(n.name for n in nodes if is_high(n, bundle.manifest.high))
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
    seen = _part_inputs(bundle, pairs)
    choose = naive_placement if name == "naive" else place
    high = bundle.manifest.high
    parts = {}
    for part, file in bundle.manifest.canonical.graphs.items():
        raw = bundle.file(file).read_bytes()
        parts[part] = _Part(onnx.load(bundle.file(file)), hashlib.sha256(raw).hexdigest())
        placement = choose(parts[part].index, high)
        parts[part].collector = collector = Collector(
            parts[part].model, (*placement.inputs, *placement.stored)
        )
        for inputs in progress(seen[part], f"{part}: ranges"):
            collector.add(inputs)
        parts[part].plan = _part_plan(parts[part], placement, method)
    if spare > 0.0 and name != "naive":
        some = {part: _stack(seen[part][: _batch(bundle)]) for part in parts}
        for part, kept in _spared(parts, some, spare, progress).items():
            placement = place(parts[part].index, high, kept)
            parts[part].plan = _part_plan(parts[part], placement, method)
    return Plan(
        name,
        "fp32",
        {part: p.plan for part, p in parts.items()},
        Calibration(str(data), method, tuple(pairs.ids)),
        {"int8_macs": _int8_macs(parts)},
    )


class _Part:
    """A part's graph, and what becomes of it."""

    plan: PartPlan
    collector: Collector

    def __init__(self, model: onnx.ModelProto, digest: str) -> None:
        self.model, self.digest = model, digest
        self.index = GraphIndex(model)


def _spared(
    parts: dict[str, _Part], inputs: dict[str, Arrays], spare: float, progress: Progress
) -> dict[str, frozenset[str]]:
    """Nodes of each part that stay in float, the budget being one for all parts."""
    mask = parts["mask"].model

    def from_text(products: Arrays) -> Array:
        return run_part(mask, {**inputs["mask"], **products})["logits"]

    def from_mask(outputs: Arrays) -> Array:
        return outputs["logits"]

    further = {"text": from_text, "mask": from_mask}
    errors: dict[Node, float] = {}
    work: dict[Node, int] = {}
    for name, part in parts.items():
        label = partial(_labelled, progress, f"{name}: sensitivity")
        found = node_errors(part.model, part.plan, inputs[name], further[name], label)
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


def _part_inputs(bundle: Bundle, pairs: Pairs) -> dict[str, list[Arrays]]:
    """What each part takes for each pair, text products included."""
    segmenter = load(bundle.path, threads=1)
    seen: dict[str, list[Arrays]] = {"text": [], "mask": []}
    for at in range(len(pairs.texts)):
        text, pixels = pairs.inputs(segmenter, at)
        seen["text"].append(text)
        seen["mask"].append({**segmenter.run_text(**text), "pixels": pixels})
    return seen


def _batch(bundle: Bundle) -> int:
    """Samples that sensitivity is measured on: as many pixels as 32 of the tiny model's."""
    size = bundle.manifest.preprocess
    return max(1, 32 * 96 * 96 // (size.height * size.width))


def _stack(inputs: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([i[name] for i in inputs]) for name in inputs[0]}


class Pairs:
    """Calibration pairs: ids, texts, and pictures by number."""

    def __init__(self, items: Items, count: int) -> None:
        self.ids: list[str] = []
        self.texts: list[str] = []
        self._pixels = []
        for i in range(min(count, len(items))):
            item = items[i]
            # one expression a picture, in turn: many pictures teach more than many words
            query = item.queries[i % len(item.queries)]
            self.ids.append(query.id)
            self.texts.append(query.text)
            self._pixels.append(item.pixels)

    def inputs(
        self, segmenter: Segmenter, at: int
    ) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.uint8]]:
        """ids and words, and pixels, each a batch of one."""
        tokens = segmenter.tokenize(self.texts[at])
        return {"ids": tokens.ids[None], "words": tokens.words[None]}, self._pixels[at][None]


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
    return Pairs(open_items(data, manifest.preprocess, protocol, root=root, limit=samples), samples)


def _part_plan(part: _Part, placement: Placement, method: str) -> PartPlan:
    tensors = (*placement.inputs, *placement.stored)
    histograms = part.collector.histograms
    scales = {name: scale_of(histograms[name], method) for name in tensors}
    _unify(scales, placement.same)
    weights = {
        name: WeightScale(axis, weight_scales(part.index.constant(name), axis))
        for name, axis in placement.weights.items()
    }
    return PartPlan(part.digest, placement.int8, placement.high, scales, placement.stored, weights)


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
