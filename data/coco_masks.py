"""COCO's outlines to masks, by the library that published numbers were made with.

pycocotools traces polygons at a fifth of a pixel, so its masks differ by boundary pixels from
those of any other rasteriser. It trusts its input: an outline far out of the picture allocates
without bound, and a run-length code that is too short yields memory that nobody wrote. Both are
refused here.
"""

from __future__ import annotations

from types import ModuleType

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .files import corrupt, parse_json
from .referral import Bools

Plane = npt.NDArray[np.uint8]

OVERLAPS = ("any", "eq1")

# of a polygon's flat [x0, y0, x1, y1, ...]; annotators' tools left a few shorter ones in COCO
_CORNERS = 6
_CODE = range(48, 48 + 64)


class _Rle(msgspec.Struct, frozen=True):
    """Run lengths down the columns, starting with zeros; a string is COCO's compressed form."""

    size: tuple[int, int]
    counts: str | list[int]


_Segmentation = list[list[float] | _Rle] | _Rle


def pycocotools() -> ModuleType:
    """``pycocotools.mask``, imported when it is needed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError(
            "package-missing",
            "pycocotools is not installed",
            why="the masks of COCO datasets are decoded by it, as in the published evaluations",
            fix="pip install pycocotools",
        ) from error
    found: ModuleType = mask
    return found


def decode(segmentation: bytes, width: int, height: int, overlap: str, name: str) -> Bools:
    """[height, width] bool of one annotation.

    segmentation: JSON of a list of polygons, a list of RLE records, or one RLE record.
    overlap:      ``any``: pixels that at least one part covers; ``eq1``: that exactly one covers,
                  which is what the public code of LAVT and SLViT keeps.
    name:         of the annotation, for errors.
    """
    found = parse_json(segmentation, _Segmentation, name)
    parts: list[list[float] | _Rle] = [found] if isinstance(found, _Rle) else found
    parts = [p for p in parts if isinstance(p, _Rle) or len(p) >= _CORNERS]
    if not parts:
        raise corrupt(name, "it has no outline of three points or more", "leave this object out")
    covered = np.zeros((height, width), np.int32)
    for part in parts:
        if isinstance(part, _Rle):
            covered += _decode_runs(part, width, height, name)
        else:
            covered += _fill(part, width, height, name)
    return covered == 1 if overlap == "eq1" else covered > 0


def _fill(points: list[float], width: int, height: int, name: str) -> Plane:
    """A polygon's pixels."""
    reach = max(width, height)
    if len(points) % 2 or not all(-reach <= p <= 2 * reach for p in points):
        why = f"a polygon of {len(points)} numbers is odd, or far out of {width} x {height} pixels"
        raise corrupt(name, why)
    return _library(pycocotools().frPyObjects([points], height, width)[0])


def _decode_runs(rle: _Rle, width: int, height: int, name: str) -> Plane:
    if rle.size != (height, width):
        raise corrupt(name, f"its RLE is of {rle.size}, the picture of {(height, width)}, (h, w)")
    if isinstance(rle.counts, list):
        if min(rle.counts, default=-1) < 0 or sum(rle.counts) != width * height:
            raise corrupt(name, f"its runs do not add up to {width} x {height} pixels")
        record = {"size": rle.size, "counts": rle.counts}
        return _library(pycocotools().frPyObjects(record, height, width))
    plane = _decode_exactly(rle.counts.encode(), rle.size)
    if plane is None:
        raise corrupt(name, f"its run-length code does not fill {width} x {height} pixels")
    return plane


def _decode_exactly(counts: bytes, size: tuple[int, int]) -> Plane | None:
    """The mask of a compressed code, or None unless its runs cover the picture and no more.

    The library refuses a code that runs over, but fills up one that falls short with whatever the
    memory holds. What it decodes is therefore encoded again: a whole code comes back as it was.
    """
    if not counts or any(c not in _CODE for c in counts) or (counts[-1] - 48) & 32:
        return None  # no code at all, or one that breaks off within a number
    try:
        plane = _library({"size": size, "counts": counts})
    except ValueError:
        return None
    whole = pycocotools().encode(np.asfortranarray(plane))["counts"] == counts
    return plane if whole else None


def _library(code: object) -> Plane:
    plane: Plane = pycocotools().decode(code)
    return plane
