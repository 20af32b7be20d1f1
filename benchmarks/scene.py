"""``refedge bench --expressions N``: many expressions about one picture, together and one by one.

Together, what depends on the picture alone is computed once and the expressions go as one batch;
one by one, every expression pays for the whole. Texts are kept in both. The two alternate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.refshapes.dataset import RefShapes
from ..runtime.bundle import open_bundle
from ..runtime.files import write_json
from ..runtime.segmenter import Segmenter, load
from .accuracy import REFERENCE, artefacts
from .bench import Series, series
from .device import describe
from .timing import SEED, warm_up

SCHEMA = "refedge-scene-1"
TOGETHER = "together"
ONE_BY_ONE = "one by one"
KINDS = (TOGETHER, ONE_BY_ONE)


@dataclass(frozen=True)
class SceneTimes:
    """Milliseconds of all expressions of one plan; ``image_part``: whether there is one."""

    plan: str
    image_part: bool
    together: Series
    one_by_one: Series
    artefacts: dict[str, str]

    @property
    def gain(self) -> float:
        """How many times faster together is, by the medians."""
        return self.one_by_one.p50 / self.together.p50


def scene_times(
    path: Path,
    *,
    count: int,
    plans: Sequence[str] | None = None,
    threads: int = 1,
    rounds: int = 15,
    backend: str = "auto",
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[SceneTimes]:
    """Time ``count`` expressions of RefShapes' test scenes about one picture, plan by plan."""
    manifest = open_bundle(path).manifest
    names = plans or (REFERENCE, *manifest.plans)
    size = manifest.preprocess.height
    samples = RefShapes("test", size=min(4096, 2 * size), scenes=SEED + count)
    photo = samples[SEED].image
    texts = [e.text for sample in samples for e in sample.expressions][:count]
    found = []
    for name in names:
        segmenter = load(path, plan=name, threads=threads, backend=backend)
        runs = {kind: partial(_clocked, kind, segmenter, photo, texts) for kind in KINDS}
        for run in runs.values():
            warm_up(run)
        samples_ms: dict[str, list[float]] = {kind: [] for kind in runs}
        for _ in progress(range(rounds)):
            for kind, run in runs.items():
                samples_ms[kind].append(run())
        found.append(
            SceneTimes(
                name,
                "image" in segmenter.dialect.graphs,
                together=series(samples_ms[TOGETHER]),
                one_by_one=series(samples_ms[ONE_BY_ONE]),
                artefacts=artefacts(segmenter),
            )
        )
    return found


def write_scene_times(times: Sequence[SceneTimes], path: Path, bundle: Path, count: int) -> None:
    """Write the record."""
    manifest = open_bundle(bundle).manifest
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "model": manifest.model,
        "bundle": manifest.digest,
        "expressions": count,
        "device": describe(),
        "plans": [asdict(t) for t in times],
    }
    write_json(record, path)


def table(times: Sequence[SceneTimes]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows for people."""
    rows = [
        [t.plan, f"{t.together.p50:.1f}", f"{t.one_by_one.p50:.1f}", f"{t.gain:.2f}×"]
        for t in times
    ]
    return ("plan", "together ms", "one by one ms", "gain"), rows


def _clocked(
    kind: str, segmenter: Segmenter, photo: npt.NDArray[np.uint8], texts: Sequence[str]
) -> float:
    """Milliseconds of all the expressions."""
    started = time.perf_counter()
    if kind == TOGETHER:
        segmenter.scene(photo).segment(texts)
    else:
        for text in texts:
            segmenter.segment(photo, text)
    return (time.perf_counter() - started) * 1e3
