"""A user's own data: pictures, masks and expressions in a folder.

``expressions.jsonl`` holds one object per line: ``{"image": "a.jpg", "mask": "a-dog.png",
"text": "the dog on the left", "family": "animals"}``. Paths are relative to the folder. Without a
mask, or with null, the expression means nothing in the picture; ``family`` may be left out.
"""

from __future__ import annotations

import codecs
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from PIL import ExifTags, Image

from ..errors import DataError
from .files import corrupt, inside, missing, read_bytes
from .referral import Bools, Referral, first, nowhere

EXPRESSIONS = "expressions.jsonl"
_LYING = (5, 6, 7, 8)  # values of EXIF's orientation that swap width and height
_ONE_CHANNEL = ("1", "L", "P", "I", "I;16")


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    image: str
    text: str
    mask: str | None = None
    family: str | None = None


@dataclass(frozen=True)
class _Entry:
    number: int
    line: _Line
    image: Path
    mask: Path | None
    size: tuple[int, int]


class Folder:
    """The expressions of a folder, in the order of ``expressions.jsonl``.

    A mask is a PNG of one channel and two values, 0 outside the target, of its picture's size
    (upright, as EXIF says). ``limit`` takes at most so many expressions, from the first on.
    """

    def __init__(self, root: str | Path, *, limit: int | None = None) -> None:
        self.root = Path(root)
        self.name = self.root.resolve().name
        source = self.root / EXPRESSIONS
        raw = read_bytes(source, f"write {EXPRESSIONS} beside your pictures, see docs/datasets.md")
        lines = raw.removeprefix(codecs.BOM_UTF8).split(b"\n")
        numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
        sizes: dict[Path, tuple[int, int]] = {}
        self._entries = [
            _entry(self.root, number, line, sizes)
            for number, line in first(numbered, limit, source)
        ]
        self._both = any(e.mask is None for e in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Referral]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Referral:
        entry = self._entries[index]
        target = entry.mask is not None
        usual = ("target" if target else "no-target") if self._both else "all"
        return Referral(
            id=f"{self.name}/{entry.number}",
            image_path=entry.image,
            text=entry.line.text,
            family=entry.line.family or usual,
            target=target,
            size=entry.size,
            decode=partial(nowhere, *entry.size)
            if entry.mask is None
            else partial(_read_mask, entry.mask),
        )


def _entry(root: Path, number: int, raw: bytes, sizes: dict[Path, tuple[int, int]]) -> _Entry:
    """Parse a line, and look at its files without decoding them."""
    where = f"line {number} of {root / EXPRESSIONS}"
    try:
        line = msgspec.json.decode(raw, type=_Line)
    except (ValueError, RecursionError) as error:
        raise _wrong(where, str(error)) from error
    if not line.text.strip():
        raise _wrong(where, "its text says nothing")
    image = inside(root, line.image, where)
    mask = None if line.mask is None else inside(root, line.mask, where)
    if image not in sizes:
        sizes[image] = _upright_size(image, where)
    if mask is not None:
        with _opened(mask, where) as found:
            size = found.size
        if size != sizes[image]:
            picture = f"the picture {image.name} {_by(sizes[image])}"
            raise _unlike(mask, f"it is {_by(size)}, {picture}")
    return _Entry(number, line, image, mask, sizes[image])


def _upright_size(path: Path, where: str) -> tuple[int, int]:
    """(width, height) from the header, exchanged where EXIF says that the picture lies."""
    with _opened(path, where) as image:
        width, height = image.size
        told = image.format != "PNG" or "exif" in image.info  # or a PNG would be decoded to look
        lying = told and image.getexif().get(ExifTags.Base.Orientation) in _LYING
    return (height, width) if lying else (width, height)


def _read_mask(path: Path) -> Bools:
    """[height, width] bool: where the mask is not 0."""
    with _opened(path, EXPRESSIONS) as image:
        if image.format != "PNG" or image.mode not in _ONE_CHANNEL:
            raise _unlike(path, f"it is a {image.format} of mode {image.mode}")
        values = np.asarray(image)
    marks = np.count_nonzero(np.unique(values))
    if marks != 1:
        raise _unlike(path, f"beside 0 it has {marks} values")
    return np.asarray(values != 0)


@contextmanager
def _opened(path: Path, where: str) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except FileNotFoundError as error:
        raise missing(path, f"put the file there, or correct {where}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise corrupt(path, str(error), "scale the picture down") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise corrupt(path, str(error), f"replace the file, or correct {where}") from error


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _wrong(where: str, why: str) -> DataError:
    return DataError(
        "data-line",
        f"{where} cannot be used",
        why=why,
        fix='write {"image": "a.jpg", "mask": "a-dog.png", "text": "the dog"}; no mask, no target',
    )


def _unlike(path: Path, why: str) -> DataError:
    return DataError(
        "data-mask",
        f"{path} is not the mask of an expression",
        why=why,
        fix="a mask is a PNG of one channel, of the picture's size, 0 outside and one other value "
        "inside; for an expression without target give no mask",
    )
