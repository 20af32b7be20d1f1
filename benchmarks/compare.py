"""``refedge compare``: is a result worse than the one before, on the same machine and data?

Numbers that cannot be compared are refused, not compared with a footnote: another kind of result,
another processor, another model, other data or other settings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, InputError
from .accuracy import SCHEMA as ACCURACY
from .bench import END_TO_END, WARM_UP_RUNS, Bench, Contestant, decode_bench
from .bench import SCHEMA as BENCH
from .contestants import TORCH
from .records import damaged, decode_result, read_result

_MACHINE = ("cpu", "cores", "flags")
_ROUNDING = 1e-9  # a change of exactly the limit is allowed


@dataclass(frozen=True)
class Comparison:
    """A table for people, and what is worse: one sentence per plan, empty where nothing is."""

    title: str
    header: tuple[str, ...]
    rows: list[list[str]]
    worse: tuple[str, ...]


@dataclass(frozen=True)
class Overall:
    """Scores of all expressions; mIoU is 0 to 1, None where it is undefined."""

    count: int
    miou: float | None


@dataclass(frozen=True)
class PlanScore:
    """What is compared of a plan's accuracy."""

    plan: str
    overall: Overall
    artefacts: dict[str, str]


@dataclass(frozen=True)
class AccuracyRecord:
    """What is compared of the JSON that ``refedge eval -o`` writes."""

    model: str
    data: str
    protocol: str
    scenes: int
    ids: tuple[str, ...]
    plans: tuple[PlanScore, ...]
    device: dict[str, Any]


def compare(before: Path, after: Path, *, slower: float, lower: float) -> Comparison:
    """Compare two results of ``bench``, or two of ``eval``.

    slower: by which share an end-to-end p50 may grow; timings that either run calls unstable are
            shown and not judged, and neither is PyTorch, the yardstick.
    lower:  by how much a plan's mIoU (0 to 1) may drop.
    A plan that ``after`` lacks is worse. Raises DataError ``result-kind``, ``result-device``,
    ``result-model``, ``result-data`` or ``result-settings`` for what cannot be compared.
    """
    for name, limit in (("slower", slower), ("lower", lower)):
        if not limit >= 0.0:
            raise InputError(
                "result-limit",
                f"the limit {name!r} is {limit}",
                why="it says how much worse is still allowed",
                fix="give 0 or more",
            )
    old, new = _read(before), _read(after)
    if isinstance(old, Bench) and isinstance(new, Bench):
        return _speeds(old, new, slower)
    if isinstance(old, AccuracyRecord) and isinstance(new, AccuracyRecord):
        return _scores(old, new, lower)
    raise DataError(
        "result-kind",
        f"{before} and {after} are results of different verbs",
        why="one holds timings, the other scores",
        fix="compare two results of `refedge bench`, or two of `refedge eval`",
    )


def _read(path: Path) -> Bench | AccuracyRecord:
    schema, raw = read_result(path, BENCH, ACCURACY)
    if schema == BENCH:
        return decode_bench(raw, path)
    found: AccuracyRecord = decode_result(raw, AccuracyRecord, path)
    names = [p.plan for p in found.plans]
    if not names or len(names) != len(set(names)):
        raise damaged(path, f"its plans are {', '.join(names) or 'none'}")
    return found


def _speeds(before: Bench, after: Bench, slower: float) -> Comparison:
    _same_model_and_machine(before, after)
    _same("result-settings", _settings(before), _settings(after))
    old = {c.name: c for c in before.contestants}
    new = {c.name: c for c in after.contestants}
    rows: list[list[str]] = []
    worse: list[str] = []
    for name, was in old.items():
        if name in new:
            for timing in END_TO_END:
                _judge_speed(was, new[name], timing, slower, rows, worse)
        elif was.backend == TORCH:
            rows.append([name, "", "", "-", "", "not timed after"])
        else:
            rows.append([name, "", "", "-", "", "MISSING"])
            worse.append(f"{name} is missing")
    rows += [[name, "", "-", "", "", "new"] for name in new if name not in old]
    header = ("plan", "text", "before p50 ms", "after p50 ms", "change", "verdict")
    return Comparison(_title("end to end", before, after), header, rows, tuple(worse))


def _judge_speed(
    was: Contestant,
    now: Contestant,
    timing: str,
    slower: float,
    rows: list[list[str]],
    worse: list[str],
) -> None:
    a, b = was.end_to_end[timing], now.end_to_end[timing]
    growth = b.p50 / a.p50 - 1.0
    verdict = "ok"
    if was.backend == TORCH:
        verdict = "yardstick, not judged"
    elif a.unstable or b.unstable:
        runs = [w for w, s in (("before", a), ("after", b)) if s.unstable]
        verdict = f"unstable {' and '.join(runs)}, not judged"
    elif growth > slower + _ROUNDING:
        verdict = "SLOWER"
        worse.append(
            f"{was.name}, {timing}: p50 grew by {100 * growth:.1f} % "
            f"({a.p50:.2f} to {b.p50:.2f} ms), {100 * slower:g} % are allowed"
        )
    change = f"{100 * growth:+.1f} %"
    rows.append([was.name, timing, f"{a.p50:.2f}", f"{b.p50:.2f}", change, verdict])


def _scores(before: AccuracyRecord, after: AccuracyRecord, lower: float) -> Comparison:
    _same_model_and_machine(before, after)
    _same("result-data", _data(before), _data(after))
    old = {p.plan: p.overall.miou for p in before.plans}
    new = {p.plan: p.overall.miou for p in after.plans}
    rows: list[list[str]] = []
    worse: list[str] = []
    for name, was in old.items():
        now = new.get(name)
        shown = [name, _score(was), _score(now)]
        if name not in new:
            rows.append([*shown, "", "MISSING"])
            worse.append(f"{name} is missing")
        elif was is None:
            rows.append([*shown, "", "undefined before, not judged"])
        elif now is None:
            rows.append([*shown, "", "UNDEFINED"])
            worse.append(f"{name}: mIoU was {was:.4f} and is undefined")
        elif was - now > lower + _ROUNDING:
            rows.append([*shown, f"{now - was:+.4f}", "LOWER"])
            worse.append(
                f"{name}: mIoU dropped by {was - now:.4f} ({was:.4f} to {now:.4f}), "
                f"{lower:g} is allowed"
            )
        else:
            rows.append([*shown, f"{now - was:+.4f}", "ok"])
    rows += [[name, "-", _score(new[name]), "", "new"] for name in new if name not in old]
    header = ("plan", "before mIoU", "after mIoU", "change", "verdict")
    title = _title(f"{before.data}, protocol {before.protocol}", before, after)
    return Comparison(title, header, rows, tuple(worse))


def _same_model_and_machine(before: Bench | AccuracyRecord, after: Bench | AccuracyRecord) -> None:
    old, new = ({k: r.device.get(k) for k in _MACHINE} for r in (before, after))
    _same("result-device", old, new)
    old, new = ({"model": r.model, "checkpoint": _checkpoint(r)} for r in (before, after))
    _same("result-model", old, new)


def _same(code: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuse where two descriptions differ; the code says of what."""
    keys = sorted(before.keys() | after.keys())
    differ = [
        f"{k}: {_short(before.get(k))} before, {_short(after.get(k))} after"
        for k in keys
        if before.get(k) != after.get(k)
    ]
    if differ:
        raise DataError(
            code,
            f"the two results have not the same {code.removeprefix('result-')}",
            why="; ".join(differ),
            fix="measure both in the same way on the same machine",
        )


def _checkpoint(result: Bench | AccuracyRecord) -> str | None:
    first = result.contestants[0] if isinstance(result, Bench) else result.plans[0]
    return first.artefacts.get("checkpoint")


def _settings(result: Bench) -> dict[str, Any]:
    return {k: v for k, v in result.settings.items() if k != WARM_UP_RUNS}


def _data(result: AccuracyRecord) -> dict[str, Any]:
    ids = hashlib.sha256("\n".join(result.ids).encode()).hexdigest()
    return {
        "data": result.data,
        "protocol": result.protocol,
        "scenes": result.scenes,
        "expressions": f"{len(result.ids)}, sha256 {ids[:16]}…",
    }


def _title(what: str, before: Bench | AccuracyRecord, after: Bench | AccuracyRecord) -> str:
    """What is compared, on which processor, and which packages changed."""
    a, b = (_packages(result.device) for result in (before, after))
    changed = [
        f"{name} {a.get(name, '-')} → {b.get(name, '-')}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]
    return ", ".join((f"{before.model}, {what}, {before.device.get('cpu')}", *changed))


def _packages(device: Mapping[str, Any]) -> dict[str, Any]:
    found = device.get("packages")
    return found if isinstance(found, dict) else {}


def _score(miou: float | None) -> str:
    return "-" if miou is None else f"{miou:.4f}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
