"""``refedge quantize``: calibration samples to a precision plan, and the plan into the bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
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
from .placement import Placement, int8_share, is_high, place
from .ranges import METHODS, scale_of, weight_scales
from .sensitivity import node_errors, spared
from .statistics import Arrays, Collector

Progress = Callable[[Iterable[Any], str], Iterable[Any]]

SAMPLES = 64
SPARE = 0.08
EVALUATION = ("val", "test", "testA", "testB")


def quantize(
    path: Path,
    plan: str,
    *,
    data: str | None = None,
    root: Path | None = None,
    method: str = "minmax",
    samples: int = SAMPLES,
    spare: float | None = None,
    dialects: Sequence[str] = ("ort",),
    progress: Progress | None = None,
) -> tuple[Plan, Manifest]:
    """Make a plan for a bundle and write its dialects into it.

    plan:    ``fp16``, ``int8``, or ``naive`` (every tensor in int8, for contrast).
    data:    calibration set such as ``refshapes:calibration`` or ``refcoco:train`` (under
             ``root``); int8 needs one.
    samples: image-expression pairs to see, spread over all families.
    spare:   share of the multiply-accumulates that may stay in float, where int8 hurts most; None
             is 0.08 for trained weights and 0 for others, whose masks mean nothing.
    progress: wraps an iterable with a label.
    """
    bundle = open_bundle(path)
    made = (
        half_plan(bundle)
        if plan == "fp16"
        else calibrated_plan(
            bundle, plan, data, root, method, samples, _spare(bundle, spare), progress or _silently
        )
    )
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
    _require_method(method)
    pairs = calibration_pairs(bundle, data, samples, root)
    seen = _part_inputs(bundle, pairs)
    parts, notes = {}, {}
    for part, file in bundle.manifest.canonical.graphs.items():
        model = onnx.load(bundle.file(file))
        index = GraphIndex(model)
        digest = hashlib.sha256(bundle.file(file).read_bytes()).hexdigest()
        choose = naive_placement if name == "naive" else place
        placement = choose(index, bundle.manifest.high)
        collector = Collector(model, (*placement.inputs, *placement.stored))
        for inputs in progress(seen[part], f"{part}: ranges"):
            collector.add(inputs)
        plan = _part_plan(digest, index, placement, collector, method)
        if spare > 0.0 and name != "naive":
            some = _stack(seen[part][: _batch(bundle)])
            label = f"{part}: sensitivity"
            errors = node_errors(model, plan, some, partial(_labelled, progress, label))
            placement = place(index, bundle.manifest.high, spared(index, errors, spare))
            plan = _part_plan(digest, index, placement, collector, method)
        parts[part] = plan
        notes[part] = {"int8_macs": round(int8_share(index, plan.int8), 6)}
    return Plan(name, "fp32", parts, Calibration(str(data), method, tuple(pairs.ids)), notes)


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
            why="at least one has to be seen; 64 are usual",
            fix=f"--samples {SAMPLES}",
        )
    manifest = bundle.manifest
    protocol = protocol_named(manifest.protocol)
    return Pairs(open_items(data, manifest.preprocess, protocol, root=root, limit=samples), samples)


def _part_plan(
    digest: str, index: GraphIndex, placement: Placement, collector: Collector, method: str
) -> PartPlan:
    tensors = (*placement.inputs, *placement.stored)
    scales = {name: scale_of(collector.histograms[name], method) for name in tensors}
    _unify(scales, placement.same)
    weights = {
        name: WeightScale(axis, weight_scales(index.constant(name), axis))
        for name, axis in placement.weights.items()
    }
    return PartPlan(digest, placement.int8, placement.high, scales, placement.stored, weights)


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


def _require_method(method: str) -> None:
    if method not in METHODS:
        raise DataError(
            "calibrate-method",
            f"there is no calibration method called {method!r}",
            why=f"the methods are {', '.join(METHODS)}",
            fix="choose one of these",
        )
