"""The benchmark of folding compares like with like."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from refedge.benchmarks import folding


def test_a_bundle_against_itself(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = ("before", "norm", "after")
    monkeypatch.setattr(folding, "prepare", lambda *given: dict.fromkeys(variants, bundle))
    output = tmp_path / "folding.json"
    arguments = ["slvit:tiny", "-o", str(output), "--rounds", "1", "--plan", "fp32"]
    arguments += ["--threads", "1", "--work", str(tmp_path / "work")]
    done = CliRunner().invoke(folding.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    record = msgspec.json.decode(output.read_bytes())
    assert record["schema"] == folding.SCHEMA
    (row,) = record["rows"]
    assert (row["model"], row["plan"], row["threads"]) == ("slvit:tiny", "fp32", 1)
    assert row["bundles"]["before"] == row["bundles"]["after"]
    assert row["mask_iou"] == 1.0
    assert len(row["blocks"]) == 7
    for block in row["blocks"]:
        assert block["branch"].endswith(".fusion")
        assert block["differ"] == 0.0
        assert block["ms"]["before"]["cpu"]["speedup"] == 1.0
        assert not block["fold"]["folded"]
    assert set(row["stages"]) == {"text", "mask", "new", "kept"}
    assert set(row["branch"]) == {"wall", "cpu"}
    # the same graphs are not timed as if they were two
    assert record["alone"] == {"slvit:tiny": {"norm": {}}}


def test_a_norm_outside_any_fusion_is_a_branch_of_its_own() -> None:
    assert folding.branch_of("a.fusion.att.norm/InstanceNormalization_2") == "a.fusion"
    assert folding.branch_of("a.att/InstanceNormalization") == "a.att"


class Side:
    """Parts that take no time, and how often each was run."""

    def __init__(self, **hashes: str) -> None:
        self.hashes, self.parts = hashes, dict.fromkeys(hashes)
        self.runs: list[str] = []

    def run(self, part: str) -> None:
        self.runs.append(part)


def test_a_part_that_is_the_same_is_timed_once_and_counts_for_both() -> None:
    sides = {
        "before": Side(text="a", image="b", mask="c"),
        "after": Side(text="x", image="b", mask="z"),
    }
    found = folding.stages(sides, 3)  # type: ignore[arg-type]
    assert set(sides["before"].runs) == {"text", "image", "mask"}
    assert set(sides["after"].runs) == {"text", "mask"}
    assert set(found) == {"text", "image", "mask", "new", "kept", "again"}
    assert found["image"]["before"] == found["image"]["after"]
    assert found["image"]["after"]["wall"]["speedup"] == 1.0
    least = {name: row["after"]["wall"]["least"] for name, row in found.items()}
    assert least["new"] >= least["text"] + least["image"] + least["mask"]
    assert least["kept"] >= least["image"] + least["mask"]
    assert least["again"] >= least["text"] + least["mask"]
