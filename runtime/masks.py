"""Logits to a mask, and a mask to what people want of it: array, RLE, picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from .manifest import PostprocessSpec

Bools = npt.NDArray[np.bool_]
Frame: TypeAlias = tuple[int, int, int, int]
_OUTLINE = (255, 64, 32)


@dataclass(frozen=True)
class Timings:
    """Milliseconds per stage; ``text`` is 0 where the expression was cached.

    image: of the image part, 0 in a model without one.
    """

    preprocess: float
    tokenize: float
    text: float
    image: float
    mask: float
    postprocess: float
    text_cached: bool

    @property
    def total(self) -> float:
        """All stages."""
        stages = (self.tokenize, self.text, self.image, self.mask, self.postprocess)
        return self.preprocess + sum(stages)


@dataclass(frozen=True)
class Mask:
    """What one expression means in one picture.

    array:   [H, W] bool at the picture's size.
    score:   mean probability of the mask's pixels, 0 where the mask is empty.
    logits:  [h, w] float32 at the model's size.
    """

    expression: str
    array: Bools
    score: float
    logits: npt.NDArray[np.float32]
    image: Image.Image
    timings: Timings

    def rle(self) -> dict[str, Any]:
        """COCO run-length encoding: ``{"size": [H, W], "counts": str}``."""
        return encode_rle(self.array)

    def overlay(self) -> Image.Image:
        """The picture with everything but the mask dimmed, and the mask outlined."""
        return overlay(self.image, self.array)


def to_mask(
    logits: npt.NDArray[np.float32],
    size: tuple[int, int],
    spec: PostprocessSpec,
    frame: Frame | None = None,
) -> tuple[Bools, float]:
    """Logits [h, w] to a mask at ``size`` (width, height) and its score.

    frame: where the picture lies in the logits; None for all of them.
    """
    resized = resize_logits(logits, size, frame)
    mask = resized > spec.threshold
    if not mask.any():
        return mask, 0.0
    return mask, float(np.mean(1.0 / (1.0 + np.exp(-resized[mask].astype(np.float64)))))


def iou(a: Bools, b: Bools) -> float:
    """Intersection over union of two masks; 1 where both are empty."""
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 1.0


def resize_logits(
    logits: npt.NDArray[np.float32], size: tuple[int, int], frame: Frame | None = None
) -> npt.NDArray[np.float32]:
    """Logits [h, w] at another size (width, height), bilinearly; unchanged at their own.

    frame: left, top, right, bottom of what is resized; None for all.
    """
    if frame is not None:
        left, top, right, bottom = frame
        logits = np.ascontiguousarray(logits[top:bottom, left:right])
    if size == logits.shape[::-1]:
        return logits
    scaled = Image.fromarray(logits).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(scaled, np.float32)


def overlay(image: Image.Image, mask: Bools) -> Image.Image:
    """Keep the mask's pixels, outline them, and dim the rest to a dark grey of itself.

    Works on any colour of thing; the outline is about half a percent of the picture wide.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    out = np.where(mask[:, :, None], pixels, 0.25 * pixels + 0.25 * grey)
    inner = mask
    for _ in range(max(1, min(mask.shape) // 200)):
        inner = _erode(inner)
    out[mask & ~inner] = _OUTLINE
    return Image.fromarray(out.astype(np.uint8))


def _erode(mask: Bools) -> Bools:
    """Drop the pixels that have a neighbour outside."""
    p = np.pad(mask, 1)
    inner: Bools = mask & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    return inner


def encode_rle(mask: Bools) -> dict[str, Any]:
    """COCO's compressed run-length encoding of a [H, W] mask.

    Runs go down the columns and start with zeros. From the fourth on, a run is written as its
    difference to the run two before, in groups of 5 bits plus a continue bit, offset by 48
    (``maskApi.c`` of pycocotools).
    """
    flat = np.concatenate(([False], mask.ravel(order="F"), [False]))
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    ends = edges if edges.size and edges[-1] == mask.size else np.append(edges, mask.size)
    runs = np.diff(ends, prepend=0).tolist()
    out = bytearray()
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            out.append(48 + bits + (32 if more else 0))
    return {"size": list(mask.shape), "counts": out.decode("ascii")}
