"""The benchmark of folding compares like with like."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from refedge.benchmarks import folding, gelu


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


def test_both_forms_of_a_gelu_give_the_same_bytes() -> None:
    record = gelu.measure(1, ((3, 16, 16),))
    assert [row["same"] for row in record["rows"]] == [True]
    assert set(record["rows"][0]["ms"]) == {"pieces", "table"}


def test_a_norm_outside_any_fusion_is_a_branch_of_its_own() -> None:
    assert folding.branch_of("a.fusion.att.norm/InstanceNormalization_2") == "a.fusion"
    assert folding.branch_of("a.att/InstanceNormalization") == "a.att"
