"""What a RefShapes scene is made of, and how one is drawn at random.

A scene is a list of things (shape, colour, pattern, size, place), back to front, on a background
under a light. It is described in units of the image side, so it can be rendered at any size.
The split of a scene follows from the multiset of its things (``split_of``): no composition that a
model is trained on can appear in calibration, validation or test.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..streams import Stream, key_of

VERSION = "refshapes-1"

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "diamond", "moon")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white", "orange", "cyan")
PATTERNS = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "medium", "big")

SPLITS = ("train", "calibration", "val", "test")
_SHARES = {"train": range(0, 10), "calibration": range(10, 12), "val": range(12, 14)}

# cosine and sine of small turns as exact fractions, so that no libm decides a pixel
TURNS = ((1.0, 0.0), (40 / 41, 9 / 41), (40 / 41, -9 / 41), (60 / 61, 11 / 61), (60 / 61, -11 / 61))

BACKGROUNDS = ("flat", "ramp", "cloud", "weave")


@dataclass(frozen=True)
class Difficulty:
    """How hard the scenes of a variant are.

    things: lowest and highest number of things.
    radii:  radius range of each size word, as a share of the image side.
    """

    name: str
    shapes: int
    colours: int
    patterns: int
    things: tuple[int, int]
    radii: tuple[tuple[float, float], ...]


DIFFICULTIES = {
    "lite": Difficulty("lite", 5, 6, 3, (4, 6), ((0.085, 0.105), (0.118, 0.135), (0.15, 0.18))),
    "full": Difficulty("full", 8, 8, 4, (5, 9), ((0.055, 0.07), (0.08, 0.095), (0.11, 0.14))),
}


@dataclass(frozen=True)
class Thing:
    """One object: what it is called and where it lies (x right, y down, unit = image side)."""

    shape: str
    colour: str
    pattern: str
    size: str
    x: float
    y: float
    radius: float
    turn: int


@dataclass(frozen=True)
class Light:
    """What the camera adds: a brightness ramp, a shadow, a blur and noise (seed and amplitude)."""

    ramp_x: float
    ramp_y: float
    shadow: tuple[float, float]
    blur: bool
    noise: int
    seed: int


@dataclass(frozen=True)
class Scene:
    """Things back to front, the background and the light."""

    things: tuple[Thing, ...]
    background: str
    tone: tuple[int, int, int]
    light: Light


Composition = tuple[tuple[str, str, str, str], ...]


def split_of(composition: Composition) -> str:
    """The split a multiset of (shape, colour, pattern, size) belongs to; order does not matter."""
    bucket = key_of(VERSION, *sorted(composition)) % 16
    return next((name for name, share in _SHARES.items() if bucket in share), "test")


def sample_scene(stream: Stream, difficulty: Difficulty, split: str) -> Scene | None:
    """Draw a scene of the split, or None when the things did not fit side by side."""
    composition = _sample_composition(stream, difficulty)
    while split_of(composition) != split:
        composition = _sample_composition(stream, difficulty)
    things = _place(stream, difficulty, composition)
    if things is None:
        return None
    background = stream.choice(BACKGROUNDS)
    grey = stream.between(40, 190)
    tone = tuple(int(grey + stream.between(-22, 22)) for _ in range(3))
    return Scene(things, background, (tone[0], tone[1], tone[2]), _sample_light(stream))


def _sample_composition(stream: Stream, difficulty: Difficulty) -> Composition:
    """Few shapes and colours per scene, so that most things have a near twin."""
    shapes = stream.shuffled(SHAPES[: difficulty.shapes])[: 2 + stream.below(2)]
    colours = stream.shuffled(COLOURS[: difficulty.colours])[: 2 + stream.below(2)]
    patterns = stream.shuffled(PATTERNS[: difficulty.patterns])[: 1 + stream.below(2)]
    low, high = difficulty.things
    return tuple(
        (
            stream.choice(shapes),
            stream.choice(colours),
            stream.choice(patterns),
            stream.choice(SIZES),
        )
        for _ in range(low + stream.below(high - low + 1))
    )


def _place(
    stream: Stream, difficulty: Difficulty, composition: Composition
) -> tuple[Thing, ...] | None:
    """Put the things down; neighbours may overlap by about a fifth of their radii."""
    placed: list[Thing] = []
    for shape, colour, pattern, size in composition:
        low, high = difficulty.radii[SIZES.index(size)]
        radius = stream.between(low, high)
        for _ in range(40):
            x = stream.between(radius, 1 - radius)
            y = stream.between(radius, 1 - radius)
            if all(
                (x - t.x) ** 2 + (y - t.y) ** 2 > (0.82 * (radius + t.radius)) ** 2 for t in placed
            ):
                turn = stream.below(len(TURNS))
                placed.append(Thing(shape, colour, pattern, size, x, y, radius, turn))
                break
        else:
            return None
    return tuple(stream.shuffled(placed))


def _sample_light(stream: Stream) -> Light:
    return Light(
        ramp_x=stream.between(-0.25, 0.25),
        ramp_y=stream.between(-0.25, 0.25),
        shadow=(stream.between(-0.03, 0.03), stream.between(0.0, 0.03)),
        blur=stream.chance(0.35),
        noise=stream.below(13),
        seed=stream.bits(),
    )
