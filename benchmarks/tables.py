"""The tables of the README and of docs/folding.md, made from ``benchmarks/results/``.

    python -m refedge.benchmarks.tables

writes them between a page's ``<!-- table: name -->`` and ``<!-- end -->``; a test holds the
pages against the records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .timing import CACHED, PARTS, UNCACHED

RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = Path(__file__).parent.parent / "models" / "checkpoints"
README = Path(__file__).parent.parent / "README.md"
PAGES = (README, README.parent / "docs" / "folding.md")
PLANS = ("torch", "fp32", "fp16", "int8")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (header, ["---"] * len(header), *rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _records(pattern: str, results: Path) -> Iterator[tuple[str, Any]]:
    """Name and contents of each record, such as ``bench-*-tiny.json``."""
    for path in sorted(results.glob(pattern)):
        yield path.stem.partition("-")[2], json.loads(path.read_bytes())


def _ms(timing: dict[str, Any]) -> str:
    """The median; marked where the run called itself unstable."""
    return f"{timing['p50']:.1f}{' ~' if timing['unstable'] else ''}"


def models(results: Path = RESULTS) -> str:
    """Model by plan: accuracy on the test split, and time per part, of the same artefacts."""
    parts = (f"{part} ms" for part in PARTS)
    rows: list[list[str]] = []
    for name, speed in _records("bench-*-tiny.json", results):
        scores = json.loads((results / f"eval-{name}.json").read_bytes())
        rows += _rows(name, speed, scores)
    return _table(("model", "plan", "mIoU", "agreement", *parts, "new", "cached"), rows)


def _rows(name: str, speed: dict[str, Any], scores: dict[str, Any]) -> list[list[str]]:
    accuracy = {p["plan"]: p for p in scores["plans"]}
    contestants = {c["name"]: c for c in speed["contestants"]}
    has = contestants["fp32"]["artefacts"]  # parts, by name
    rows = []
    for plan in PLANS:
        timed, scored = contestants[plan], accuracy.get(plan)
        if scored is not None and scored["artefacts"] != timed["artefacts"]:
            raise ValueError(f"{name}, {plan}: speed and accuracy are of different artefacts")
        agreement = None if scored is None else scored["agreement"]
        cells = [
            name if plan == PLANS[0] else "",
            plan,
            "-" if scored is None else f"{scored['overall']['miou']:.3f}",
            "-" if agreement is None else f"{agreement['mean']:.4f}",
            *(f"{timed['stages'][n]['p50']:.2f}" if n in has else "-" for n in PARTS),
            *(_ms(timed["end_to_end"][k]) for k in (UNCACHED, CACHED)),
        ]
        rows.append(cells)
    return rows


def plans(results: Path = RESULTS) -> str:
    """What each plan costs in accuracy, beside fp32 on the same expressions."""
    rows = []
    for name, scores in _records("eval-*-tiny.json", results):
        for plan in scores["plans"]:
            change, agreement = plan["miou_change"], plan["agreement"]
            cost = ["-"] * 4
            if agreement is not None:
                low, high = change["low"], change["high"]
                cost = [
                    f"{change['mean']:+.4f} ({low:+.4f} … {high:+.4f})",
                    f"{agreement['mean']:.4f}",
                    f"{agreement['worst5']:.3f}",
                    f"{100 * agreement['flips']:.1f} %",
                ]
            miou = f"{plan['overall']['miou']:.4f}"
            rows.append([name, plan["plan"], miou, *cost, _short(plan["artefacts"]["mask"])])
    change_and_rest = ("change, paired 95 %", "agreement", "worst 5 %", "flips", "mask graph")
    return _table(("model", "plan", "mIoU", *change_and_rest), rows)


def _short(digest: str) -> str:
    return f"`{digest[:12]}…`"


def parity(results: Path = RESULTS) -> str:
    """Torch against the canonical graph and the one that users run."""
    rows = []
    for name, found in _records("parity-*.json", results):
        ends = [run["end_to_end"] for run in found["parity"]["runs"].values()]
        sigma, iou = max(end["sigma"] for end in ends), min(end["iou"] for end in ends)
        graph = _short(found["graphs"]["canonical"]["mask"])
        rows.append([name, f"{sigma:.1e} σ", f"{iou:.5f}", graph])
    return _table(("model", "logits, largest difference", "mask IoU", "canonical mask graph"), rows)


def scenes(results: Path = RESULTS) -> str:
    """Several expressions about one picture: together, and one by one."""
    rows = []
    for name, found in _records("scene-*.json", results):
        for plan in found["plans"]:
            both, each = plan["together"], plan["one_by_one"]
            gain = f"{each['p50'] / both['p50']:.1f}×"
            rows.append([name, plan["plan"], str(found["expressions"]), _ms(both), _ms(each), gain])
    header = ("model", "plan", "expressions", "together ms", "one by one ms", "gain")
    return _table(header, rows)


def _rewritten(results: Path) -> Iterator[dict[str, Any]]:
    """The records of ``benchmarks.folding``: all models at paper size, then tiny."""
    for size in ("paper", "tiny"):
        yield json.loads((results / f"folding-{size}.json").read_bytes())


def _gain(row: dict[str, Any], stage: str, clock: str) -> str:
    """How many times as fast; ``same`` where both sides have the same graph."""
    if stage not in row["stages"]:
        return "-"
    hashes = [row["graphs"][side].get(stage) for side in ("before", "after")]
    if hashes[0] is not None and hashes[0] == hashes[1]:
        return "same"
    return f"{row['stages'][stage]['after'][clock]['speedup']:.2f}"


def folding(results: Path = RESULTS) -> str:
    """How many times as fast all exact rewrites make a model."""
    stages = (*PARTS, "new", "kept", "again")
    rows = []
    for row in (row for record in _rewritten(results) for row in record["rows"]):
        clock = "cpu" if row["threads"] == 1 else "wall"
        done = [block["fold"]["folded"] for block in row["blocks"]]
        folded = f"{sum(done)} of {len(done)}" if row["plan"] == "fp32" else "-"
        branch = f"{row['branch'][clock]['speedup']:.2f}" if row["branch"] else "-"
        name = [row["model"], row["plan"], str(row["threads"]), folded, branch]
        rows.append([*name, *(_gain(row, stage, clock) for stage in stages)])
    return _table(("model", "plan", "threads", "folded", "blocks", *stages), rows)


def blocks(results: Path = RESULTS) -> str:
    """What the cost model said of blocks of one shape, and what they took: fp32, one thread."""
    groups: dict[tuple[str, ...], list[tuple[float, ...]]] = {}
    for row in (row for record in _rewritten(results) for row in record["rows"]):
        for block in row["blocks"] if row["threads"] == 1 else ():
            fold, shape = block["fold"], block["fold"]["block"]
            said = re.match(r"estimated (\d+) µs folded, (\d+) µs as it was", fold["why"])
            if said is None:
                continue
            spent = (block["ms"][side]["cpu"]["median"] for side in ("before", "after"))
            sizes = f"{shape['pixels']} x {shape['words']}, {shape['channels']}"
            key: tuple[str, ...] = (row["model"], sizes, "folded" if fold["folded"] else "left")
            groups.setdefault(key, []).append((int(said[2]) / 1e3, int(said[1]) / 1e3, *spent))
    rows = []
    for key, found in groups.items():
        mean = [sum(column) / len(found) for column in zip(*found, strict=True)]
        pairs = (f"{a:.2f} → {b:.2f} ({a / b:.2f})" for a, b in (mean[:2], mean[2:]))
        rows.append([*key, str(len(found)), *pairs])
    header = ("model", "pixels x words, channels", "", "blocks", "estimated, ms", "measured, ms")
    return _table(header, rows)


def alone(results: Path = RESULTS) -> str:
    """Each rewrite by itself, where it changes a graph: fp32, one thread."""
    stages = ("text", "mask", "new")
    rows = []
    for model, each in (item for r in _rewritten(results) for item in r["alone"].items()):
        for rewrite, row in each.items():
            if row:
                rows.append([model, rewrite, *(_gain(row, stage, "cpu") for stage in stages)])
    return _table(("model", "rewrite", *stages), rows)


def demo(results: Path = RESULTS) -> str:
    """What ``make demo`` printed."""
    found = json.loads((results / "demo.json").read_bytes())
    return _table(found["header"], found["rows"])


def checkpoints(folder: Path = CHECKPOINTS) -> str:
    """The shipped weights, and torch's mIoU with them on the whole test split."""
    families = ("attribute", "superlative", "extreme", "relation")
    rows = []
    for path in sorted(folder.glob("*/card.json")):
        card = json.loads(path.read_bytes())
        scores, training = card["scores"]["refshapes:test"], card["training"]
        row = [path.parent.name, _short(card["sha256"]), f"{training['recipe']['steps']:,}"]
        row += [f"{scores['families'][name]['miou']:.3f}" for name in families]
        row += [f"{scores['overall'][name]:.3f}" for name in ("miou", "oiou", "n_acc")]
        rows.append(row)
    header = ("checkpoint", "weights", "steps", *families, "all", "oIoU", "N-acc")
    return _table(header, rows)


TABLES = {
    "alone": alone,
    "blocks": blocks,
    "checkpoints": checkpoints,
    "demo": demo,
    "folding": folding,
    "models": models,
    "parity": parity,
    "plans": plans,
    "scenes": scenes,
}
_PLACE = re.compile(r"(?<=<!-- table: )(\w+) -->\n.*?(?=<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with every table as the records have it."""
    return _PLACE.sub(lambda found: f"{found[1]} -->\n{TABLES[found[1]]()}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
