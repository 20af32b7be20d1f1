"""Named protocols: exactly how a score is computed, so that two numbers can be compared.

Published numbers of referring segmentation mix spaces (480 x 480 or the picture's own), means and
totals, ``>=`` and ``>``, and treatments of empty masks. A protocol fixes all of them and travels
with every number. I and U are intersection and union of a predicted and a true mask, in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..errors import DataError

Bools = npt.NDArray[np.bool_]

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Protocol:
    """How predictions are compared with the truth.

    space:     ``model``: both masks at the model's input size; ``picture``: at the picture's.
    strict:    P@X counts IoU > X instead of IoU >= X.
    no_target: None: no prediction counts as "nothing there". A number: one of fewer pixels than
               this share of the image does.
    absent:    what becomes of an expression without a target. ``alike``: it is scored like any
               other, with IoU 0 where the union is empty. ``apart``: it counts in N-acc, and
               takes no part in IoU and P@X. ``within``: it counts in N-acc and, in gIoU and oIoU,
               as IoU 1 with no pixels if "nothing there" was said, else as IoU 0 with the
               predicted pixels as union; and "nothing there" about a target intersects nothing.
    threshold: a pixel is predicted where its probability is above this.
    epsilon:   pixels added to the union of each expression's IoU, not to oIoU's.
    text:      the field of REFER's files that the family's models read: ``raw`` or ``sent``.
    overlap:   where parts of an object overlap: ``any`` or ``eq1``, see ``coco_masks.decode``.
    """

    name: str
    space: str
    strict: bool
    no_target: float | None
    source: str
    absent: str = "alike"
    threshold: float = 0.5
    epsilon: float = 0.0
    text: str = "raw"
    overlap: str = "any"

    def predicted(self, logits: npt.NDArray[np.float32]) -> Bools:
        """Bools of the logits' shape; both are in the protocol's space."""
        return np.asarray(logits > math.log(self.threshold / (1.0 - self.threshold)))


_FIFTY = 50 / 480**2  # fewer than 50 of 480 x 480 pixels is the field's usual no-target rule

PROTOCOLS = {
    "refshapes": Protocol(
        "refshapes",
        space="model",
        strict=False,
        no_target=_FIFTY,
        absent="apart",
        source="refedge",
    ),
    "lavt480": Protocol(
        "lavt480",
        space="model",
        strict=False,
        no_target=None,
        overlap="eq1",
        source="public evaluation of LAVT (CVPR 2022) and SLViT (IJCAI 2023)",
    ),
    "cris-native": Protocol(
        "cris-native",
        space="picture",
        strict=True,
        no_target=None,
        threshold=0.35,
        epsilon=1e-6,
        text="sent",
        source="public evaluation of CRIS (CVPR 2022), whose IoU is mIoU",
    ),
    "gres": Protocol(
        "gres",
        space="model",
        strict=False,
        no_target=_FIFTY,
        absent="within",
        source="public evaluation of ReLA (CVPR 2023), whose cIoU is oIoU",
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

    count:           expressions that mIoU and P@X were computed over.
    oiou:            total intersection over total union (also called cIoU, overall IoU).
    miou:            mean of the expressions' IoU.
    precision:       share of expressions with IoU of at least 0.5, 0.6, 0.7, 0.8, 0.9.
    object_accuracy: share whose prediction overlaps the meant thing more (by IoU) than any other.
    n_acc, t_acc:    share of expressions without / with target that were told to be so.
    giou:            mean IoU with the expressions without target, under ``within`` alone.
    """

    count: int
    oiou: float | None
    miou: float | None
    precision: tuple[float, ...]
    object_accuracy: float | None
    n_acc: float | None
    t_acc: float | None
    giou: float | None = None


@dataclass
class _Tally:
    intersection: int = 0
    union: int = 0
    ious: list[float] = field(default_factory=list)
    picked: list[bool] = field(default_factory=list)
    absent: list[bool] = field(default_factory=list)
    present: list[bool] = field(default_factory=list)
    everything: list[float] = field(default_factory=list)

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
            giou=_mean(self.everything),
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
        target: bool | None = None,
        nothing: bool | None = None,
    ) -> float:
        """Score one expression and return its IoU.

        predicted, truth: [H, W] bool; an empty truth means that the expression has no target.
        things:           [H, W] uint8 map of what is seen where (0 nothing), for object accuracy.
        target:           whether it has one, where the truth may have lost a small target in the
                          resize to the model's size; None: whether the truth is not empty.
        nothing:          whether the model said "nothing there", where it has a head for that;
                          None: by the protocol's ``no_target``. Unused where that is None.
        """
        if predicted.shape != truth.shape or predicted.dtype != bool or truth.dtype != bool:
            raise DataError(
                "mask-shape",
                f"masks of {predicted.shape} {predicted.dtype} and {truth.shape} {truth.dtype}",
                why="a prediction is scored against a truth of the same size, both bool",
                fix="resize the prediction to the protocol's space first",
            )
        rules = self.protocol
        tells = rules.no_target is not None
        if rules.no_target is None:
            target, nothing = True, False
        else:
            few = rules.no_target * predicted.size
            target = bool(truth.any()) if target is None else target
            nothing = bool(np.count_nonzero(predicted) < few) if nothing is None else nothing
        within = rules.absent == "within"
        intersection = int(np.count_nonzero(predicted & truth))
        union = int(np.count_nonzero(predicted | truth))
        if within and nothing:
            intersection, union = 0, union if target else 0
        iou = intersection / (union + rules.epsilon) if union else 0.0
        if not target:
            iou = float(nothing)
        for tally in (self._all, self._families.setdefault(family, _Tally())):
            if tells and target:
                tally.present.append(not nothing)
            if tells and not target:
                tally.absent.append(nothing)
            if within:
                tally.everything.append(iou)
            if within or target:
                tally.intersection += intersection
                tally.union += union
            if target:
                tally.ious.append(iou)
            if target and things is not None and truth.any():
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
