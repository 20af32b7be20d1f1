"""``refedge eval``: what each plan of a bundle scores, and what it lost against fp32.

Against the truth under a named protocol, and as *agreement* with the fp32 plan: the IoU of the two
masks. Agreement sees damage that the score of a few hundred expressions cannot; the difference of
the scores comes with a paired 95 % interval, scenes being what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.items import Bools, Item, Items, Query
from ..data.protocols import Meter, Protocol, Scores
from ..errors import BackendError, DataError
from ..runtime.masks import iou, resize_logits
from ..runtime.plan import decode_plan
from ..runtime.segmenter import Segmenter, load
from .device import describe

SCHEMA = "refedge-accuracy-1"
REFERENCE = "fp32"
SHOWN = 6  # disagreements that are kept per plan
FLIP = 0.5
_NORMAL_95 = 1.959964

Scored = tuple[list[Bools], list[float]]  # masks and their IoUs with the truth


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """Masks of a plan against those of fp32.

    mean:   IoU of the two masks; two that both say "nothing there" agree.
    worst5: mean of the lowest five percent.
    flips:  share of expressions whose IoU with the truth is at least 0.5 under one plan only.
    """

    mean: float
    worst5: float
    flips: float


@dataclass(frozen=True)
class PlanAccuracy:
    """One plan: its scores, and what separates them from fp32's.

    ious:       one per expression, in the order of ``Accuracy.ids``.
    agreements: the same, against fp32's masks; empty for fp32 itself.
    artefacts:  SHA-256 of each graph that ran, and of the checkpoint.
    """

    plan: str
    dialect: str
    overall: Scores
    families: dict[str, Scores]
    ious: tuple[float, ...]
    artefacts: dict[str, str]
    agreements: tuple[float, ...] = ()
    agreement: Agreement | None = None
    miou_change: Interval | None = None


@dataclass(frozen=True)
class Disagreement:
    """An expression whose mask a plan has changed much.

    pixels: [h, w, 3] uint8 at the model's size; the masks are bool in the protocol's space.
    """

    plan: str
    id: str
    text: str
    family: str
    agreement: float
    iou_reference: float
    iou: float
    pixels: npt.NDArray[np.uint8]
    truth: Bools
    reference: Bools
    mask: Bools


@dataclass(frozen=True)
class Accuracy:
    """Plans of one bundle on one dataset.

    bundle: digest of its manifest; ids: the expressions that were scored, in order.
    worst:  the largest disagreements of each plan, the worst first; not in the JSON record.
    """

    model: str
    bundle: str
    data: str
    protocol: str
    scenes: int
    ids: tuple[str, ...]
    plans: tuple[PlanAccuracy, ...]
    worst: tuple[Disagreement, ...] = ()

    def record(self) -> dict[str, Any]:
        """Plain data for JSON, with the machine it was measured on."""
        plain = asdict(replace(self, worst=()))
        del plain["worst"]
        return {"schema": SCHEMA, **plain, "device": describe()}


def open_plans(
    path: Path, plans: Sequence[str], threads: int | None, backend: str = "auto"
) -> dict[str, Segmenter]:
    """Segmenters by plan, fp32 first: the named plans, or all that the bundle has.

    The reference runs where it can, whatever the backend of the others. On a board that has engines
    and no ONNX Runtime there may be none: then named plans are scored without one.
    """
    opened: dict[str, Segmenter] = {}
    try:
        opened[REFERENCE] = load(path, threads=threads)
    except BackendError as error:
        if error.code != "backend-missing" or not plans or REFERENCE in plans:
            raise
    wanted = plans or tuple(opened[REFERENCE].manifest.plans)
    for name in (name for name in wanted if name != REFERENCE):
        opened[name] = load(path, plan=name, threads=threads, backend=backend)
    return opened


def evaluate(
    segmenters: Mapping[str, Segmenter],
    items: Items,
    protocol: Protocol,
    data: str,
    *,
    progress: Callable[[Iterable[Item]], Iterable[Item]] = iter,
) -> Accuracy:
    """Score several plans on the same items; ``segmenters`` by plan, fp32 first if it is there.

    Raises DataError ``calibrate-overlap`` where a plan was calibrated on what is scored.
    """
    _refuse_overlap(segmenters, items)
    tallies = {name: _Tally(name, protocol) for name in segmenters}
    ids: list[str] = []
    for item in progress(items):
        ids += [q.id for q in item.queries]
        reference: Scored | None = None
        for name, segmenter in segmenters.items():
            masks = predict(segmenter, item, protocol)
            found = tallies[name].add(item, masks, reference)
            reference = (masks, found) if name == REFERENCE else reference
    plans = tuple(
        tallies[name].result(name, segmenter, tallies.get(REFERENCE))
        for name, segmenter in segmenters.items()
    )
    manifest = next(iter(segmenters.values())).manifest
    worst = tuple(d for tally in tallies.values() for d in tally.worst)
    return Accuracy(
        manifest.model,
        manifest.digest,
        data,
        protocol.name,
        len(items),
        tuple(ids),
        plans,
        worst,
    )


def predict(segmenter: Segmenter, item: Item, protocol: Protocol) -> list[Bools]:
    """Masks of an item's queries in the protocol's space."""
    found = logits_of(segmenter, item.pixels, [q.text for q in item.queries])
    return [protocol.predicted(resize_logits(one, item.size, item.frame)) for one in found]


def logits_of(
    segmenter: Segmenter, pixels: npt.NDArray[np.uint8], texts: list[str]
) -> npt.NDArray[np.float32]:
    """[expressions, h, w] logits of several expressions about one picture at the model's size."""
    products = [segmenter.text(segmenter.tokenize(t))[0] for t in texts]
    return segmenter.logits(segmenter.image(pixels[None]), products)


def artefacts(segmenter: Segmenter) -> dict[str, str]:
    """SHA-256 of each graph that ran, and of the checkpoint they were exported from."""
    files = segmenter.manifest.files
    hashes = {part: files[graph].sha256 for part, graph in segmenter.dialect.graphs.items()}
    return hashes | {"checkpoint": str(segmenter.manifest.provenance.get("checkpoint"))}


class _Tally:
    """What one plan did, item by item."""

    def __init__(self, plan: str, protocol: Protocol) -> None:
        self._plan = plan
        self._protocol = protocol
        self._meter = Meter(protocol)
        self.worst: list[Disagreement] = []
        self._agreement: list[float] = []
        self._scenes: list[list[float]] = []

    def add(self, item: Item, masks: list[Bools], reference: Scored | None) -> list[float]:
        """Score an item's masks; returns their IoUs."""
        found = []
        for query, mask in zip(item.queries, masks, strict=True):
            score = self._meter.add(
                mask, query.truth, family=query.family, things=item.things, target=query.target
            )
            found.append(score)
        self._scenes.append(
            [i for i, q in zip(found, item.queries, strict=True) if self._counts(q)]
        )
        if reference is not None:
            self._compare(item, masks, found, *reference)
        return found

    def _compare(
        self,
        item: Item,
        masks: list[Bools],
        ious: list[float],
        reference: list[Bools],
        reference_ious: list[float],
    ) -> None:
        for i, query in enumerate(item.queries):
            agreement = self._agree(masks[i], reference[i])
            self._agreement.append(agreement)
            if len(self.worst) < SHOWN or agreement < self.worst[-1].agreement:
                found = Disagreement(
                    self._plan,
                    query.id,
                    query.text,
                    query.family,
                    agreement,
                    reference_ious[i],
                    ious[i],
                    item.pixels,
                    query.truth,
                    reference[i],
                    masks[i],
                )
                self.worst = sorted([*self.worst, found], key=lambda d: d.agreement)[:SHOWN]

    def result(self, plan: str, segmenter: Segmenter, reference: _Tally | None) -> PlanAccuracy:
        agreement, change = None, None
        if reference is not None and reference is not self:
            ordered = np.sort(self._agreement)
            lowest = ordered[: max(1, len(ordered) // 20)]
            ours, theirs = np.array(self._meter.ious), np.array(reference._meter.ious)
            flips = float(np.mean((ours >= FLIP) != (theirs >= FLIP)))
            agreement = Agreement(float(ordered.mean()), float(lowest.mean()), flips)
            change = paired_change(self._scenes, reference._scenes)
        return PlanAccuracy(
            plan,
            segmenter.dialect.name,
            self._meter.scores(),
            self._meter.by_family(),
            tuple(round(i, 5) for i in self._meter.ious),
            artefacts(segmenter),
            tuple(round(a, 5) for a in self._agreement),
            agreement,
            change,
        )

    def _counts(self, query: Query) -> bool:
        return query.target or self._protocol.absent != "apart"

    def _agree(self, a: Bools, b: Bools) -> float:
        least = (self._protocol.no_target or 0.0) * a.size
        if np.count_nonzero(a) < least and np.count_nonzero(b) < least:
            return 1.0
        return iou(a, b)


def paired_change(ours: list[list[float]], theirs: list[list[float]]) -> Interval:
    """Difference of two means of IoUs over the same expressions, with a 95 % interval.

    Expressions of one scene are not independent, so scenes are the units: the interval is that of a
    ratio of scene totals (cluster-robust, normal approximation).
    """
    sums = np.array([sum(a) - sum(b) for a, b in zip(ours, theirs, strict=True)])
    counts = np.array([len(a) for a in ours], np.float64)
    total = max(counts.sum(), 1.0)
    mean = float(sums.sum() / total)
    residuals = sums - mean * counts
    n = max(len(sums), 2)
    error = float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / total)
    return Interval(mean, mean - _NORMAL_95 * error, mean + _NORMAL_95 * error)


def _refuse_overlap(segmenters: Mapping[str, Segmenter], items: Items) -> None:
    calibrated: dict[str, str] = {}
    for name, segmenter in segmenters.items():
        file = segmenter.manifest.plans.get(name)
        if file is None:
            continue
        plan = decode_plan(segmenter.bundle.file(file).read_bytes())
        if plan.calibration is not None:
            calibrated |= dict.fromkeys(plan.calibration.ids, name)
    overlap = items.ids().intersection(calibrated)
    if overlap:
        some = sorted(overlap)[0]
        raise DataError(
            "calibrate-overlap",
            f"the plan {calibrated[some]!r} was calibrated on {len(overlap)} of these expressions",
            why=f"{some} is one of them; scores on calibration samples are no proof",
            fix="evaluate on another split",
        )


def table(accuracy: Accuracy) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows for people: one row per plan and family."""
    header = ("plan", "family", "n", "mIoU", "oIoU", "P@0.5", "P@0.7", "P@0.9", "object", "N-acc")
    rows = []
    for plan in accuracy.plans:
        for family, s in (*plan.families.items(), ("all", plan.overall)):
            rows.append([plan.plan if family == "all" else "", family, *_cells(s)])
    return header, rows


def changes(accuracy: Accuracy) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows for people: what each plan lost against fp32."""
    header = ("plan", "agreement", "worst 5 %", "flips", "mIoU change", "95 %")
    rows = []
    for plan in accuracy.plans:
        a, c = plan.agreement, plan.miou_change
        if a is not None and c is not None:
            rows.append(
                [
                    plan.plan,
                    f"{a.mean:.4f}",
                    f"{a.worst5:.3f}",
                    f"{100 * a.flips:.1f} %",
                    f"{c.mean:+.4f}",
                    f"{c.low:+.4f} … {c.high:+.4f}",
                ]
            )
    return header, rows


def _cells(s: Scores) -> list[str]:
    precision = s.precision or (None,) * 5
    values = (s.miou, s.oiou, precision[0], precision[2], precision[4], s.object_accuracy, s.n_acc)
    return [str(s.count), *("-" if v is None else f"{v:.3f}" for v in values)]
