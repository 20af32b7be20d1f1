"""``refedge eval --report``: one HTML page with everything that was measured of a bundle.

The page asks the network for nothing: style, charts and pictures are in it. Every number is one of
the records'; what they lack is said. The same records on the same machine give the same bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..data.protocols import Scores
from ..runtime.files import write_atomically
from ..runtime.masks import Bools, overlay
from .accuracy import REFERENCE, Accuracy, Disagreement, PlanAccuracy
from .bench import Bench, Contestant, Series
from .device import describe

_SIDE = 288  # pixels of a picture's longer side in the gallery, at most
_DASH = "–"


@dataclass(frozen=True)
class Line:
    """A row of the headline table: a plan, what ran it, or both.

    faster:   how many times the uncached p50 is shorter than PyTorch's.
    borrowed: the accuracy is that of fp32, whose checkpoint this contestant ran.
    """

    name: str
    dialect: str
    accuracy: PlanAccuracy | None
    speed: Contestant | None
    faster: float | None
    borrowed: bool = False


@dataclass(frozen=True)
class Shown:
    """A disagreement for the gallery; the pictures are data URIs."""

    found: Disagreement
    truth: str
    reference: str
    mask: str


@dataclass(frozen=True)
class Charts:
    """SVG elements; None or empty where nothing was measured."""

    pareto: str | None
    stages: str | None
    distributions: tuple[tuple[PlanAccuracy, str], ...]


def write_report(path: Path, accuracy: Accuracy, bench: Bench | None) -> None:
    """Write the page; ``bench`` adds time and memory of the same bundle."""
    write_atomically(path, page(accuracy, bench).encode())


def page(accuracy: Accuracy, bench: Bench | None) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": _number,
        "signed": _signed,
        "percent": _percent,
        "megabytes": _megabytes,
        "plain": _plain,
    }
    template = environment.from_string(
        files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    )
    lines = headline(accuracy, bench)
    return template.render(
        accuracy=accuracy,
        bench=bench,
        lines=lines,
        torch=None if bench is None else _torch(bench),
        missing=list(missing(accuracy, bench, lines)),
        stages=[] if bench is None else list(dict.fromkeys(_stages(bench))),
        unstable=[] if bench is None else list(_unstable(bench)),
        charts=_charts(accuracy, bench, lines),
        families=_families(accuracy),
        giou=any(p.overall.giou is not None for p in accuracy.plans),
        gallery=[(p, _gallery(accuracy, p.plan)) for p in accuracy.plans if p.plan != REFERENCE],
        reference=REFERENCE,
        device=describe(),
    )


def headline(accuracy: Accuracy, bench: Bench | None) -> list[Line]:
    """A line per plan and contestant: the plans first, then what only the bench knows."""
    lines: list[Line] = []
    found: list[Contestant] = []
    contestants = () if bench is None else bench.contestants
    baseline = None if bench is None else _torch(bench)
    for plan in accuracy.plans:
        runs = [c for c in contestants if _ran(c, plan)]
        found += runs
        lines += [
            Line(plan.plan, plan.dialect, plan, run, _faster(run, baseline)) for run in runs
        ] or [Line(plan.plan, plan.dialect, plan, None, None)]
    for run in contestants:
        if run not in found:
            source = _reference(accuracy) if _is_torch(run) else None
            same = source is not None and _same_checkpoint(run, source)
            lines.append(
                Line(
                    run.name,
                    run.dialect,
                    source if same else None,
                    run,
                    _faster(run, baseline),
                    same,
                )
            )
    return lines


def missing(accuracy: Accuracy, bench: Bench | None, lines: Sequence[Line]) -> Iterator[str]:
    """What the page lacks, and why."""
    if _reference(accuracy) is None:
        yield "agreement and change of mIoU: the fp32 plan was not among those that were scored"
    elif len(accuracy.plans) == 1:
        yield "agreement and change of mIoU: fp32 is the only plan"
    if bench is None:
        yield "time, memory and file size: no result of bench was given"
        return
    if bench.bundle != accuracy.bundle:
        yield (
            f"time of this very bundle: the result of bench is of the bundle {bench.bundle}; a run"
            " stands beside a plan only where the hashes of their files are the same"
        )
    if _torch(bench) is None:
        yield "speed against PyTorch: the result of bench has no run of it"
    for line in lines:
        if line.speed is None:
            yield f"time and memory of {line.name}: bench has no run of that name and those files"
        elif line.accuracy is None:
            yield f"accuracy of {line.name}: it was timed, but no plan with its files was scored"


def _charts(accuracy: Accuracy, bench: Bench | None, lines: Sequence[Line]) -> Charts:
    """Everything that matplotlib draws."""
    from markupsafe import Markup

    from .charts import Bar, Point, distribution, pareto, stages

    points = []
    for line in lines:
        ms = _p50(line.speed, "uncached")
        if line.accuracy is not None and line.accuracy.overall.miou is not None and ms is not None:
            miou, change = line.accuracy.overall.miou, line.accuracy.miou_change
            low = None if change is None else miou - change.mean + change.low
            high = None if change is None else miou - change.mean + change.high
            points.append(Point(line.name, ms, miou, low, high, line.borrowed))
    bars = [
        Bar(line.name, {k: s.p50 for k, s in line.speed.stages.items()}, _p50(line.speed))
        for line in lines
        if line.speed is not None and line.speed.stages
    ]
    reference = _reference(accuracy)
    return Charts(
        Markup(pareto(points)) if points else None,
        Markup(stages(bars)) if bars else None,
        tuple(
            (p, Markup(distribution(p.plan, p.ious, _behind(p, reference))))
            for p in accuracy.plans
            if p.ious
        ),
    )


def _behind(plan: PlanAccuracy, reference: PlanAccuracy | None) -> tuple[float, ...] | None:
    return None if reference is None or reference is plan else reference.ious


def _families(accuracy: Accuracy) -> list[tuple[str, list[tuple[str, Scores]]]]:
    """Per family, then over all: the scores of each plan."""
    names = dict.fromkeys(f for p in accuracy.plans for f in p.families)
    each = [
        (name, [(p.plan, p.families[name]) for p in accuracy.plans if name in p.families])
        for name in names
    ]
    return [*each, ("all", [(p.plan, p.overall) for p in accuracy.plans])]


def _gallery(accuracy: Accuracy, plan: str) -> list[Shown]:
    found = [d for d in accuracy.worst if d.plan == plan and d.agreement < 1.0]
    return [
        Shown(
            d,
            _uri(outlined(_picture(d), _resized(d.truth))),
            _uri(overlay(_picture(d), _resized(d.reference))),
            _uri(overlay(_picture(d), _resized(d.mask))),
        )
        for d in found
    ]


def outlined(image: Image.Image, mask: Bools) -> Image.Image:
    """The picture as it is, the mask's edge white with a black line around it."""
    pixels = np.array(image)
    pixels[mask & _grown(~mask, 2)] = 255
    pixels[_grown(mask, 1) & ~mask] = 0
    return Image.fromarray(pixels)


def _grown(mask: Bools, by: int) -> Bools:
    """The mask and the pixels beside it, several times over."""
    for _ in range(by):
        p = np.pad(mask, 1)
        mask = p[1:-1, 1:-1] | p[:-2, 1:-1] | p[2:, 1:-1] | p[1:-1, :-2] | p[1:-1, 2:]
    return mask


def _picture(found: Disagreement) -> Image.Image:
    """The picture in the shape of its masks, which may be in the photo's own space."""
    height, width = found.truth.shape
    image = Image.fromarray(found.pixels)
    if image.size == (width, height):
        return Image.fromarray(_resized(found.pixels))
    shape = _resized(found.truth).shape
    return image.resize(shape[::-1], Image.Resampling.BILINEAR)


def _resized(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Small ones repeated a whole number of times, large ones thinned; [H, W] or [H, W, 3]."""
    longer = max(pixels.shape[:2])
    if longer <= _SIDE:
        times = _SIDE // longer
        return pixels.repeat(times, axis=0).repeat(times, axis=1)
    rows, columns = (
        np.linspace(0, n - 1, max(1, n * _SIDE // longer)).astype(int) for n in pixels.shape[:2]
    )
    thinned: npt.NDArray[Any] = pixels[rows][:, columns]
    return thinned


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _reference(accuracy: Accuracy) -> PlanAccuracy | None:
    return next((p for p in accuracy.plans if p.plan == REFERENCE), None)


def _is_torch(contestant: Contestant) -> bool:
    return contestant.backend == "torch"


def _torch(bench: Bench) -> Contestant | None:
    return next((c for c in bench.contestants if _is_torch(c)), None)


def _ran(contestant: Contestant, plan: PlanAccuracy) -> bool:
    """Whether it ran the files of that plan: by name, and by the hashes that both have."""
    if _is_torch(contestant) or contestant.name != plan.plan:
        return False
    common = contestant.artefacts.keys() & plan.artefacts.keys()
    return bool(common) and all(contestant.artefacts[k] == plan.artefacts[k] for k in common)


def _same_checkpoint(contestant: Contestant, plan: PlanAccuracy) -> bool:
    """By hash; weights that were seeded have none."""
    ours = contestant.artefacts.get("checkpoint", "none")
    return not ours.lower().startswith("none") and ours == plan.artefacts.get("checkpoint")


def _p50(contestant: Contestant | None, kind: str = "uncached") -> float | None:
    series = None if contestant is None else contestant.end_to_end.get(kind)
    return None if series is None else series.p50


def _faster(contestant: Contestant, baseline: Contestant | None) -> float | None:
    ours, theirs = _p50(contestant), _p50(baseline)
    return theirs / ours if ours and theirs else None


def _stages(bench: Bench) -> Iterator[str]:
    for contestant in bench.contestants:
        yield from contestant.stages


def _unstable(bench: Bench) -> Iterator[str]:
    for c in bench.contestants:
        series: dict[str, Series] = {**c.stages, **c.end_to_end}
        names = [name for name, s in series.items() if s.unstable]
        if names:
            yield f"{c.name}: {', '.join(names)}"


def _number(value: float | None, digits: int = 3) -> str:
    return _DASH if value is None else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int = 4) -> str:
    if value is None:
        return _DASH
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def _percent(value: float | None) -> str:
    return _DASH if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _megabytes(value: float | None) -> str:
    return _DASH if value is None else f"{value / 1e6:.1f}"


def _plain(value: Any) -> str:
    """A setting or a fact about the machine, for people."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items()) or _DASH
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value) or _DASH
    return _DASH if value is None or value == "" else str(value)
