"""Scene to pixels and exact masks, bit-equal on every machine.

Only additions, multiplications, divisions, floors and comparisons of float64 arrays are used,
which IEEE 754 defines exactly; no trigonometry, no powers, no sums over an axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..streams import Stream
from .scene import TURNS, Light, Scene, Thing

Reals = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]

PALETTE = {
    "red": (214, 40, 44),
    "green": (38, 160, 62),
    "blue": (36, 84, 214),
    "yellow": (240, 214, 40),
    "purple": (146, 52, 178),
    "white": (244, 244, 240),
    "orange": (242, 134, 24),
    "cyan": (44, 206, 214),
}

_STAR = (
    (0.0, -1.0),
    (0.2351, -0.3236),
    (0.9511, -0.309),
    (0.3804, 0.1236),
    (0.5878, 0.809),
    (0.0, 0.4),
    (-0.5878, 0.809),
    (-0.3804, 0.1236),
    (-0.9511, -0.309),
    (-0.2351, -0.3236),
)


def _circle(u: Reals, v: Reals) -> Bools:
    return u * u + v * v < 0.9


def _square(u: Reals, v: Reals) -> Bools:
    return np.maximum(np.abs(u), np.abs(v)) < 0.8


def _triangle(u: Reals, v: Reals) -> Bools:
    return (v < 0.72) & (1.75 * np.abs(u) - v < 0.95)


def _cross(u: Reals, v: Reals) -> Bools:
    a, b = np.abs(u), np.abs(v)
    return ((a < 0.34) & (b < 0.96)) | ((b < 0.34) & (a < 0.96))


def _ring(u: Reals, v: Reals) -> Bools:
    r = u * u + v * v
    return (r < 0.96) & (r > 0.27)


def _star(u: Reals, v: Reals) -> Bools:
    inside = np.zeros(u.shape, bool)
    for (ax, ay), (bx, by) in zip(_STAR, _STAR[1:] + _STAR[:1], strict=True):
        crosses = (ay > v) != (by > v)
        inside ^= crosses & (u < (bx - ax) * (v - ay) / (by - ay) + ax)
    return inside


def _diamond(u: Reals, v: Reals) -> Bools:
    return np.abs(u) + np.abs(v) < 1.0


def _moon(u: Reals, v: Reals) -> Bools:
    return (u * u + v * v < 0.96) & ((u - 0.5) * (u - 0.5) + v * v > 0.5)


_INSIDE: dict[str, Callable[[Reals, Reals], Bools]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "star": _star,
    "diamond": _diamond,
    "moon": _moon,
}


def _marks(pattern: str, u: Reals, v: Reals) -> Bools:
    """Where a pattern puts its second tone."""
    if pattern == "striped":
        return np.asarray(np.floor((u + v) * 2.2) % 2 == 0)
    if pattern == "checkered":
        return np.asarray((np.floor(u * 2.4) + np.floor(v * 2.4)) % 2 == 0)
    if pattern == "dotted":
        a, b = u * 1.7, v * 1.7
        a, b = a - np.floor(a) - 0.5, b - np.floor(b) - 0.5
        return a * a + b * b < 0.1
    return np.zeros(u.shape, bool)


@dataclass(frozen=True)
class Picture:
    """A rendered scene.

    image:  [size, size, 3] uint8 RGB.
    things: [size, size] uint8, 0 for background, i + 1 where thing i is what one sees.
    """

    image: Bytes
    things: Bytes


def paint(scene: Scene, size: int) -> tuple[Bytes, Bools]:
    """Who is seen at each pixel centre, and where that thing's pattern has its second tone."""
    seen = np.zeros((size, size), np.uint8)
    marks = np.zeros((size, size), bool)
    for index, thing in enumerate(scene.things):
        rows, columns, u, v = _local(thing, size)
        inside = _INSIDE[thing.shape](u, v)
        seen[rows, columns][inside] = index + 1
        marks[rows, columns][inside] = _marks(thing.pattern, u, v)[inside]
    return seen, marks


def _local(thing: Thing, size: int) -> tuple[slice, slice, Reals, Reals]:
    """The thing's window and the window's pixel centres in the thing's own turned, unit frame."""
    cos, sin = TURNS[thing.turn]
    low_x, high_x = _span(thing.x, thing.radius, size)
    low_y, high_y = _span(thing.y, thing.radius, size)
    dx = ((np.arange(low_x, high_x) + 0.5) / size - thing.x) / thing.radius
    dy = ((np.arange(low_y, high_y) + 0.5) / size - thing.y) / thing.radius
    u = cos * dx[None, :] + sin * dy[:, None]
    v = cos * dy[:, None] - sin * dx[None, :]
    return slice(low_y, high_y), slice(low_x, high_x), u, v


def _span(centre: float, radius: float, size: int) -> tuple[int, int]:
    reach = 1.25 * radius  # a turned unit square reaches beyond the radius
    return max(0, int((centre - reach) * size)), min(size, int((centre + reach) * size) + 2)


def render(scene: Scene, size: int) -> Picture:
    """Render at size x size pixels."""
    seen, marks = paint(scene, size)
    canvas = _background(scene, size)
    _cast_shadow(canvas, seen, scene.light, size)
    for index, thing in enumerate(scene.things):
        here = seen == index + 1
        colour = np.array(PALETTE[thing.colour], np.float64)
        canvas[here] = colour
        canvas[here & marks] = colour * 0.45
    return Picture(_photograph(canvas, scene.light, size), seen)


def _background(scene: Scene, size: int) -> Reals:
    tone = np.array(scene.tone, np.float64)
    grid = (np.arange(size) + 0.5) / size
    texture = np.zeros((size, size))
    if scene.background == "ramp":
        texture = (grid[:, None] + grid[None, :] - 1.0) * 40.0
    elif scene.background == "weave":
        texture = ((np.floor(grid * 23)[:, None] + np.floor(grid * 17)[None, :]) % 3 - 1.0) * 14.0
    elif scene.background == "cloud":
        texture = _cloud(Stream("cloud", scene.light.seed), size)
    canvas: Reals = tone[None, None, :] + texture[:, :, None]
    return canvas


def _cloud(stream: Stream, size: int) -> Reals:
    """Value noise: a 7 x 7 lattice, interpolated bilinearly."""
    lattice = stream.field(8, 8).astype(np.float64) / 255.0 - 0.5
    at = (np.arange(size) + 0.5) / size * 7.0
    low = np.floor(at).astype(np.int64)
    part = at - low
    rows = lattice[low] * (1.0 - part)[:, None] + lattice[low + 1] * part[:, None]
    noise: Reals = rows[:, low] * (1.0 - part)[None, :] + rows[:, low + 1] * part[None, :]
    return noise * 70.0


def _cast_shadow(canvas: Reals, seen: Bytes, light: Light, size: int) -> None:
    dx, dy = int(light.shadow[0] * size), int(light.shadow[1] * size)
    solid = seen > 0
    shade = np.zeros_like(solid)
    height, width = size - abs(dy), size - abs(dx)
    shade[max(dy, 0) :, max(dx, 0) :][:height, :width] = solid[max(-dy, 0) :, max(-dx, 0) :][
        :height, :width
    ]
    canvas[shade & ~solid] *= 0.62


def _photograph(canvas: Reals, light: Light, size: int) -> Bytes:
    """Light ramp, blur, noise, and rounding to bytes."""
    grid = (np.arange(size) + 0.5) / size - 0.5
    ramp = 1.0 + light.ramp_x * grid[None, :] + light.ramp_y * grid[:, None]
    canvas = canvas * ramp[:, :, None]
    if light.blur:
        canvas = _blur(canvas)
    if light.noise:
        noise = Stream("noise", light.seed).field(size, size, 3).astype(np.float64)
        canvas = canvas + (noise / 255.0 - 0.5) * (2.0 * light.noise)
    return np.floor(np.clip(canvas, 0.0, 255.0) + 0.5).clip(0, 255).astype(np.uint8)


def _blur(canvas: Reals) -> Reals:
    """The 3 x 3 binomial filter, edges repeated."""
    for axis in (0, 1):
        first = np.take(canvas, [0], axis)
        last = np.take(canvas, [-1], axis)
        padded = np.concatenate((first, canvas, last), axis)
        count = canvas.shape[axis]
        left, middle, right = (
            np.take(padded, np.arange(start, start + count), axis) for start in (0, 1, 2)
        )
        canvas = 0.25 * left + 0.5 * middle + 0.25 * right
    return canvas
