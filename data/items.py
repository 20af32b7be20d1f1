"""What is scored, whatever the dataset: a picture at the model's size and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import DataError
from ..runtime.manifest import PreprocessSpec
from ..runtime.preprocess import open_photo, to_pixels
from .folder import Folder
from .protocols import Protocol
from .refer import DATASETS, Refer
from .referral import Referral
from .refshapes.dataset import RefShapes
from .refshapes.scene import DIFFICULTIES, SPLITS

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Query:
    """One expression: its truth in the protocol's space, and whether it has a target at all."""

    id: str
    text: str
    family: str
    truth: Bools
    target: bool


@dataclass(frozen=True)
class Item:
    """A picture and its queries.

    pixels: [H, W, 3] uint8 at the model's size; size: (width, height) that predictions get.
    frame:  left, top, right, bottom of where the picture lies in the pixels.
    things: [H, W] uint8 map of what is seen where, if the dataset knows.
    """

    pixels: npt.NDArray[np.uint8]
    size: tuple[int, int]
    frame: tuple[int, int, int, int]
    queries: tuple[Query, ...]
    things: npt.NDArray[np.uint8] | None


class Items:
    """A dataset as items, made one by one."""

    def __init__(
        self, source: RefShapes | Refer | Folder, spec: PreprocessSpec, protocol: Protocol
    ) -> None:
        self.source, self._spec, self._protocol = source, spec, protocol

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        if isinstance(self.source, RefShapes):
            return self._shapes(self.source, index)
        return self._photo(self.source[index])

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))

    def ids(self) -> set[str]:
        """Names of all queries, without making any."""
        if isinstance(self.source, RefShapes):
            names = (self.source.name(i) for i in range(len(self)))
            return {f"{n}/{k}" for n in names for k in range(len(self.source.families))}
        return {self.source[i].id for i in range(len(self))}

    def _shapes(self, source: RefShapes, index: int) -> Item:
        sample = source[index]
        queries = tuple(
            Query(f"{sample.id}/{i}", e.text, e.family, sample.mask(e), e.target >= 0)
            for i, e in enumerate(sample.expressions)
        )
        side = sample.image.shape[0]
        return Item(sample.image, (side, side), (0, 0, side, side), queries, sample.things)

    def _photo(self, referral: Referral) -> Item:
        truth = referral.mask()
        size = referral.size
        if self._protocol.space == "model":
            size = (self._spec.width, self._spec.height)
            image = Image.fromarray(truth).resize(size, Image.Resampling.NEAREST)
            truth = np.asarray(image, bool)
        query = Query(referral.id, referral.text, referral.family, truth, referral.target)
        photo = open_photo(referral.image_path)
        frame = self._spec.frame(photo.size)
        return Item(to_pixels(photo, self._spec), size, frame, (query,), None)


def open_items(
    name: str,
    spec: PreprocessSpec,
    protocol: Protocol,
    *,
    root: Path | None = None,
    limit: int | None = None,
) -> Items:
    """The dataset that a name stands for.

    ``refshapes:test``, ``refshapes-full:val``: rendered at the model's own size; ``refcoco:val``,
    ``refcoco+:testA``, ``refcocog:val``, ``grefcoco:val`` under ``root``; ``folder``: a user's own
    files in ``root``. ``limit`` takes the first scenes or expressions.
    """
    family, _, split = name.partition(":")
    difficulty = {"refshapes": "lite"} | {f"refshapes-{d}": d for d in DIFFICULTIES}
    if family in difficulty and split in SPLITS:
        shapes = RefShapes(split, difficulty=difficulty[family], size=spec.height, scenes=limit)
        return Items(shapes, spec, protocol)
    if family in DATASETS or name == "folder":
        folder = _root(name, root)
        source = (
            Folder(folder, limit=limit)
            if name == "folder"
            else Refer(
                folder, family, split, field=protocol.text, overlap=protocol.overlap, limit=limit
            )
        )
        return Items(source, spec, protocol)
    known = (*(f"{d}:SPLIT" for d in (*difficulty, *DATASETS)), "folder")
    raise DataError(
        "data-unknown",
        f"there is no dataset called {name!r}",
        why=f"known are {', '.join(known)}",
        fix="for example refshapes:test",
    )


def _root(name: str, root: Path | None) -> Path:
    if root is None:
        raise DataError(
            "data-root",
            f"{name} needs a folder",
            why="its files are not part of refedge",
            fix="--root DIR, laid out as docs/datasets.md draws it",
        )
    return root
