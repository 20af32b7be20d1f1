"""The tables of the README, made from the records under ``benchmarks/results/``.

    python -m refedge.benchmarks.tables

writes them between the README's ``<!-- table: name -->`` and ``<!-- end -->``; a test holds the
README against the records.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = Path(__file__).parent.parent / "models" / "checkpoints"
README = Path(__file__).parent.parent / "README.md"
PLANS = ("torch", "fp32", "fp16", "int8")


def models(results: Path = RESULTS) -> str:
    """Model by plan: accuracy on the test split, and time per part, of the same artefacts."""
    lines = [
        "| model | plan | mIoU | agreement | text ms | image ms | mask ms | new | cached |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(results.glob("bench-*-tiny.json")):
        name = path.stem.removeprefix("bench-")
        speed = json.loads(path.read_bytes())
        scores = json.loads((results / f"eval-{name}.json").read_bytes())
        lines += _rows(name, speed, scores)
    return "\n".join(lines) + "\n"


def _rows(name: str, speed: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    accuracy = {p["plan"]: p for p in scores["plans"]}
    contestants = {c["name"]: c for c in speed["contestants"]}
    rows = []
    for plan in PLANS:
        timed, scored = contestants[plan], accuracy.get(plan)
        if scored is not None and scored["artefacts"] != timed["artefacts"]:
            raise ValueError(f"{name}, {plan}: speed and accuracy are of different artefacts")
        agreement = None if scored is None else scored["agreement"]
        stages = {n: timed["stages"][n]["p50"] for n in ("text", "image", "mask")}
        cells = [
            name if plan == PLANS[0] else "",
            plan,
            "-" if scored is None else f"{scored['overall']['miou']:.3f}",
            "-" if agreement is None else f"{agreement['mean']:.4f}",
            *(f"{ms:.2f}" if ms > 0.01 else "-" for ms in stages.values()),
            *(f"{timed['end_to_end'][k]['p50']:.1f}" for k in ("uncached", "cached")),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def plans(results: Path = RESULTS) -> str:
    """What each plan costs in accuracy, beside fp32 on the same expressions."""
    lines = [
        "| model | plan | mIoU | change, paired 95 % | agreement | worst 5 % | flips | graph |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(results.glob("eval-*-tiny.json")):
        for plan in json.loads(path.read_bytes())["plans"]:
            cells = [path.stem.removeprefix("eval-"), plan["plan"]]
            cells.append(f"{plan['overall']['miou']:.4f}")
            change, agreement = plan["miou_change"], plan["agreement"]
            if agreement is None:
                cells += ["-"] * 4
            else:
                cells.append(
                    f"{change['mean']:+.4f} ({change['low']:+.4f} … {change['high']:+.4f})"
                )
                cells += [f"{agreement['mean']:.4f}", f"{agreement['worst5']:.3f}"]
                cells.append(f"{100 * agreement['flips']:.1f} %")
            lines.append(f"| {' | '.join(cells)} | `{plan['artefacts']['mask'][:12]}…` |")
    return "\n".join(lines) + "\n"


def parity(results: Path = RESULTS) -> str:
    """Torch against the canonical graph and the one that users run, at the size of the papers."""
    lines = [
        "| model | logits, largest difference | mask IoU | mask graph |",
        "|---|---|---|---|",
    ]
    for path in sorted(results.glob("parity-*.json")):
        found = json.loads(path.read_bytes())
        ends = [run["end_to_end"] for run in found["parity"]["runs"].values()]
        cells = (
            path.stem.removeprefix("parity-"),
            f"{max(end['sigma'] for end in ends):.1e} σ",
            f"{min(end['iou'] for end in ends):.5f}",
            f"`{found['graphs']['canonical']['mask'][:12]}…`",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def scenes(results: Path = RESULTS) -> str:
    """Several expressions about one picture: together, and one by one."""
    lines = [
        "| model | plan | expressions | together ms | one by one ms | gain |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(results.glob("scene-*.json")):
        found = json.loads(path.read_bytes())
        for plan in found["plans"]:
            both, each = (plan[kind]["p50"] for kind in ("together", "one_by_one"))
            name = path.stem.removeprefix("scene-")
            cells = (name, plan["plan"], str(found["expressions"]), f"{both:.1f}", f"{each:.1f}")
            lines.append(f"| {' | '.join(cells)} | {each / both:.1f}× |")
    return "\n".join(lines) + "\n"


def demo(results: Path = RESULTS) -> str:
    """What ``make demo`` printed."""
    found = json.loads((results / "demo.json").read_bytes())
    rows = [found["header"], ["---"] * len(found["header"]), *found["rows"]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def checkpoints(folder: Path = CHECKPOINTS) -> str:
    """The shipped weights, and torch's mIoU with them on the whole test split."""
    families = ("attribute", "superlative", "extreme", "relation")
    lines = [
        f"| checkpoint | weights | pairs seen | {' | '.join(families)} | all | oIoU | N-acc |",
        "|---" * (6 + len(families)) + "|",
    ]
    for path in sorted(folder.glob("*/card.json")):
        card = json.loads(path.read_bytes())
        scores = card["scores"]["refshapes:test"]
        cells = (
            path.parent.name,
            f"`{card['sha256'][:12]}…`",
            f"{card['training']['pairs']:,}",
            *(f"{scores['families'][name]['miou']:.3f}" for name in families),
            *(f"{scores['overall'][name]:.3f}" for name in ("miou", "oiou", "n_acc")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


TABLES = {
    "checkpoints": checkpoints,
    "demo": demo,
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
    README.write_text(filled(README.read_text()))
