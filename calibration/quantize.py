"""``refedge quantize``: calibration samples to a precision plan, and the plan into the bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ..data.refshapes.dataset import RefShapes
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
from .statistics import Collector

SAMPLES = 64
EVALUATION = ("val", "test", "testA", "testB")


def quantize(
    path: Path,
    plan: str,
    *,
    data: str | None = None,
    method: str = "minmax",
    samples: int = SAMPLES,
    dialects: Sequence[str] = ("ort",),
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[Plan, Manifest]:
    """Make a plan for a bundle and write its dialects into it.

    plan:    ``fp16``, ``int8``, or ``naive`` (every tensor in int8, for contrast).
    data:    calibration set, ``refshapes:calibration`` or ``refshapes:train``; int8 needs one.
    samples: image-expression pairs to see, spread over all families.
    """
    bundle = open_bundle(path)
    made = (
        half_plan(bundle)
        if plan == "fp16"
        else calibrated_plan(bundle, plan, data, method, samples, progress)
    )
    return made, apply_plan(path, made, dialects)


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
    method: str,
    samples: int,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> Plan:
    """Scales from what the calibration samples show in the canonical graphs."""
    _require_method(method)
    pairs = calibration_pairs(bundle, data, samples)
    models = {
        part: onnx.load(bundle.file(file))
        for part, file in bundle.manifest.canonical.graphs.items()
    }
    indices = {part: GraphIndex(model) for part, model in models.items()}
    choose = naive_placement if name == "naive" else place
    placements = {p: choose(i, bundle.manifest.high) for p, i in indices.items()}
    collectors = {
        part: Collector(models[part], (*p.inputs, *p.stored)) for part, p in placements.items()
    }
    segmenter = load(bundle.path, threads=1)
    for at in progress(range(len(pairs.texts))):
        text, pixels = pairs.inputs(segmenter, at)
        collectors["text"].add(text)
        collectors["mask"].add({**segmenter.run_text(**text), "pixels": pixels})
    parts = {
        part: _part_plan(bundle, part, indices[part], placements[part], collectors[part], method)
        for part in models
    }
    notes = {part: {"int8_macs": int8_share(indices[part], p.int8)} for part, p in parts.items()}
    return Plan(name, "fp32", parts, Calibration(str(data), method, tuple(pairs.ids)), notes)


class Pairs:
    """Calibration pairs: ids, texts, and pictures by number."""

    def __init__(self, split: RefShapes, count: int) -> None:
        self.ids: list[str] = []
        self.texts: list[str] = []
        self._images = []
        for i in range(count):
            sample = split[i]
            # one expression a scene, the families in turn: many scenes teach more than many words
            expression = sample.expressions[i % len(sample.expressions)]
            self.ids.append(f"{sample.id}/{i % len(sample.expressions)}")
            self.texts.append(expression.text)
            self._images.append(sample.image)

    def inputs(
        self, segmenter: Segmenter, at: int
    ) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.uint8]]:
        """ids and words, and pixels, each a batch of one."""
        tokens = segmenter.tokenize(self.texts[at])
        return {"ids": tokens.ids[None], "words": tokens.words[None]}, self._images[at][None]


def calibration_pairs(bundle: Bundle, data: str | None, samples: int) -> Pairs:
    """The first samples of a split that no score is computed on."""
    if not data:
        raise DataError(
            "calibrate-data",
            "int8 needs calibration data",
            why="ranges that nobody has seen are guesses",
            fix="--data refshapes:calibration",
        )
    family, _, split = data.partition(":")
    if split in EVALUATION:
        raise DataError(
            "calibrate-split",
            f"{data} is an evaluation split",
            why="scales that were fitted to the test are no proof",
            fix="--data refshapes:calibration",
        )
    difficulty = {"refshapes": "lite", "refshapes-lite": "lite", "refshapes-full": "full"}
    if family not in difficulty:
        raise DataError(
            "data-unknown",
            f"there is no calibration set called {data!r}",
            why=f"known are {', '.join(difficulty)}, with :calibration or :train",
            fix="--data refshapes:calibration",
        )
    size = bundle.manifest.preprocess.height
    return Pairs(
        RefShapes(split, difficulty=difficulty[family], size=size, scenes=samples), samples
    )


def _part_plan(
    bundle: Bundle,
    part: str,
    index: GraphIndex,
    placement: Placement,
    collector: Collector,
    method: str,
) -> PartPlan:
    raw = bundle.file(bundle.manifest.canonical.graphs[part]).read_bytes()
    scales = {name: scale_of(h, method) for name, h in collector.histograms.items()}
    _unify(scales, placement.same)
    weights = {
        name: WeightScale(axis, weight_scales(index.constant(name), axis))
        for name, axis in placement.weights.items()
    }
    digest = hashlib.sha256(raw).hexdigest()
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
