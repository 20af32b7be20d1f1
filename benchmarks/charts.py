"""Charts of the report: SVG text to be put into a page, the same bytes for the same numbers.

Words stay words, in the page's own font. Ink, grid and paper are CSS variables, so a chart follows
the page into the dark; what tells two things apart is never colour alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID, PAPER, ACCENT = "#1b1f25", "#5d6672", "#dde1e7", "#fffffd", "#0b62b1"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "paper", ACCENT: "accent"}
# stage: colour and hatch; the colours are Okabe and Ito's
STAGES = {
    "preprocess": ("#9aa3ad", ""),
    "tokenize": ("#e69f00", "||"),
    "text": ("#56b4e9", "//"),
    "image": ("#009e73", "\\\\"),
    "mask": ("#0072b2", ""),
    "postprocess": ("#cc79a7", "--"),
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib; only its widths are used
    "font.size": 11.5,
    "text.parse_math": False,  # a plan may be called $x$
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "hatch.color": PAPER,
    "hatch.linewidth": 0.8,
}
_LABEL = 14.0  # points from one label to the next
_LONGEST = 24  # characters of a name that a chart has room for; the tables have all
_ABOVE = 10.0  # points from a marker up to its label


@dataclass(frozen=True)
class Point:
    """A contestant of the Pareto chart.

    ms:        p50 of an expression that is new, end to end.
    low, high: 95 % limits of mIoU, from the paired change against fp32; None for fp32 itself.
    borrowed:  the mIoU is that of another contestant with the same weights.
    """

    name: str
    ms: float
    miou: float
    low: float | None = None
    high: float | None = None
    borrowed: bool = False


@dataclass(frozen=True)
class Bar:
    """A contestant's stages, p50 in ms each, and p50 end to end if it was taken."""

    name: str
    stages: dict[str, float]
    total: float | None


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in time without losing accuracy; the fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.ms, -p.miou)):
        if not best or point.miou > best[-1].miou:
            best.append(point)
    return best


def pareto(points: Sequence[Point]) -> str:
    """Accuracy over time; the front as a stepped line, what lies behind it hollow."""
    leading = front(points)
    with rc_context(_STYLE):
        figure, axes = _figure(440, 320, left=0.145, bottom=0.15)
        right = 1.12 * max(p.ms for p in points)
        lows = [p.miou if p.low is None else p.low for p in points]
        highs = [p.miou if p.high is None else p.high for p in points]
        margin = max(0.01, 0.2 * (max(highs) - min(lows)))
        axes.set_xlim(0, right)
        axes.set_ylim(min(lows) - margin, max(highs) + margin)
        axes.grid(True)
        axes.set_axisbelow(True)
        steps = [(p.ms, p.miou) for p in leading] + [(right, leading[-1].miou)]
        axes.step(*zip(*steps, strict=True), where="post", color=ACCENT, linewidth=1.4, alpha=0.6)
        for p in points:
            if p.low is not None and p.high is not None:
                axes.plot([p.ms, p.ms], [p.low, p.high], color=MUTED, linewidth=1.2)
            axes.plot(
                [p.ms],
                [p.miou],
                marker="s" if p.borrowed else "o",
                markersize=8,
                color=ACCENT if p in leading else PAPER,
                markeredgecolor=ACCENT if p in leading else MUTED,
                markeredgewidth=1.6,
                linestyle="none",
                zorder=4,  # above the names, which have a rim of paper
            )
        _label(axes, points, right)
        axes.set_xlabel("ms per new expression, p50")
        axes.set_ylabel("mIoU")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        return _svg(figure, "pareto", f"mIoU over milliseconds of {_names(points)}")


def stages(bars: Sequence[Bar]) -> str:
    """Stage p50 of each contestant, stacked; a tick marks what end to end took."""
    with rc_context(_STYLE):
        height = 92 + 46 * len(bars)
        figure, axes = _figure(440, height, left=0.02, bottom=44 / height, top=1 - 50 / height)
        for row, bar in enumerate(bars):
            start = 0.0
            for stage, ms in bar.stages.items():
                colour, hatch = STAGES.get(stage, (MUTED, ""))
                axes.barh(
                    row, ms, 0.42, start, color=colour, edgecolor=PAPER, hatch=hatch, linewidth=0
                )
                start += ms
            if bar.total is not None:
                axes.plot([bar.total] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1.8)
            axes.annotate(
                f"{_short(bar.name)} · {start:.1f} ms",
                (0, row - 0.32),
                xytext=(1, 1),
                textcoords="offset points",
                va="bottom",
            )
        axes.set_xlim(0, None)
        axes.set_ylim(len(bars) - 0.6, -0.85)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("ms, p50")
        shown = [s for s in STAGES if any(s in bar.stages for bar in bars)]
        swatches = [
            Patch(facecolor=colour, edgecolor=PAPER, hatch=hatch, linewidth=0)
            for colour, hatch in (STAGES[s] for s in shown)
        ]
        figure.legend(
            swatches,
            shown,
            loc="upper left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=3,
            frameon=False,
            handlelength=1.4,
            columnspacing=1.2,
            borderaxespad=0.0,
        )
        return _svg(figure, "stages", f"stage times of {_names(bars)}")


def distribution(name: str, ious: Sequence[float], reference: Sequence[float] | None) -> str:
    """Share of expressions that reach an IoU, over that IoU; the reference dashed behind it."""
    at = np.linspace(0.0, 1.0, 101)
    with rc_context(_STYLE):
        figure, axes = _figure(300, 210, left=0.15, bottom=0.2)
        axes.grid(True)
        axes.set_axisbelow(True)
        if reference is not None:
            share = _reaching(reference, at)
            axes.plot(at, share, color=MUTED, linewidth=1.6, linestyle=(0, (4, 2.5)))
        axes.plot(at, _reaching(ious, at), color=ACCENT, linewidth=2.0)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        axes.set_xlabel("IoU of at least")
        return _svg(figure, f"ious {name}", f"share of expressions by IoU, {name}")


def _reaching(ious: Sequence[float], at: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    ordered = np.sort(np.asarray(ious))
    share: npt.NDArray[np.float64] = 1.0 - np.searchsorted(ordered, at, side="left") / len(ordered)
    return share


def _label(axes: Axes, points: Sequence[Point], right: float) -> None:
    """Names beside the points, moved up where two would touch."""
    taken: list[tuple[float, float]] = []
    to_points = axes.transData.transform
    for p in sorted(points, key=lambda p: p.miou):
        x, y = to_points((p.ms, p.miou))
        wanted = y + _ABOVE
        for other_x, other_y in sorted(taken, key=lambda t: t[1]):
            if abs(other_x - x) < 120 and abs(other_y - wanted) < _LABEL:
                wanted = other_y + _LABEL
        taken.append((x, wanted))
        left = p.ms > 0.62 * right
        axes.annotate(
            _short(p.name),
            (p.ms, p.miou),
            xytext=(-6 if left else 6, wanted - y),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
        )


def _figure(
    width: int, height: int, *, left: float, bottom: float, top: float = 0.97
) -> tuple[Figure, Axes]:
    """An empty chart of so many points, which are the units of its SVG."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes((left, bottom, 0.97 - left, top - bottom))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    return figure, axes


def _svg(figure: Figure, salt: str, label: str) -> str:
    """The figure as an ``svg`` element that scales, has a name, and shares no id with another."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    start = text.index("<svg")
    body = text[text.index(">", start) + 1 :].strip()
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.S)  # it would style the page
    used = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", body)
    body = body.replace(" font-family: 'DejaVu Sans';", "")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}"'
        f' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">\n{body}'
    )


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def _names(things: Sequence[Point] | Sequence[Bar]) -> str:
    return ", ".join(t.name for t in things)
