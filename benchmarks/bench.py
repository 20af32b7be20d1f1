"""``refedge bench``: how fast each plan of a bundle is, beside PyTorch, in one interleaved run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCHEMA = "refedge-bench-1"


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
