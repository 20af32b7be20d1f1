"""Load time and peak memory of one contestant, each in a process of its own.

    python -m refedge.benchmarks.worker BUNDLE PLAN THREADS [NAME]

prints ``{"load_ms": ..., "peak_rss": ...}``; PLAN ``torch`` runs the PyTorch model, found by the
bundle's provenance or by its NAME; for another plan, NAME is the backend.
"""

from __future__ import annotations

import contextlib
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


def footprint(
    bundle: Path, plan: str, threads: int, model: str | None = None, *, backend: str = "auto"
) -> Footprint:
    """Start a worker and wait for it; raises BackendError ``bench-worker`` if it fails."""
    from .contestants import TORCH

    command = [sys.executable, "-m", __name__, str(bundle), plan, str(threads)]
    more = [model] if model else [] if plan == TORCH else [backend]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
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
            fix="run `python -m refedge.benchmarks.worker BUNDLE PLAN THREADS NAME` to see all",
        ) from error


def main(arguments: Sequence[str]) -> None:
    """Load, run once, print."""
    bundle, plan, threads, *name = arguments
    warnings.simplefilter("ignore", RefedgeWarning)
    found = _measure(Path(bundle), plan, int(threads), name[0] if name else None)
    print(json.dumps({"load_ms": found.load_ms, "peak_rss": found.peak_rss}))


def _measure(path: Path, plan: str, threads: int, name: str | None) -> Footprint:
    from .contestants import TORCH
    from .timing import run_once, task_for

    if plan == TORCH:
        runner, load_ms = _torch(path, threads, name)
    else:
        runner, load_ms = _plan(path, plan, threads, name or "auto")
    run_once(runner, task_for(runner.bundle.manifest), 0, cached=False)
    return Footprint(load_ms, peak_rss())


def _plan(path: Path, plan: str, threads: int, backend: str) -> tuple[Any, float]:
    with contextlib.suppress(ImportError):  # a board with engines may do without
        import onnxruntime  # noqa: F401  so that its import is not timed

    from ..runtime.segmenter import load
    from .contestants import PlanRunner

    started = time.perf_counter()
    runner = PlanRunner(load(path, plan=plan, threads=threads, backend=backend))
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
