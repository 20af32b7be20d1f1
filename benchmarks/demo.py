"""What ``refedge demo`` shows: a gallery, and the bundle beside torch in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from ..data.protocols import Meter, protocol_named
from ..data.refshapes.dataset import RefShapes, Sample
from ..models.slvit import SLViT
from ..runtime.files import write_png
from ..runtime.segmenter import Segmenter
from .accuracy import artefacts
from .device import describe

Pixels: TypeAlias = npt.NDArray[np.uint8]
Ids: TypeAlias = npt.NDArray[np.int32]
Bools: TypeAlias = npt.NDArray[np.bool_]

_TILE = 192
_WARM_UP = 3


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
            truth = sample.mask(expression)
            union = np.count_nonzero(mask.array | truth)
            iou = np.count_nonzero(mask.array & truth) / union if union else 1.0
            draw.text((x + 3, y + _TILE + 1), _cut(expression.text), "black", font)
            draw.text((x + 3, y + _TILE + 14), f"{expression.family}, IoU {iou:.2f}", "gray", font)
    write_png(sheet, path)
    return path


@dataclass(frozen=True)
class SideBySide:
    """What torch and the bundle did on the same samples; a row each."""

    title: str
    header: tuple[str, ...]
    rows: list[list[str]]
    artefacts: dict[str, str]

    def record(self) -> dict[str, Any]:
        """Plain data for JSON, with the machine it was measured on."""
        return asdict(self) | {"device": describe()}


def side_by_side(
    model: SLViT,
    segmenter: Segmenter,
    scenes: int,
    progress: Callable[[Iterable[Sample]], Iterable[Sample]],
) -> SideBySide:
    """Score and time torch eager and the bundle on the same samples, turn by turn.

    Every expression is a batch of one and no cache is used, as for a stream of new requests.
    torch runs on one thread; load the segmenter with one as well.
    """
    samples = RefShapes("test", size=segmenter.manifest.preprocess.height, scenes=scenes)
    rules = protocol_named("refshapes")
    runs = {
        "torch eager fp32": _torch_run(model),
        f"onnxruntime {segmenter.plan}": _bundle_run(segmenter),
    }
    meters = {name: Meter(rules) for name in runs}
    count = 0
    for i, sample in enumerate(progress(samples)):
        count += len(sample.expressions)
        for expression in sample.expressions:
            tokens = segmenter.tokenize(expression.text)
            for name, run in runs.items():
                logits = run(sample.image[None], tokens.ids[None], tokens.words[None])
                meters[name].add(
                    logits[0] > 0,
                    sample.mask(expression),
                    family=expression.family,
                    things=sample.things,
                )
        if i == _WARM_UP:
            for run in runs.values():
                run.text_ms.clear()
                run.mask_ms.clear()
    shown = [f for f in samples.families if f != "none"]
    header = ("", "text p50 ms", "mask p50 ms", "mIoU", *shown, "object", "N-acc")
    rows = [
        [
            name,
            f"{_p50(run.text_ms):.2f}",
            f"{_p50(run.mask_ms):.2f}",
            *_scores(meters[name], shown),
        ]
        for name, run in runs.items()
    ]
    title = f"refshapes:test, {scenes} scenes, {count} expressions, batch 1"
    return SideBySide(title, header, rows, artefacts(segmenter))


class _Run:
    """Text part, then mask part, each timed."""

    def __init__(
        self,
        text: Callable[[Ids, Bools], Any],
        mask: Callable[[Pixels, Bools, Any], npt.NDArray[np.float32]],
    ) -> None:
        self._text, self._mask = text, mask
        self.text_ms: list[float] = []
        self.mask_ms: list[float] = []

    def __call__(self, pixels: Pixels, ids: Ids, words: Bools) -> npt.NDArray[np.float32]:
        started = time.perf_counter()
        products = self._text(ids, words)
        middle = time.perf_counter()
        logits = self._mask(pixels, words, products)
        self.text_ms.append((middle - started) * 1e3)
        self.mask_ms.append((time.perf_counter() - middle) * 1e3)
        return logits


def _torch_run(model: SLViT) -> _Run:
    torch.set_num_threads(1)
    model.eval()

    @torch.inference_mode()
    def text(ids: Ids, words: Bools) -> Any:
        return model.encode_text(torch.from_numpy(ids), torch.from_numpy(words))

    @torch.inference_mode()
    def mask(pixels: Pixels, words: Bools, products: Any) -> npt.NDArray[np.float32]:
        found = model.features(torch.from_numpy(pixels), torch.from_numpy(words), products)
        logits: npt.NDArray[np.float32] = model.decode(*found).numpy()
        return logits

    return _Run(text, mask)


def _bundle_run(segmenter: Segmenter) -> _Run:
    return _Run(segmenter.run_text, lambda pixels, _, text: segmenter.logits(pixels, [text]))


def _scores(meter: Meter, families: Sequence[str]) -> list[str]:
    overall, each = meter.scores(), meter.by_family()
    values = [overall.miou, *(each[f].miou for f in families)]
    values += [overall.object_accuracy, overall.n_acc]
    return ["-" if v is None else f"{v:.3f}" for v in values]


def _p50(values: list[float]) -> float:
    return statistics.median(values)


def _cut(text: str, limit: int = 36) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
