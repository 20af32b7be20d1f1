"""The clock of ``refedge bench``: one timed run, warm-up, and rounds in which all take turns.

Contestants alternate within one process, so that what changes in the machine meanwhile (clock
rate, neighbours) meets all of them alike. Times are ``perf_counter`` milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..data.refshapes.dataset import RefShapes
from ..runtime.manifest import Manifest
from ..runtime.masks import to_mask
from ..runtime.preprocess import open_photo, to_pixels
from .contestants import Runner

PARTS = ("text", "image", "mask")
STAGES = ("preprocess", "tokenize", *PARTS, "postprocess")
UNCACHED, CACHED = "uncached", "cached"
SEED = 0  # index of the test scene

WINDOW = 5  # runs whose median is compared with that of the runs before
WITHIN = 0.05
AT_MOST = 50  # runs
SHORT = 100.0  # milliseconds; shorter runs are preceded by an untimed one

Clocks = dict[str, list[float]]  # ``wall`` and ``cpu``, milliseconds
Key = TypeVar("Key", bound=Hashable)
Samples = dict[str, list[float]]  # stages, ``uncached`` and ``cached``


@dataclass(frozen=True)
class Task:
    """What is asked: a [H, W, 3] uint8 picture, decoded, and expressions about it."""

    id: str
    photo: npt.NDArray[np.uint8]
    expressions: tuple[str, ...]


def task_for(manifest: Manifest) -> Task:
    """A RefShapes scene at twice the model's size, so that the host has to resize both ways."""
    spec = manifest.preprocess
    sample = RefShapes("test", size=min(4096, 2 * max(spec.height, spec.width)))[SEED]
    return Task(sample.id, sample.image, tuple(e.text for e in sample.expressions))


def run_once(runner: Runner, task: Task, index: int, *, cached: bool) -> dict[str, float]:
    """Milliseconds of each stage, and their whole as ``total``, of one expression end to end."""
    manifest = runner.bundle.manifest
    expression = task.expressions[index % len(task.expressions)]
    marks = [time.perf_counter()]
    photo = open_photo(task.photo)
    pixels = to_pixels(photo, manifest.preprocess)
    marks.append(time.perf_counter())
    tokens = runner.tokenize(expression)
    marks.append(time.perf_counter())
    products = runner.recall(tokens) if cached else runner.text(tokens)
    marks.append(time.perf_counter())
    features = runner.image(pixels)
    marks.append(time.perf_counter())
    logits = runner.mask(features, tokens, products)
    marks.append(time.perf_counter())
    to_mask(logits, photo.size, manifest.postprocess, manifest.preprocess.frame(photo.size))
    marks.append(time.perf_counter())
    spent = [(b - a) * 1e3 for a, b in pairwise(marks)]
    return {**dict(zip(STAGES, spent, strict=True)), "total": (marks[-1] - marks[0]) * 1e3}


def take_turn(runner: Runner, task: Task, index: int, into: Samples) -> None:
    """One sample of each: the expression as a new one, then with its text part kept.

    An untimed run goes before, because the contestant before has emptied the caches of the
    processor; it also keeps the text part for the cached run.
    """
    run_once(runner, task, index, cached=False)
    runner.recall(runner.tokenize(task.expressions[index % len(task.expressions)]))
    uncached = run_once(runner, task, index, cached=False)
    for stage in STAGES:
        into.setdefault(stage, []).append(uncached[stage])
    into.setdefault(UNCACHED, []).append(uncached["total"])
    cached = run_once(runner, task, index, cached=True)
    into.setdefault(CACHED, []).append(cached["total"])


def warm_up(run: Callable[[], float]) -> int:
    """Run until the medians of two windows in a row differ by less than 5 %, or 50 times.

    ``run`` returns how long it took; the result is how often it ran.
    """
    before = None
    for done in range(WINDOW, AT_MOST + 1, WINDOW):
        now = statistics.median(run() for _ in range(WINDOW))
        if before is not None and abs(now - before) < WITHIN * before:
            return done
        before = now
    return AT_MOST


def take_turns(
    turns: Mapping[Key, Callable[[int], None]],
    rounds: int,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> None:
    """Call every contestant once per round; each round another one begins."""
    names = list(turns)
    for index in progress(range(rounds)):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            turns[name](index)


def clocked(runs: Mapping[Key, Callable[[], object]], rounds: int) -> dict[Key, Clocks]:
    """Milliseconds of each in turns, on both clocks.

    An untimed run goes before every short one, whose inputs others drove out of the caches.
    """
    spent: dict[Key, Clocks] = {key: {"wall": [], "cpu": []} for key in runs}

    def turn(key: Key) -> Callable[[int], None]:
        def take(_: int) -> None:
            if not spent[key]["wall"] or spent[key]["wall"][-1] < SHORT:
                runs[key]()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[key]()
            spent[key]["cpu"].append((time.process_time() - cpu) * 1e3)
            spent[key]["wall"].append((time.perf_counter() - wall) * 1e3)

        return take

    take_turns({key: turn(key) for key in runs}, rounds, iter)
    return spent


def summary(spent: Mapping[str, Clocks]) -> dict[str, dict[str, dict[str, float]]]:
    """``speedup``: the median over rounds of the first one's time divided by its own."""
    base = next(iter(spent.values()))
    return {
        name: {
            clock: {
                "least": min(samples),
                "median": statistics.median(samples),
                "speedup": statistics.median(
                    b / a for a, b in zip(samples, base[clock], strict=True)
                ),
            }
            for clock, samples in clocks.items()
        }
        for name, clocks in spent.items()
    }
