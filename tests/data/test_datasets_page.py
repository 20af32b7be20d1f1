"""docs/datasets.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from refedge.data.protocols import PROTOCOLS
from refedge.data.refer import DATASETS

PAGE = (Path(__file__).parents[2] / "docs/datasets.md").read_text()
WITHOUT = {"alike": "as any other", "apart": "N-acc alone", "within": "N-acc, gIoU, oIoU"}


def row(first: str) -> list[str]:
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_names_divisions_and_folders() -> None:
    named = re.findall(r"^\| `([^:`]+):(\w+)` \| (\w+) \| ([^;|]+)", PAGE, re.M)
    assert {name for name, *_ in named} == set(DATASETS)
    for name, split, division, splits in named:
        layout = DATASETS[name]
        assert division == layout.split_by[0]
        assert split in re.findall(r"\w+", splits) or split == "test"
        drawn = next(line for line in PAGE.splitlines() if line.startswith(f"  {name}/ "))
        assert all(f"{layout.refs}({d})." in drawn for d in layout.split_by)
        assert all(folder in PAGE for folder in layout.images)


def test_the_table_of_protocols() -> None:
    rules = list(PROTOCOLS.values())
    assert re.findall(
        r"`([\w-]+)`", next(s for s in PAGE.splitlines() if s.startswith("| | `"))
    ) == [p.name for p in rules]
    assert row("space") == [p.space for p in rules]
    assert row("text") == [p.text for p in rules]
    assert row("overlap") == [p.overlap for p in rules]
    assert row("a pixel is predicted if p >") == [str(p.threshold) for p in rules]
    assert row("P@X counts") == ["IoU > X" if p.strict else "IoU ≥ X" for p in rules]
    assert row("added to each IoU's union") == [f"{p.epsilon:g}" for p in rules]
    assert row("without target") == [WITHOUT[p.absent] for p in rules]
    assert all(p.no_target in (None, 50 / 480**2) for p in rules)
