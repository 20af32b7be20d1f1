"""``refedge bench``: how fast each plan of a bundle is, beside PyTorch, in one interleaved run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, RefedgeWarning
from ..runtime.bundle import open_bundle
from ..runtime.files import write_json
from ..runtime.segmenter import Segmenter, load
from .accuracy import REFERENCE, artefacts
from .contestants import (
    SEEDED,
    TORCH,
    Original,
    PlanRunner,
    Runner,
    TorchRunner,
    open_original,
    torch_threads,
)
from .device import describe
from .records import damaged, decode_result, read_result
from .timing import (
    AT_MOST,
    CACHED,
    PARTS,
    SEED,
    STAGES,
    UNCACHED,
    WINDOW,
    WITHIN,
    Samples,
    Task,
    run_once,
    take_turn,
    take_turns,
    task_for,
    warm_up,
)
from .worker import Footprint, footprint

SCHEMA = "refedge-bench-1"
END_TO_END = (UNCACHED, CACHED)
WARM_UP_RUNS = "warm_up_runs"  # the one setting that is an outcome
ENOUGH = 8  # samples that can show a timing to be stable
SPREAD = 0.2  # interquartile range over median
DRIFT = 0.1  # between the medians of the two halves


@dataclass(frozen=True)
class Series:
    """Timings of one thing, in milliseconds, in the order they were taken."""

    samples: tuple[float, ...]
    p50: float
    p90: float
    p99: float
    unstable: bool


@dataclass(frozen=True)
class Contestant:
    """One plan on one backend, or PyTorch.

    stages:     ``preprocess``, ``tokenize``, ``text``, ``mask``, ``postprocess``.
    end_to_end: ``uncached`` (a new expression) and ``cached`` (one whose text part is kept).
    throughput: expressions per second, by the same two names.
    load_ms, peak_rss: of a process of its own, which loads, runs once and ends; bytes.
    file_bytes: graphs and weights on disk.
    artefacts:  SHA-256 of each graph, and of the checkpoint.
    """

    name: str
    backend: str
    dialect: str
    stages: dict[str, Series]
    end_to_end: dict[str, Series]
    throughput: dict[str, float]
    load_ms: float
    peak_rss: int
    file_bytes: int
    artefacts: dict[str, str]


@dataclass(frozen=True)
class Bench:
    """A whole run; ``settings`` holds image size, batch, threads, rounds, warm-up, seed."""

    model: str
    bundle: str
    settings: dict[str, Any]
    device: dict[str, Any]
    contestants: tuple[Contestant, ...]
    schema: str = SCHEMA


def bench(
    path: str | Path,
    *,
    plans: Sequence[str] | None = None,
    torch_model: bool | str | None = True,
    threads: int = 1,
    rounds: int = 30,
    backend: str = "auto",
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Bench:
    """Time plans of a bundle and the PyTorch model it was exported from, turn by turn.

    plans:       the bundle's plans to time; None for all.
    torch_model: True to find the model by the bundle's provenance, its name as ``refedge export``
                 takes it, or None for plans alone, which needs no torch installed.
    threads:     per operator, of ONNX Runtime and of torch.
    rounds:      samples of each; fewer than 8 cannot show that a timing is stable.
    backend:     of the plans, as ``refedge.load`` takes it.
    Raises BundleError ``bench-model`` or CheckpointError ``bench-checkpoint`` where the PyTorch
    model is not known or another one, and what ``refedge.load`` raises.
    """
    if rounds < 1:
        raise InputError(
            "bench-rounds",
            f"{rounds} rounds were asked for",
            why="each round gives one sample of each timing",
            fix="ask for 1 or more; 30 is usual",
        )
    path = Path(path)
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore", RefedgeWarning)  # words unknown to an open vocabulary
        bundle = open_bundle(path)
        names = plans or (REFERENCE, *bundle.manifest.plans)
        loaded = {n: load(path, plan=n, threads=threads, backend=backend) for n in names}
        runners: dict[str, Runner] = {}
        original = None
        if torch_model:
            name = torch_model if isinstance(torch_model, str) else None
            original = open_original(bundle.manifest, name)
            stack.enter_context(torch_threads(threads))
            runners[TORCH] = TorchRunner(original.loaded, bundle)
        runners |= {name: PlanRunner(segmenter) for name, segmenter in loaded.items()}
        task = task_for(bundle.manifest)
        warm, samples = _measure(runners, task, rounds, progress)
        contestants = []
        if original is not None:
            found = footprint(path, TORCH, threads, original.name)
            contestants.append(_of_torch(original, samples[TORCH], found))
        for name, segmenter in loaded.items():
            found = footprint(path, name, threads, backend=backend)
            contestants.append(_of_plan(segmenter, samples[name], found))
    spec = bundle.manifest.preprocess
    settings = {
        "picture": task.id,
        "picture_size": list(task.photo.shape[:2]),
        "image_size": [spec.height, spec.width],
        "expressions": list(task.expressions),
        "seed": SEED,
        "batch": 1,
        "threads": threads,
        "rounds": rounds,
        "warm_up": {"window": WINDOW, "within": WITHIN, "at_most": AT_MOST},
        WARM_UP_RUNS: warm,
    }
    manifest = bundle.manifest
    return Bench(manifest.model, manifest.digest, settings, describe(), tuple(contestants))


def _measure(
    runners: Mapping[str, Runner],
    task: Task,
    rounds: int,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> tuple[dict[str, int], dict[str, Samples]]:
    """Runs that the warm-up took, and samples, both by contestant."""

    def whole(runner: Runner) -> float:
        return run_once(runner, task, 0, cached=False)["total"]

    warm = {name: warm_up(partial(whole, runner)) for name, runner in runners.items()}
    samples: dict[str, Samples] = {name: {} for name in runners}
    turns = {
        name: partial(take_turn, runner, task, into=samples[name])
        for name, runner in runners.items()
    }
    take_turns(turns, rounds, progress)
    return warm, samples


def _of_torch(original: Original, samples: Samples, found: Footprint) -> Contestant:
    return Contestant(
        TORCH,
        TORCH,
        "eager fp32",
        *_series(samples),
        load_ms=found.load_ms,
        peak_rss=found.peak_rss,
        file_bytes=original.file_bytes,
        artefacts={"checkpoint": original.loaded.card.sha256 or SEEDED},
    )


def _of_plan(segmenter: Segmenter, samples: Samples, found: Footprint) -> Contestant:
    dialect, files = segmenter.dialect, segmenter.manifest.files
    return Contestant(
        segmenter.plan,
        segmenter.backend.name,
        dialect.name,
        *_series(samples),
        load_ms=found.load_ms,
        peak_rss=found.peak_rss,
        file_bytes=sum(files[f].bytes for f in {*dialect.graphs.values(), *dialect.files}),
        artefacts=artefacts(segmenter),
    )


def _series(samples: Samples) -> tuple[dict[str, Series], dict[str, Series], dict[str, float]]:
    """Stages, end to end, and expressions per second."""
    stages = {stage: series(samples[stage]) for stage in STAGES}
    whole = {name: series(samples[name]) for name in END_TO_END}
    throughput = {name: 1e3 / float(np.mean(s.samples)) for name, s in whole.items()}
    return stages, whole, throughput


def series(samples: Sequence[float]) -> Series:
    """Percentiles (linear between neighbours) of at least one timing in milliseconds.

    Unstable: fewer than 8 samples; or the interquartile range is more than 20 % of the median; or
    the medians of the first and the second half lie more than 10 % of the median apart.
    """
    values = tuple(round(float(s), 5) for s in samples)
    p25, p50, p75, p90, p99 = (float(p) for p in np.percentile(values, (25, 50, 75, 90, 99)))
    half = len(values) // 2
    unstable = (
        len(values) < ENOUGH
        or p75 - p25 > SPREAD * p50
        or abs(float(np.median(values[:half])) - float(np.median(values[-half:]))) > DRIFT * p50
    )
    return Series(values, p50, p90, p99, unstable)


def write_bench(result: Bench, path: Path) -> None:
    """Write the JSON that ``read_bench`` reads; ``docs/benchmarks.md`` describes it."""
    plain = asdict(result)
    write_json({"schema": plain.pop("schema"), **plain}, path)


def read_bench(path: Path) -> Bench:
    """Read and validate what ``write_bench`` wrote.

    Raises DataError ``data-missing``, ``result-damaged`` for what is no result or cut short, and
    ``result-kind`` for a result of something else.
    """
    _, raw = read_result(path, SCHEMA)
    return decode_bench(raw, path)


def decode_bench(raw: bytes, path: Path) -> Bench:
    """The same for bytes that were read from the path."""
    found: Bench = decode_result(raw, Bench, path)
    names = [c.name for c in found.contestants]
    if not names or len(names) != len(set(names)):
        raise damaged(path, f"its contestants are {', '.join(names) or 'none'}")
    for contestant in found.contestants:
        _require_whole(contestant, path)
    return found


def _require_whole(contestant: Contestant, path: Path) -> None:
    for said, wanted in (
        (contestant.stages, STAGES),
        (contestant.end_to_end, END_TO_END),
        (contestant.throughput, END_TO_END),
    ):
        if set(said) != set(wanted):
            raise damaged(path, f"{contestant.name} does not have {', '.join(wanted)}")
    for name, timing in (contestant.stages | contestant.end_to_end).items():
        if not timing.samples or min(timing.samples) < 0.0:
            raise damaged(path, f"{contestant.name}, {name}: no samples, or negative ones")
        if not 0.0 <= timing.p50 <= timing.p90 <= timing.p99:
            raise damaged(path, f"{contestant.name}, {name}: percentiles that do not rise")
    if min(s.p50 for s in contestant.end_to_end.values()) <= 0.0:
        raise damaged(path, f"{contestant.name} takes no time")


def table(result: Bench) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Title, header and rows for people: how fast, and how heavy."""
    base = next((c for c in result.contestants if c.backend == TORCH), None)
    speed, weight = [], []
    for c in result.contestants:
        new, kept = (c.end_to_end[name] for name in END_TO_END)
        faster = "-" if base is None else f"{base.end_to_end[UNCACHED].p50 / new.p50:.2f}×"
        shaky = [name for name, timing in c.end_to_end.items() if timing.unstable]
        timings = (new.p50, new.p90, new.p99, kept.p50, kept.p90, kept.p99)
        speed.append(
            [
                c.name,
                *(f"{c.stages[stage].p50:.2f}" for stage in PARTS),
                *(f"{ms:.2f}" for ms in timings),
                faster,
                ", ".join(shaky) or "no",
            ]
        )
        weight.append(
            [
                c.name,
                c.backend,
                c.dialect,
                *(f"{c.throughput[name]:.1f}" for name in END_TO_END),
                f"{c.load_ms:.0f}",
                *(f"{size / 1e6:.1f}" for size in (c.peak_rss, c.file_bytes)),
            ]
        )
    columns = ("", *PARTS, "new p50", "p90", "p99", "cached p50", "p90", "p99")
    s = result.settings
    title = f"ms per expression, batch 1, {s.get('threads')} thread(s), {s.get('rounds')} rounds"
    heavy = ("", "backend", "dialect", "new /s", "cached /s", "load ms", "peak RSS MB", "file MB")
    return [
        (title, (*columns, "vs torch", "unstable"), speed),
        ("throughput, load and size", heavy, weight),
    ]
