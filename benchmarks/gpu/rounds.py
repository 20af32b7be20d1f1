"""The clock of the GPU steps: series end to end, as ``refedge bench`` takes them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from ..bench import series
from ..contestants import Runner
from ..timing import run_once, task_for, warm_up


def end_to_end(runner: Runner, rounds: int) -> dict[str, Any]:
    """Milliseconds from a decoded picture and an expression to its mask: ``uncached``, ``cached``.

    Runner after runner has the device for itself: clocks are told by what is recorded around it.
    """
    task = task_for(runner.bundle.manifest)
    warm_up(lambda: run_once(runner, task, 0, cached=False)["total"])
    new = [run_once(runner, task, i, cached=False)["total"] for i in range(rounds)]
    runner.recall(runner.tokenize(task.expressions[0]))
    kept = [run_once(runner, task, 0, cached=True)["total"] for _ in range(rounds)]
    return {"uncached": short(new), "cached": short(kept)}


def clocked(run: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Milliseconds of something that waits until it is done."""
    for _ in range(3):
        run()
    samples = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        samples.append((time.perf_counter() - started) * 1e3)
    return short(samples)


def short(samples: list[float]) -> dict[str, Any]:
    """A series in a few numbers."""
    found = series(samples)
    return {"p50": found.p50, "p90": found.p90, "p99": found.p99,
            "mean": statistics.fmean(samples), "unstable": found.unstable}  # fmt: skip
