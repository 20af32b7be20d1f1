"""What ``refedge demo`` shows: a gallery, and one table of torch and every plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..data.items import Item, Items
from ..data.protocols import Meter, Protocol, Scores
from ..data.refshapes.dataset import RefShapes
from ..runtime.files import write_png
from ..runtime.masks import iou
from ..runtime.segmenter import Segmenter
from .accuracy import Accuracy
from .bench import Bench
from .contestants import TORCH, Original, TorchRunner, torch_threads
from .timing import CACHED, UNCACHED

_TILE = 192
HEADER = (
    "",
    "mIoU",
    "agreement",
    "worst 5 %",
    "new ms",
    "cached ms",
    "vs torch",
    "file MB",
    "peak MB",
)


def gallery(segmenter: Segmenter, path: Path, scenes: int = 4) -> Path:
    """Paint masks of the first test scenes: one row per scene, one column per expression.

    Pictures are rendered larger than the model's input, so that the runtime resizes both ways.
    """
    samples = list(RefShapes("test", size=_TILE, scenes=scenes))
    columns = len(samples[0].expressions)
    caption = 30
    sheet = Image.new("RGB", (columns * _TILE, scenes * (_TILE + caption)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, sample in enumerate(samples):
        masks = segmenter.scene(sample.image).segment([e.text for e in sample.expressions])
        for column, (mask, expression) in enumerate(zip(masks, sample.expressions, strict=True)):
            x, y = column * _TILE, row * (_TILE + caption)
            sheet.paste(mask.overlay(), (x, y))
            said = f"{expression.family}, IoU {iou(mask.array, sample.mask(expression)):.2f}"
            draw.text((x + 3, y + _TILE + 1), _cut(expression.text), "black", font)
            draw.text((x + 3, y + _TILE + 14), said, "gray", font)
    write_png(sheet, path)
    return path


@dataclass(frozen=True)
class Demo:
    """One table, and what it was made from."""

    title: str
    header: tuple[str, ...]
    rows: list[list[str]]
    artefacts: dict[str, dict[str, str]]
    device: dict[str, Any]


def torch_scores(
    original: Original,
    segmenter: Segmenter,
    items: Items,
    protocol: Protocol,
    progress: Callable[[Iterable[Item]], Iterable[Item]] = iter,
) -> Scores:
    """Scores of PyTorch eager on the same items; pixels and tokens are the segmenter's."""
    meter = Meter(protocol)
    runner = TorchRunner(original.loaded, segmenter.bundle)
    with torch_threads(1):
        for item in progress(items):
            for query in item.queries:
                tokens = runner.tokenize(query.text)
                features = runner.image(item.pixels)
                logits = runner.mask(features, tokens, runner.text(tokens))
                meter.add(
                    protocol.predicted(logits),
                    query.truth,
                    family=query.family,
                    things=item.things,
                    target=query.target,
                )
    return meter.scores()


def summary(accuracy: Accuracy, bench: Bench, torch: Scores) -> Demo:
    """The table: a row for torch and each plan, accuracy and speed of the same artefacts."""
    plans = {p.plan: p for p in accuracy.plans}
    base = next(c for c in bench.contestants if c.name == TORCH).end_to_end[UNCACHED].p50
    rows, artefacts = [], {}
    for contestant in bench.contestants:
        plan = plans.get(contestant.name)
        scores = torch if plan is None else plan.overall
        agreement = None if plan is None else plan.agreement
        new = contestant.end_to_end[UNCACHED].p50
        artefacts[contestant.name] = contestant.artefacts
        rows.append(
            [
                "torch fp32" if plan is None else contestant.name,
                f"{scores.miou:.3f}",
                "-" if agreement is None else f"{agreement.mean:.3f}",
                "-" if agreement is None else f"{agreement.worst5:.3f}",
                f"{new:.1f}",
                f"{contestant.end_to_end[CACHED].p50:.1f}",
                f"{base / new:.2f}",
                f"{contestant.file_bytes / 1e6:.2f}",
                f"{contestant.peak_rss / 1e6:.0f}",
            ]
        )
    title = (
        f"{accuracy.data}, {accuracy.scenes} scenes, {len(accuracy.ids)} expressions; "
        f"p50 of {bench.settings['rounds']} rounds, batch 1, {bench.settings['threads']} thread"
    )
    return Demo(title, HEADER, rows, artefacts, bench.device)


def _cut(text: str, limit: int = 36) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
