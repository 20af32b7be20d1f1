"""The tables of the README, made from the records under ``benchmarks/results/``.

    python -m refedge.benchmarks.tables

prints them; a test holds the README against it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
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


if __name__ == "__main__":
    print(models())
