"""What was asked of GPU results, held against what was measured: rows of a table, no opinion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .peers import COMPILED, EAGER

LARGE = 64 << 20  # bytes of traffic
CHECKED = 2e-3  # relative error in float16
AGREEMENT = {"fp16": 0.999, "int8": 0.97}
FASTER = ("slvit-paper", "cm_masksd-paper")  # than PyTorch, end to end
OVERHEAD, OVERHEAD_MS = 0.05, 0.3

Row = tuple[str, str, str, bool]  # what, where, measured, whether it holds
Found = dict[str, Any]  # step to record


def bars(found: Found) -> list[Row]:
    """All that can be held against the results that are there."""
    return [*_kernels(found.get("kernels", {})), *_sanitizer(found), *_engines(found)]


def _kernels(record: dict[str, Any]) -> Iterator[Row]:
    for row in record.get("checks", []):
        name, dtype = row["key"]
        worst = [max(each) for each in row.get("errors", {}).values()]
        if "error" in row:
            yield "kernel runs", f"{name}, {dtype}", row["error"], False
        elif dtype == "float16":
            holds = row["same"] and max(worst) <= CHECKED
            yield f"error ≤ {CHECKED:g}", name, f"{max(worst):.1e}", holds
        elif not row["good"]:
            yield f"error ≤ {row['bar']:g}", f"{name}, {dtype}", f"{max(worst):.1e}", False
    for row in record.get("timings", []):
        if "error" in row:
            yield "kernel runs", " ".join(row["key"]), row["error"], False
            continue
        us = {form: each["median"] for form, each in row["us"].items() if "median" in each}
        where, many = f"{row['shape']}, batch {row['batch']}", row["key"][1]
        if row["bytes"] >= LARGE and many == "large":
            yield _at_least("of a copy's speed", where, us["copy"] / us["fused"], 0.8)
        if many == "one":
            ratio = us["fused"] / us["empty"]
            yield "≤ 1.5 × empty kernels", where, f"{ratio:.2f}", ratio <= 1.5
        if row["shape"] in ("slvit 1", "slvit 2", "slvit 3") and many != "eight":
            rivals = [t for form, t in us.items() if "compiled" in form or "sdpa" in form]
            if "unfused" in us:
                yield _at_least("× unfused", where, us["unfused"] / us["fused"], 2)
            if rivals:
                yield _at_least("× best of SDPA, compile", where, min(rivals) / us["fused"], 1.2)


def _sanitizer(found: Found) -> Iterator[Row]:
    for row in found.get("sanitizer", {}).get("tools", []):
        clean = row["verdict"] == "clean"
        yield "compute-sanitizer is clean", row["tool"], row["verdict"], clean


def _engines(found: Found) -> Iterator[Row]:
    for step, record in found.items():
        kind, _, model = step.partition("-")
        if kind not in ("engines", "plugin"):
            continue
        for plan, one in record["plans"].items():
            where = f"{model}, {plan}{', plugin' * (kind == 'plugin')}"
            if "error" in one:
                yield "engine runs", where, one["error"].splitlines()[0], False
                continue
            yield from _agreement(record, plan, one, where)
            yield from _overhead(one["milliseconds"], where)
            for part, timed in one.get("timed", {}).items():
                yield from _chosen(timed, f"{where}, {part}")
            if model in FASTER:
                peers = found.get(f"peers-{model}", {}).get("modes", {})
                ours = one["milliseconds"]["uncached"]["p50"]
                for mode, bar in ((EAGER, 3.0), (COMPILED, 1.2)):
                    if "end_to_end" in peers.get(mode, {}):
                        theirs = peers[mode]["end_to_end"]["uncached"]["p50"]
                        yield _at_least(f"× torch {mode}, end to end", where, theirs / ours, bar)


def _agreement(record: dict[str, Any], plan: str, one: dict[str, Any], where: str) -> Iterator[Row]:
    if record["provenance"].get("trained") and plan in AGREEMENT:
        scored = next(p for p in one["accuracy"] if p["plan"] == plan)
        yield _at_least("agreement", where, scored["agreement"]["mean"], AGREEMENT[plan])


def _overhead(spent: dict[str, Any], where: str) -> Iterator[Row]:
    """Of a run over the launch of its graph alone."""
    for name in spent:
        part, _, what = name.rpartition(" ")
        if what == "run" and f"{part} alone" in spent:
            run, alone = spent[name]["p50"], spent[f"{part} alone"]["p50"]
            more = run - alone
            holds = more <= max(OVERHEAD_MS, OVERHEAD * alone)
            said = f"{more:.3f} ms of {alone:.3f}"
            yield "overhead ≤ 5 % or 0.3 ms", f"{where}, {part}", said, holds


def _chosen(timed: dict[str, float | None], where: str) -> Iterator[Row]:
    """``refedge build`` keeps the fastest: shown, so that it can be seen which."""
    if timed:
        times = {name: f"{spent:.3f} ms" for name, spent in timed.items() if spent is not None}
        said = ", ".join(f"{name} {times.get(name, 'not timed')}" for name in timed)
        yield "faster one offered", where, said, True


def _at_least(what: str, where: str, measured: float, bar: float) -> Row:
    shown = f"{measured:.4f}" if bar < 1 else f"{measured:.2f}"
    return f"≥ {bar:g} {what}", where, shown, measured >= bar
