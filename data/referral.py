"""What every dataset of real pictures is made of: expressions, each with its picture and truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import DataError

Bools = npt.NDArray[np.bool_]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Referral:
    """One expression about one picture.

    id:         for example ``refcoco/unc/val/1719/5020``: the last two are ref and sentence.
    image_path: the picture; known to exist.
    text:       the expression as the dataset has it.
    family:     what it is counted under: ``all``, or ``target`` and ``no-target`` where a
                dataset has both, or a family of the user's own.
    target:     whether the expression means anything in the picture.
    size:       (width, height) of the picture in pixels.
    decode:     makes the truth; ``mask`` calls it.
    """

    id: str
    image_path: Path
    text: str
    family: str
    target: bool
    size: tuple[int, int]
    decode: Callable[[], Bools] = field(repr=False, compare=False)

    def mask(self) -> Bools:
        """[height, width] bool, decoded now: where the target is; empty without a target."""
        return self.decode()


def nowhere(width: int, height: int) -> Bools:
    """[height, width] bool: the truth of an expression without a target."""
    return np.zeros((height, width), bool)


def first(items: list[Item], limit: int | None, source: Path) -> list[Item]:
    """The first ``limit`` items of a file, or all of them; never none."""
    if not items or (limit is not None and limit < 1):
        raise DataError(
            "data-empty",
            f"no expression is left of {source}",
            why="there is none in it" if not items else f"{limit} were asked for",
            fix="ask for a split that has expressions, and for at least one",
        )
    return items[:limit]
