"""``refedge eval``: what a bundle scores on a dataset, under a named protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.protocols import Meter, Protocol, Scores, protocol_named
from ..data.refshapes.dataset import RefShapes, Sample
from ..data.refshapes.scene import DIFFICULTIES, SPLITS
from ..errors import DataError
from ..runtime.manifest import PreprocessSpec
from ..runtime.segmenter import Segmenter
from .device import describe

Logits = Callable[[Sample], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Accuracy:
    """Scores of one plan of one bundle on one dataset."""

    data: str
    protocol: str
    plan: str
    scenes: int
    overall: Scores
    families: dict[str, Scores]
    artefacts: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Plain data for JSON, with the machine it was measured on."""
        return asdict(self) | {"device": describe()}


def open_data(name: str, spec: PreprocessSpec, *, scenes: int | None = None) -> RefShapes:
    """The dataset that a name such as ``refshapes:test`` or ``refshapes-full:val`` stands for.

    RefShapes is rendered at the model's own size; ``scenes`` takes the first so many.
    """
    family, _, split = name.partition(":")
    difficulty = {"refshapes": "lite"} | {f"refshapes-{d}": d for d in DIFFICULTIES}
    if family not in difficulty or split not in SPLITS:
        raise DataError(
            "data-unknown",
            f"there is no dataset called {name!r}",
            why=f"known are {', '.join(difficulty)}, each with :{', :'.join(SPLITS)}",
            fix="for example refshapes:test",
        )
    return RefShapes(split, difficulty=difficulty[family], size=spec.height, scenes=scenes)


def evaluate(
    segmenter: Segmenter,
    data: str,
    *,
    protocol: str | None = None,
    scenes: int | None = None,
    progress: Callable[[Iterable[Sample]], Iterable[Sample]] = iter,
) -> Accuracy:
    """Score a segmenter; ``protocol`` None takes the bundle's own."""
    manifest = segmenter.manifest
    rules = protocol_named(protocol or manifest.protocol)
    samples = open_data(data, manifest.preprocess, scenes=scenes)
    overall, families = score(lambda s: logits_of(segmenter, s), progress(samples), rules)
    return Accuracy(
        data,
        rules.name,
        segmenter.plan,
        len(samples),
        overall,
        families,
        artefacts(segmenter),
    )


def artefacts(segmenter: Segmenter) -> dict[str, str]:
    """SHA-256 of each graph that ran, and of the checkpoint they were exported from."""
    manifest = segmenter.manifest
    graphs = segmenter.dialect.graphs
    hashes = {part: manifest.files[graph].sha256 for part, graph in graphs.items()}
    return hashes | {"checkpoint": str(manifest.provenance.get("checkpoint"))}


def logits_of(segmenter: Segmenter, sample: Sample) -> npt.NDArray[np.float32]:
    """[expressions, h, w] logits of a sample rendered at the model's size."""
    texts = [segmenter.text(segmenter.tokenize(e.text))[0] for e in sample.expressions]
    pixels = np.broadcast_to(sample.image[None], (len(texts), *sample.image.shape))
    return segmenter.logits(np.ascontiguousarray(pixels), texts)


def score(
    logits: Logits, samples: Iterable[Sample], protocol: Protocol
) -> tuple[Scores, dict[str, Scores]]:
    """Overall and per-family scores of anything that gives logits for a sample."""
    meter = Meter(protocol)
    for sample, found in _each(logits, samples):
        for expression, mask in zip(sample.expressions, found > 0, strict=True):
            meter.add(mask, sample.mask(expression), family=expression.family, things=sample.things)
    return meter.scores(), meter.by_family()


def _each(
    logits: Logits, samples: Iterable[Sample]
) -> Iterator[tuple[Sample, npt.NDArray[np.float32]]]:
    for sample in samples:
        yield sample, logits(sample)


def table(families: dict[str, Scores], overall: Scores) -> tuple[Sequence[str], list[list[str]]]:
    """Header and rows for people: one row per family, then all."""
    header = ("family", "n", "mIoU", "oIoU", "P@0.5", "P@0.7", "P@0.9", "object", "N-acc")
    rows = [_row(name, s) for name, s in (*families.items(), ("all", overall))]
    return header, rows


def _row(name: str, s: Scores) -> list[str]:
    precision = s.precision or (None,) * 5
    values = (s.miou, s.oiou, precision[0], precision[2], precision[4], s.object_accuracy, s.n_acc)
    return [name, str(s.count), *("-" if v is None else f"{v:.3f}" for v in values)]
