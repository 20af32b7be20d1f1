"""Engines of one part timed against each other, in a process of their own.

With plugins a part can be built in two ways, and only a run tells which is faster here: TensorRT's
own kernels are a moving target. Both are loaded by the runtime's own code and launched in turns, so
that clocks and other programs hit both alike (``build.py`` keeps the faster).

    python -m refedge.engines.race task.json result.json
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import EngineError, RefedgeError
from ..runtime.engine import EngineSpec
from ..runtime.files import write_atomically
from ..runtime.manifest import PartSpec
from .part import Shapes

WARM, ROUNDS = 10, 100


@dataclass(frozen=True)
class RaceTask:
    """What to time.

    engines: file and what is to be recorded of it.
    shapes:  as in ``PartTask``; the usual ones are timed. made: names of tensors that parts give.
    plugins: libraries to load first: path to SHA-256. host_code: engines for later versions too.
    """

    part: PartSpec
    engines: tuple[tuple[str, EngineSpec], ...]
    shapes: Shapes
    made: tuple[str, ...]
    plugins: dict[str, str] = field(default_factory=dict)
    host_code: bool = False


@dataclass(frozen=True)
class RaceResult:
    """Milliseconds of a run of each engine, medians."""

    milliseconds: tuple[float, ...] = ()
    error: tuple[str, str, str, str] | None = None  # code, what, why, fix


def race(task: RaceTask) -> tuple[float, ...]:
    """Load the engines and time them; raises EngineError, BackendError."""
    from ..runtime.backends.tensorrt import open_part

    plugins = {Path(path): sha256 for path, sha256 in task.plugins.items()}
    inputs = {
        t.name: noise(_usual(task.shapes, t.name, t.shape), t.dtype) for t in task.part.inputs
    }
    runs = []
    for file, spec in task.engines:
        data = Path(file).read_bytes()
        if hashlib.sha256(data).hexdigest() != spec.sha256:
            raise EngineError(
                "engine-damaged",
                f"{Path(file).name} is not the file that the builder wrote",
                why="its sha256 is not the one that it had a moment ago",
                fix="see that nothing else writes to that folder, and build again",
            )
        made = set(task.made)
        part = open_part(data, spec, task.part, made, plugins=plugins, host_code=task.host_code)
        for _ in range(WARM):
            part.run(inputs)
        runs.append(part.again)
    return in_turns(runs, ROUNDS)


def in_turns(runs: Sequence[Callable[[], Any]], rounds: int) -> tuple[float, ...]:
    """Median milliseconds of each; every other round goes backwards."""
    spent: list[list[float]] = [[] for _ in runs]
    turns = list(enumerate(runs))
    for i in range(rounds):
        for which, run in turns if i % 2 == 0 else reversed(turns):
            started = time.perf_counter()
            run()
            spent[which].append((time.perf_counter() - started) * 1e3)
    return tuple(statistics.median(each) for each in spent)


def noise(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """An input that is not zeros, which can run faster; words all count, ids and indices are 0."""
    values = np.random.default_rng(0)
    if dtype in ("int32", "bool"):
        return np.full(shape, dtype == "bool", dtype)
    drawn = 255 * values.random(shape) if dtype == "uint8" else values.normal(size=shape)
    return drawn.astype(dtype)


def _usual(shapes: Shapes, name: str, stated: Sequence[int | str]) -> tuple[int, ...]:
    if name in shapes:
        return shapes[name][1]
    return tuple(d for d in stated if isinstance(d, int))


def main(task_file: str, result_file: str) -> None:
    """Time what a file describes and write what came of it."""
    task = msgspec.json.decode(Path(task_file).read_bytes(), type=RaceTask)
    try:
        result = RaceResult(race(task))
    except RefedgeError as error:
        result = RaceResult(error=(error.code, error.what, error.why, error.fix))
    write_atomically(Path(result_file), msgspec.json.encode(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # both ran: what TensorRT does while a process ends says nothing of them
