"""Load time and peak memory of one contestant, each in a process of its own.

    python -m refedge.benchmarks.worker BUNDLE PLAN THREADS [MODEL]

prints ``{"load_ms": ..., "peak_rss": ...}``; PLAN ``torch`` runs the PyTorch model, found by the
bundle's provenance or by its name MODEL.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BackendError, RefedgeWarning


@dataclass(frozen=True)
class Footprint:
    """What a process spent that loads a contestant, segments one expression and ends.

    load_ms:  from the files to a model that is ready, bundle verified; packages were imported
              before, because their import measures byte code caches.
    peak_rss: bytes of the whole process, interpreter and packages included.
    """

    load_ms: float
    peak_rss: int


def footprint(bundle: Path, plan: str, threads: int, model: str | None = None) -> Footprint:
    """Start a worker and wait for it; raises BackendError ``bench-worker`` if it fails."""
    command = [sys.executable, "-m", __name__, str(bundle), plan, str(threads)]
    done = subprocess.run(
        command + ([model] if model else []), capture_output=True, text=True, check=False
    )
    try:
        if done.returncode:
            raise ValueError
        return Footprint(**json.loads(done.stdout))
    except (ValueError, TypeError) as error:
        lines = done.stderr.strip().splitlines() or ["it printed no result"]
        reason = next((line for line in reversed(lines) if "Error" in line), lines[-1])
        raise BackendError(
            "bench-worker",
            f"the process that measures load time and memory of {plan!r} failed",
            why=f"exit code {done.returncode}: {reason.strip()}",
            fix="run `python -m refedge.benchmarks.worker BUNDLE PLAN THREADS` to see all of it",
        ) from error


def main(arguments: Sequence[str]) -> None:
    """Load, run once, print."""
    bundle, plan, threads, *model = arguments
    warnings.simplefilter("ignore", RefedgeWarning)
    found = _measure(Path(bundle), plan, int(threads), model[0] if model else None)
    print(json.dumps({"load_ms": found.load_ms, "peak_rss": found.peak_rss}))


def _measure(path: Path, plan: str, threads: int, model: str | None) -> Footprint:
    from .contestants import TORCH
    from .timing import run_once, task_for

    runner, load_ms = _torch(path, threads, model) if plan == TORCH else _plan(path, plan, threads)
    run_once(runner, task_for(runner.bundle.manifest), 0, cached=False)
    return Footprint(load_ms, peak_rss())


def _plan(path: Path, plan: str, threads: int) -> tuple[Any, float]:
    import onnxruntime  # noqa: F401  so that its import is not timed

    from ..runtime.segmenter import load
    from .contestants import PlanRunner

    started = time.perf_counter()
    runner = PlanRunner(load(path, plan=plan, threads=threads))
    return runner, (time.perf_counter() - started) * 1e3


def _torch(path: Path, threads: int, model: str | None) -> tuple[Any, float]:
    import torch

    from ..models import checkpoint  # noqa: F401  so that its import is not timed
    from ..runtime.bundle import open_bundle
    from .contestants import TorchRunner, open_original

    torch.set_num_threads(threads)
    started = time.perf_counter()
    bundle = open_bundle(path)
    runner = TorchRunner(open_original(bundle.manifest, model).loaded, bundle)
    return runner, (time.perf_counter() - started) * 1e3


def peak_rss() -> int:
    """Largest resident set of this process, in bytes.

    On Linux from ``VmHWM``: ``ru_maxrss`` of a child process begins at what its parent had.
    """
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        text = ""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.M)
    if found:
        return int(found[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
