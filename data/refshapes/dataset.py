"""RefShapes: scenes, exact masks and expressions, by split and index.

Sample ``i`` of a split is a function of (version, difficulty, split, i) alone: nothing is stored,
any sample can be made by itself, at any size. ``DIGESTS`` pins the test splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ..streams import Stream
from .expressions import FAMILIES, Expression, Speaker, look
from .render import render
from .scene import DIFFICULTIES, SPLITS, VERSION, Scene, sample_scene

SIZES = {"train": 1_000_000, "calibration": 1_000, "val": 1_000, "test": 1_000}

# sha256 over the 1,000 test scenes at 96 x 96: pixels, things, expressions, targets
DIGESTS = {
    "lite": "90b9ca798c76fdb1a1a9155d80b65f0a7660a2eb57d20b61da537934f25bc1cf",
    "full": "5bbd22f073d7da40be7e33763983c40e3c86fe15631642caf7dbeed7c7cf7297",
}


@dataclass(frozen=True)
class Sample:
    """One scene with its expressions.

    id:          for example ``refshapes-1/lite/test/17``.
    image:       [size, size, 3] uint8 RGB.
    things:      [size, size] uint8; 0 background, i + 1 where thing i is seen.
    expressions: texts with family and target.
    scene:       what was rendered.
    """

    id: str
    image: npt.NDArray[np.uint8]
    things: npt.NDArray[np.uint8]
    expressions: tuple[Expression, ...]
    scene: Scene

    def mask(self, expression: Expression) -> npt.NDArray[np.bool_]:
        """[size, size] bool: where the expression's target is seen; empty without a target."""
        return np.asarray(self.things == (expression.target + 1 if expression.target >= 0 else 255))


class RefShapes:
    """A split of RefShapes.

    split:      ``train``, ``calibration``, ``val`` or ``test``.
    difficulty: ``lite`` or ``full``.
    size:       pixels per side, 32 or more.
    scenes:     how many scenes; the first so many of the split. None for the whole split.
    families:   the family of each expression of a scene; the default says one of each.
    """

    def __init__(
        self,
        split: str = "test",
        *,
        difficulty: str = "lite",
        size: int = 96,
        scenes: int | None = None,
        families: Sequence[str] = FAMILIES,
    ) -> None:
        if split not in SPLITS:
            raise _unknown("data-split", split, SPLITS)
        if difficulty not in DIFFICULTIES:
            raise _unknown("data-difficulty", difficulty, tuple(DIFFICULTIES))
        for family in families:
            if family not in FAMILIES:
                raise _unknown("data-family", family, FAMILIES)
        if not 32 <= size <= 4096:
            raise DataError(
                "data-size",
                f"RefShapes cannot be rendered at {size} pixels",
                why="below 32 pixels shapes are no longer told apart; above 4096 is a mistake",
                fix="choose a size from 32 to 4096",
            )
        self.split = split
        self.difficulty = DIFFICULTIES[difficulty]
        self.size = size
        self.families = tuple(families)
        limit = SIZES[split]
        self._count = limit if scenes is None else scenes
        if not 0 < self._count <= limit:
            raise DataError(
                "data-empty" if self._count <= 0 else "data-range",
                f"{self._count} scenes were asked of the {split} split",
                why=f"the split has 1 to {limit} scenes",
                fix=f"ask for 1 to {limit}",
            )

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        if not -self._count <= index < self._count:
            raise IndexError(index)
        name = self.name(index % self._count)
        scene, expressions = self._imagine(name)
        picture = render(scene, self.size)
        return Sample(name, picture.image, picture.things, expressions, scene)

    def name(self, index: int) -> str:
        """The sample's id, which all of it follows from."""
        return f"{VERSION}/{self.difficulty.name}/{self.split}/{index}"

    def _imagine(self, name: str) -> tuple[Scene, tuple[Expression, ...]]:
        """Draw scenes until one carries an expression of every family that was asked for."""
        attempt = 0
        while True:
            stream = Stream(name, attempt)
            attempt += 1
            scene = sample_scene(stream, self.difficulty, self.split)
            seen = look(scene) if scene is not None else None
            if scene is None or seen is None:
                continue
            said = self._say(Speaker(scene, seen, self.difficulty, stream))
            if said is not None:
                return scene, said

    def _say(self, speaker: Speaker) -> tuple[Expression, ...] | None:
        said: dict[str, Expression] = {}
        for family in self.families:
            for _ in range(4):  # a text is not said twice, if there is another
                expression = speaker.say(family)
                if expression is None:
                    return None
                if said.setdefault(expression.text, expression) is expression:
                    break
        return tuple(said.values())


def digest(samples: Iterable[Sample]) -> str:
    """SHA-256 over pixels, things, expressions and targets, in order."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(sample.id.encode())
        total.update(sample.image.tobytes())
        total.update(sample.things.tobytes())
        for e in sample.expressions:
            total.update(f"{e.family}|{e.text}|{e.target}\n".encode())
    return total.hexdigest()


def _unknown(code: str, value: str, known: Sequence[str]) -> DataError:
    what = code.removeprefix("data-")
    return DataError(
        code,
        f"RefShapes has no {what} called {value!r}",
        why=f"its {what} names are {', '.join(known)}",
        fix="choose one of these",
    )
