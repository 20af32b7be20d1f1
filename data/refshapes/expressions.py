"""Expressions that mean exactly one thing of a scene, or none, by family.

A description is a set of words (size, colour, pattern, shape). A family says how the target is
singled out among the things that a description matches:

attribute    the description alone: "the small striped circle"
superlative  by visible size: "the biggest red thing"
extreme      by place: "the leftmost cross", "the second star from the right" (full only)
relation     by a second thing: "the ring left of the blue square"
none         nothing fits, though most of its words do occur in the scene

Geometry is measured on a small rendering, so that what counts is what is seen. An expression is
only made where the answer is clear by a margin; a test proves it again from the text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from ..streams import Stream
from .render import paint
from .scene import COLOURS, PATTERNS, SHAPES, Difficulty, Scene, Thing

FAMILIES = ("attribute", "superlative", "extreme", "relation", "none")
NO_TARGET = -1

_GRID = 96  # pixels per side of the rendering that geometry is measured on
_MIN_VISIBLE = 0.72  # share of a thing that overlap may not hide
_PLACE_MARGIN = 0.06  # of the image side, between the first and the second
_AREA_RATIO = 1.3  # between the biggest and the next
_FIELDS = ("size", "colour", "pattern", "shape")

_GENERIC = ("thing", "object")
_EXTREMES = {
    "left": ("leftmost {}", "{} on the far left"),
    "right": ("rightmost {}", "{} on the far right"),
    "top": ("topmost {}", "highest {}", "{} at the very top"),
    "bottom": ("bottommost {}", "lowest {}", "{} at the very bottom"),
}
_SUPERLATIVES = {"big": ("biggest", "largest"), "small": ("smallest", "tiniest")}
_RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "top": ("above", "over"),
    "bottom": ("below", "under"),
    "near": ("closest to", "nearest to"),
}
_GLUE = ("a", "the", "that", "is", "and", "second", "from")


@dataclass(frozen=True)
class Expression:
    """A text, its family, and the index of the thing it means (``NO_TARGET`` for nothing)."""

    text: str
    family: str
    target: int


@dataclass(frozen=True)
class Description:
    """Words a thing must answer to; None means that the word is not said."""

    size: str | None = None
    colour: str | None = None
    pattern: str | None = None
    shape: str | None = None

    def matches(self, thing: Thing) -> bool:
        """Whether every word that is said is true of the thing."""
        return all(getattr(self, field) in (None, getattr(thing, field)) for field in _FIELDS)

    def text(self, stream: Stream) -> str:
        """The words in English order; "thing" or "object" where no shape is said."""
        noun = self.shape or stream.choice(_GENERIC)
        adjectives = [word for word in (self.size, self.colour, self.pattern) if word]
        if self.pattern and self.colour and stream.chance(0.3):
            adjectives = [word for word in (self.size, self.pattern, self.colour) if word]
        return " ".join([*adjectives, noun])


@dataclass(frozen=True)
class Seen:
    """What is seen of a thing: centroid and area in units of the image side."""

    x: float
    y: float
    area: float


def words() -> tuple[str, ...]:
    """Every word an expression can hold, in a fixed order: the vocabulary."""
    texts = [*_GLUE, *_GENERIC, "small", "big", *COLOURS, *PATTERNS, *SHAPES]
    for group in (_EXTREMES, _SUPERLATIVES, _RELATIONS):
        for phrases in group.values():
            texts.extend(phrases)
    found: dict[str, None] = {}
    for text in texts:
        found.update(dict.fromkeys(text.replace("{}", "").split()))
    return tuple(found)


def look(scene: Scene) -> tuple[Seen, ...] | None:
    """Measure what is seen of every thing, or None where one is too hidden to be spoken of."""
    seen, _ = paint(scene, _GRID)
    out = []
    for index, thing in enumerate(scene.things):
        alone, _ = paint(replace(scene, things=(thing,)), _GRID)
        rows, columns = np.nonzero(seen == index + 1)
        if rows.size < _MIN_VISIBLE * np.count_nonzero(alone):
            return None
        # integer sums: exact whatever order they are taken in
        x = int(columns.sum()) / rows.size + 0.5
        y = int(rows.sum()) / rows.size + 0.5
        out.append(Seen(x / _GRID, y / _GRID, rows.size / _GRID**2))
    return tuple(out)


class Speaker:
    """Makes expressions for one scene."""

    def __init__(
        self, scene: Scene, seen: tuple[Seen, ...], difficulty: Difficulty, stream: Stream
    ) -> None:
        self._things = scene.things
        self._seen = seen
        self._difficulty = difficulty
        self._stream = stream

    def say(self, family: str) -> Expression | None:
        """An expression of the family, or None where the scene gave none in forty tries."""
        make = {
            "attribute": self._attribute,
            "superlative": self._superlative,
            "extreme": self._extreme,
            "relation": self._relation,
            "none": self._none,
        }[family]
        for _ in range(40):
            made = make()
            if made is not None:
                return Expression(made[0], family, made[1])
        return None

    def _describe(self, thing: Thing, fields: tuple[str, ...]) -> Description | None:
        if "size" in fields and thing.size == "medium":
            return None
        return Description(**{field: getattr(thing, field) for field in fields})

    def _matching(self, description: Description) -> list[int]:
        return [i for i, thing in enumerate(self._things) if description.matches(thing)]

    def _unique(self, index: int) -> Description | None:
        """A description that only this thing answers to."""
        options = []
        for count in (1, 2, 3, 4):
            for fields in combinations(_FIELDS, count):
                description = self._describe(self._things[index], fields)
                if description is not None and self._matching(description) == [index]:
                    options.append(description)
            if options and not self._stream.chance(0.3):
                break
        return self._stream.choice(options) if options else None

    def _class(self, least: int, without: int = NO_TARGET) -> tuple[Description, list[int]] | None:
        """A loose description and the things it matches, at least so many."""
        thing = self._stream.choice(self._things)
        fields = self._stream.choice(
            ((), ("shape",), ("shape",), ("colour",), ("colour", "shape"), ("pattern", "shape"))
        )
        description = self._describe(thing, fields)
        if description is None:
            return None
        members = [i for i in self._matching(description) if i != without]
        return (description, members) if len(members) >= least else None

    def _attribute(self) -> tuple[str, int] | None:
        target = self._stream.below(len(self._things))
        description = self._unique(target)
        if description is None:
            return None
        adjectives = [w for w in (description.size, description.colour, description.pattern) if w]
        if adjectives and self._stream.chance(0.2):
            noun = description.shape or self._stream.choice(_GENERIC)
            return f"the {noun} that is {' and '.join(adjectives)}", target
        return f"{self._article()}{description.text(self._stream)}", target

    def _article(self) -> str:
        return self._stream.choice(("the ", "the ", "", "a "))

    def _superlative(self) -> tuple[str, int] | None:
        found = self._class(2)
        if found is None:
            return None
        description, members = found
        which = self._stream.choice(tuple(_SUPERLATIVES))
        members.sort(key=lambda i: self._seen[i].area, reverse=which == "big")
        first, second = (self._seen[i].area for i in members[:2])
        wins = self._things[members[0]].radius > self._things[members[1]].radius
        if max(first, second) < _AREA_RATIO * min(first, second) or wins != (which == "big"):
            return None
        word = self._stream.choice(_SUPERLATIVES[which])
        return f"the {word} {description.text(self._stream)}", members[0]

    def _extreme(self) -> tuple[str, int] | None:
        ordinal = self._difficulty.name == "full" and self._stream.chance(0.3)
        found = self._class(3 if ordinal else 2)
        if found is None:
            return None
        description, members = found
        side = self._stream.choice(tuple(_EXTREMES))
        members.sort(key=lambda i: self._towards(side, i), reverse=True)
        at = [self._towards(side, i) for i in members]
        rank = 1 if ordinal else 0
        if any(at[k] - at[k + 1] < _PLACE_MARGIN for k in range(rank + 1)):
            return None
        noun = description.text(self._stream)
        if ordinal:
            return f"the second {noun} from the {side}", members[1]
        return f"the {self._stream.choice(_EXTREMES[side]).format(noun)}", members[0]

    def _towards(self, side: str, index: int) -> float:
        """How far a thing lies towards a side."""
        seen = self._seen[index]
        return {"left": -seen.x, "right": seen.x, "top": -seen.y, "bottom": seen.y}[side]

    def _relation(self) -> tuple[str, int] | None:
        anchor = self._stream.below(len(self._things))
        named = self._unique(anchor)
        found = self._class(2, without=anchor)
        if named is None or found is None:
            return None
        description, members = found
        relation = self._stream.choice(tuple(_RELATIONS))
        target = (
            self._nearest(anchor, members)
            if relation == "near"
            else self._only(relation, anchor, members)
        )
        if target is None:
            return None
        return self._relate(description, relation, named), target

    def _relate(self, description: Description, relation: str, anchor: Description) -> str:
        phrase = self._stream.choice(_RELATIONS[relation])
        return f"the {description.text(self._stream)} {phrase} the {anchor.text(self._stream)}"

    def _nearest(self, anchor: int, members: list[int]) -> int | None:
        """The nearest member, if the next is clearly farther (1.35 times)."""
        origin = self._seen[anchor]

        def squared(i: int) -> float:
            return (self._seen[i].x - origin.x) ** 2 + (self._seen[i].y - origin.y) ** 2

        first, second = sorted(members, key=squared)[:2]
        return first if squared(second) > 1.35**2 * squared(first) else None

    def _only(self, side: str, anchor: int, members: list[int]) -> int | None:
        """The only member on that side of the anchor, if all the others are clearly not."""
        true = []
        for i in members:
            along = self._towards(side, i) - self._towards(side, anchor)
            x = abs(self._seen[i].x - self._seen[anchor].x)
            y = abs(self._seen[i].y - self._seen[anchor].y)
            across = y if side in ("left", "right") else x
            if along > 0.09 and across < 1.2 * along:
                true.append(i)
            elif along > -_PLACE_MARGIN:
                return None
        return true[0] if len(true) == 1 else None

    def _none(self) -> tuple[str, int] | None:
        absent = self._absent()
        if absent is None:
            return None
        noun = absent.text(self._stream)
        kind = self._stream.below(6)
        if kind < 3:
            return f"{self._article()}{noun}", NO_TARGET
        if kind == 3:
            side = self._stream.choice(tuple(_EXTREMES))
            return f"the {self._stream.choice(_EXTREMES[side]).format(noun)}", NO_TARGET
        anchor = self._unique(self._stream.below(len(self._things)))
        if anchor is None:
            return None
        relation = self._stream.choice(tuple(_RELATIONS))
        return self._relate(absent, relation, anchor), NO_TARGET

    def _absent(self) -> Description | None:
        """A thing of the scene with one word changed, so that nothing answers to it."""
        thing = self._stream.choice(self._things)
        fields = self._stream.choice(
            (("colour", "shape"), ("colour", "shape"), ("pattern", "shape"), ("shape",), _FIELDS)
        )
        description = self._describe(thing, fields)
        if description is None:
            return None
        lite = self._difficulty
        words = {
            "size": ("small", "big"),
            "colour": COLOURS[: lite.colours],
            "pattern": PATTERNS[: lite.patterns],
            "shape": SHAPES[: lite.shapes],
        }
        field = self._stream.choice(fields)
        changed = replace(description, **{field: self._stream.choice(words[field])})
        return changed if not self._matching(changed) else None
