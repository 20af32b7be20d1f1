"""An independent reading of RefShapes expressions: proves that each means exactly what it says.

This module shares no code with ``expressions.py``: it parses the English text with a grammar of
its own and measures places and areas on the rendered masks of the sample, not on the numbers that
the scene was made from. An expression passes if its loosest sensible reading already leaves only
the target (or nothing, for no-target expressions).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from refedge.data.refshapes.dataset import Sample

_ADJECTIVES = {
    "size": "small|big",
    "colour": "red|green|blue|yellow|purple|white|orange|cyan",
    "pattern": "plain|striped|dotted|checkered",
}
_ANY = "|".join(_ADJECTIVES.values())
_NOUN = "circle|square|triangle|cross|ring|star|diamond|moon|thing|object"
_NP = rf"((?:(?:{_ANY}) )*(?:{_NOUN}))"

_ATTRIBUTE = re.compile(rf"(?:the |a )?{_NP}")
_PREDICATE = re.compile(rf"the ({_NOUN}) that is ((?:{_ANY})(?: and (?:{_ANY}))*)")
_SUPERLATIVE = re.compile(rf"the (biggest|largest|smallest|tiniest) {_NP}")
_EXTREMES = (
    re.compile(rf"the (?P<side>leftmost|rightmost|topmost|highest|bottommost|lowest) {_NP}"),
    re.compile(rf"the {_NP} on the far (?P<side>left|right)"),
    re.compile(rf"the {_NP} at the very (?P<side>top|bottom)"),
)
_ORDINAL = re.compile(rf"the second {_NP} from the (?P<side>left|right|top|bottom)")
_RELATION = re.compile(
    rf"the {_NP} (left of|to the left of|right of|to the right of|above|over|below|under"
    rf"|closest to|nearest to) the {_NP}"
)
_SIDES = {
    "left": (-1, 0), "leftmost": (-1, 0), "left of": (-1, 0), "to the left of": (-1, 0),
    "right": (1, 0), "rightmost": (1, 0), "right of": (1, 0), "to the right of": (1, 0),
    "top": (0, -1), "topmost": (0, -1), "highest": (0, -1), "above": (0, -1), "over": (0, -1),
    "bottom": (0, 1), "bottommost": (0, 1), "lowest": (0, 1), "below": (0, 1), "under": (0, 1),
}  # fmt: skip

_PLACE_SLACK = 0.025  # of the image side: two things closer than this along an axis are a tie
_AREA_SLACK = 1.1
_DISTANCE_SLACK = 1.15


class UnreadableError(ValueError):
    """The text is not in the checker's grammar."""


@dataclass(frozen=True)
class _Body:
    words: frozenset[str]
    x: float
    y: float
    area: int


def referents(sample: Sample, text: str) -> set[int]:
    """Indices of the things that the loosest reading of the text allows."""
    bodies = _measure(sample)
    if match := _SUPERLATIVE.fullmatch(text):
        big = match[1] in ("biggest", "largest")
        return _best(bodies, _named(bodies, match[2]), big)
    for pattern in _EXTREMES:
        if match := pattern.fullmatch(text):
            members = _named(bodies, _np_of(match))
            return _farthest(bodies, members, _SIDES[match["side"]])
    if match := _ORDINAL.fullmatch(text):
        members = _named(bodies, _np_of(match))
        first = _farthest(bodies, members, _SIDES[match["side"]])
        return (
            _farthest(bodies, members - first, _SIDES[match["side"]])
            if len(first) == 1
            else members
        )
    if match := _RELATION.fullmatch(text):
        return _related(bodies, match[1], match[2], match[3])
    if match := _PREDICATE.fullmatch(text):
        return _named(bodies, f"{match[2].replace(' and ', ' ')} {match[1]}")
    if match := _ATTRIBUTE.fullmatch(text):
        return _named(bodies, match[1])
    raise UnreadableError(text)


def problems(sample: Sample) -> list[str]:
    """What is wrong with a sample's expressions; empty when every one is proven."""
    out = []
    for expression in sample.expressions:
        meant = {expression.target} if expression.target >= 0 else set()
        read = referents(sample, expression.text)
        if read != meant:
            out.append(f"{sample.id}: {expression.text!r} means {meant}, reads as {read}")
        if expression.target >= 0 and not sample.mask(expression).any():
            out.append(f"{sample.id}: {expression.text!r} has an empty mask")
    return out


def _np_of(match: re.Match[str]) -> str:
    return next(g for g in match.groups() if g and re.search(rf"(?:{_NOUN})$", g))


def _measure(sample: Sample) -> list[_Body]:
    size = sample.things.shape[0]
    bodies = []
    for index, thing in enumerate(sample.scene.things):
        rows, columns = np.nonzero(sample.things == index + 1)
        words = frozenset((thing.size, thing.colour, thing.pattern, thing.shape))
        bodies.append(_Body(words, columns.mean() / size, rows.mean() / size, rows.size))
    return bodies


def _named(bodies: list[_Body], phrase: str) -> set[int]:
    words = set(phrase.split()) - {"thing", "object"}
    return {i for i, body in enumerate(bodies) if words <= body.words}


def _best(bodies: list[_Body], members: set[int], big: bool) -> set[int]:
    if not members:
        return set()
    areas = {i: bodies[i].area for i in members}
    if big:
        return {i for i in members if areas[i] * _AREA_SLACK >= max(areas.values())}
    return {i for i in members if areas[i] <= min(areas.values()) * _AREA_SLACK}


def _farthest(bodies: list[_Body], members: set[int], side: tuple[int, int]) -> set[int]:
    if not members:
        return set()
    along = {i: side[0] * bodies[i].x + side[1] * bodies[i].y for i in members}
    return {i for i in members if along[i] > max(along.values()) - _PLACE_SLACK}


def _related(bodies: list[_Body], target: str, relation: str, anchor: str) -> set[int]:
    anchors = _named(bodies, anchor)
    if len(anchors) != 1:
        return set(range(len(bodies)))  # an ambiguous anchor proves nothing
    (origin,) = anchors
    members = _named(bodies, target) - anchors
    here = bodies[origin]
    if relation in _SIDES:
        dx, dy = _SIDES[relation]
        return {
            i
            for i in members
            if dx * (bodies[i].x - here.x) + dy * (bodies[i].y - here.y) > -_PLACE_SLACK
        }
    distance = {i: np.hypot(bodies[i].x - here.x, bodies[i].y - here.y) for i in members}
    nearest = min(distance.values(), default=0.0)
    return {i for i in members if distance[i] <= nearest * _DISTANCE_SLACK}
