"""Named protocols: exactly how a score is computed, so that two numbers can be compared.

Published numbers of referring segmentation mix spaces (480 x 480 or the picture's own), means and
totals, ``>=`` and ``>``, and treatments of empty masks. A protocol fixes all of them and travels
with every number. I and U are intersection and union of a predicted and a true mask, in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..errors import DataError

Bools = npt.NDArray[np.bool_]

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Protocol:
    """How predictions are compared with the truth.

    space:       ``model``: both masks at the model's input size; ``picture``: at the picture's.
    strict:      P@X counts IoU > X instead of IoU >= X.
    no_target:   None: an expression without target scores like any other, with IoU 0 where the
                 union is empty (as in LAVT's and SLViT's public evaluation). A number: a
                 prediction of fewer pixels than this share of the image says "nothing there";
                 expressions without target are scored by that alone, in N-acc, and take no part
                 in IoU and P@X.
    """

    name: str
    space: str
    strict: bool
    no_target: float | None
    source: str


PROTOCOLS = {
    "refshapes": Protocol(
        "refshapes",
        space="model",
        strict=False,
        no_target=50 / 480**2,
        source="refedge; fewer than 50 of 480 x 480 pixels is the field's usual no-target rule",
    ),
    "lavt480": Protocol(
        "lavt480",
        space="model",
        strict=False,
        no_target=None,
        source="public evaluation of LAVT (CVPR 2022) and SLViT (IJCAI 2023)",
    ),
}


def protocol_named(name: str) -> Protocol:
    """The protocol of that name."""
    if name not in PROTOCOLS:
        raise DataError(
            "protocol-unknown",
            f"there is no protocol called {name!r}",
            why=f"the protocols are {', '.join(PROTOCOLS)}",
            fix="choose one of these",
        )
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Scores:
    """What a protocol says of a set of expressions; shares are 0 to 1, None where undefined.

    count:           expressions that IoU and P@X were computed over.
    oiou:            total intersection over total union (also called cIoU, overall IoU).
    miou:            mean of the expressions' IoU.
    precision:       share of expressions with IoU of at least 0.5, 0.6, 0.7, 0.8, 0.9.
    object_accuracy: share whose prediction overlaps the meant thing more (by IoU) than any other.
    n_acc, t_acc:    share of expressions without / with target that were told to be so.
    """

    count: int
    oiou: float | None
    miou: float | None
    precision: tuple[float, ...]
    object_accuracy: float | None
    n_acc: float | None
    t_acc: float | None


@dataclass
class _Tally:
    intersection: int = 0
    union: int = 0
    ious: list[float] = field(default_factory=list)
    picked: list[bool] = field(default_factory=list)
    absent: list[bool] = field(default_factory=list)
    present: list[bool] = field(default_factory=list)

    def scores(self, strict: bool) -> Scores:
        ious = np.array(self.ious)
        reached = [
            float(np.mean(ious > t if strict else ious >= t)) for t in THRESHOLDS if ious.size
        ]
        return Scores(
            count=int(ious.size),
            oiou=self.intersection / self.union if self.union else None,
            miou=_mean(self.ious),
            precision=tuple(reached),
            object_accuracy=_mean(self.picked),
            n_acc=_mean(self.absent),
            t_acc=_mean(self.present),
        )


class Meter:
    """Adds up predictions under one protocol, over all and per family."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.ious: list[float] = []
        self._all = _Tally()
        self._families: dict[str, _Tally] = {}

    def add(
        self,
        predicted: Bools,
        truth: Bools,
        *,
        family: str = "all",
        things: npt.NDArray[np.uint8] | None = None,
    ) -> float:
        """Score one expression and return its IoU.

        predicted, truth: [H, W] bool; an empty truth means that the expression has no target.
        things:           [H, W] uint8 map of what is seen where (0 nothing), for object accuracy.
        """
        if predicted.shape != truth.shape or predicted.dtype != bool or truth.dtype != bool:
            raise DataError(
                "mask-shape",
                f"masks of {predicted.shape} {predicted.dtype} and {truth.shape} {truth.dtype}",
                why="a prediction is scored against a truth of the same size, both bool",
                fix="resize the prediction to the protocol's space first",
            )
        intersection = int(np.count_nonzero(predicted & truth))
        union = int(np.count_nonzero(predicted | truth))
        iou = intersection / union if union else 0.0
        tallies = (self._all, self._families.setdefault(family, _Tally()))
        nothing = self.protocol.no_target
        if nothing is not None:
            said_nothing = bool(np.count_nonzero(predicted) < nothing * predicted.size)
            if not truth.any():
                iou = float(said_nothing)
                for tally in tallies:
                    tally.absent.append(said_nothing)
                self.ious.append(iou)
                return iou
            for tally in tallies:
                tally.present.append(not said_nothing)
        for tally in tallies:
            tally.intersection += intersection
            tally.union += union
            tally.ious.append(iou)
            if things is not None and truth.any():
                tally.picked.append(_picked(predicted, truth, things))
        self.ious.append(iou)
        return iou

    def scores(self) -> Scores:
        """Over all expressions so far."""
        return self._all.scores(self.protocol.strict)

    def by_family(self) -> dict[str, Scores]:
        """Per family, in the order they first came."""
        return {name: tally.scores(self.protocol.strict) for name, tally in self._families.items()}


def _picked(predicted: Bools, truth: Bools, things: npt.NDArray[np.uint8]) -> bool:
    """Whether no other thing overlaps the prediction as well as the meant one, by IoU."""
    meant = int(things[truth][0])
    areas = np.bincount(things.ravel(), minlength=meant + 1)
    inside = np.bincount(things[predicted], minlength=areas.size)
    iou = inside[1:] / np.maximum(areas[1:] + np.count_nonzero(predicted) - inside[1:], 1)
    return bool(iou[meant - 1] > 0 and iou[meant - 1] == iou.max())


def _mean(values: list[float] | list[bool]) -> float | None:
    return float(np.mean(values)) if values else None
