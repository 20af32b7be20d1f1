"""What ``refedge demo`` shows: a gallery, and the bundle beside torch in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from ..data.protocols import Meter, Scores, protocol_named
from ..data.refshapes.dataset import RefShapes, Sample
from ..models.slvit import SLViT
from ..runtime.files import write_png
from ..runtime.segmenter import Segmenter

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


def side_by_side(
    model: SLViT,
    segmenter: Segmenter,
    scenes: int,
    progress: Callable[[Iterable[Sample]], Iterable[Sample]],
) -> tuple[str, Sequence[str], list[list[str]]]:
    """Score and time torch eager and the bundle on the same samples, turn by turn.

    Every expression is a batch of one and no cache is used, as for a stream of new requests; both
    use the same number of threads.
    """
    samples = RefShapes("test", size=segmenter.manifest.preprocess.height, scenes=scenes)
    rules = protocol_named("refshapes")
    runs: dict[str, _Torch | _Bundle] = {
        "torch eager fp32": _Torch(model),
        f"onnxruntime {segmenter.plan}": _Bundle(segmenter),
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
    header = ("", "text p50 ms", "mask p50 ms", "mIoU", "oIoU", "object", "N-acc")
    rows = [
        [name, f"{_p50(run.text_ms):.2f}", f"{_p50(run.mask_ms):.2f}", *_scores(meters[name])]
        for name, run in runs.items()
    ]
    title = f"refshapes:test, {scenes} scenes, {count} expressions, batch 1, one thread"
    return title, header, rows


class _Torch:
    def __init__(self, model: SLViT) -> None:
        self._model = model.eval()
        self.text_ms: list[float] = []
        self.mask_ms: list[float] = []
        torch.set_num_threads(1)

    @torch.inference_mode()
    def __call__(
        self,
        pixels: npt.NDArray[np.uint8],
        ids: npt.NDArray[np.int32],
        words: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.float32]:
        valid = torch.from_numpy(words)
        started = time.perf_counter()
        products = self._model.encode_text(torch.from_numpy(ids), valid)
        middle = time.perf_counter()
        maps = self._model.features(torch.from_numpy(pixels), valid, products)
        logits: npt.NDArray[np.float32] = self._model.decode(*maps).numpy()
        self.text_ms.append((middle - started) * 1e3)
        self.mask_ms.append((time.perf_counter() - middle) * 1e3)
        return logits


class _Bundle:
    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self.text_ms: list[float] = []
        self.mask_ms: list[float] = []

    def __call__(
        self,
        pixels: npt.NDArray[np.uint8],
        ids: npt.NDArray[np.int32],
        words: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.float32]:
        started = time.perf_counter()
        text = self._segmenter.run_text(ids, words)
        middle = time.perf_counter()
        logits = self._segmenter.logits(pixels, [text])
        self.text_ms.append((middle - started) * 1e3)
        self.mask_ms.append((time.perf_counter() - middle) * 1e3)
        return logits


def _scores(meter: Meter) -> list[str]:
    s: Scores = meter.scores()
    values = (s.miou, s.oiou, s.object_accuracy, s.n_acc)
    return ["-" if v is None else f"{v:.3f}" for v in values]


def _p50(values: list[float]) -> float:
    return statistics.median(values)


def _cut(text: str, limit: int = 36) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
