"""The benchmark of folding compares like with like."""

from __future__ import annotations

from pathlib import Path

import msgspec
from click.testing import CliRunner
from refedge.benchmarks.folding import SCHEMA, branch_of, main


def test_a_bundle_against_itself(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "folding.json"
    arguments = [str(bundle), str(bundle), "-o", str(output), "--rounds", "1"]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    record = msgspec.json.decode(output.read_bytes())
    assert record["schema"] == SCHEMA
    assert record["bundles"]["before"] == record["bundles"]["after"]
    assert record["mask_iou"] == 1.0
    assert len(record["blocks"]) == 7
    for block in record["blocks"]:
        assert block["branch"].endswith(".fusion")
        assert block["differ"] == 0.0
        assert block["ms"]["before"]["cpu"]["speedup"] == 1.0
        assert not block["fold"]["folded"]
    assert set(record["parts"]) == {"text", "mask"}
    assert set(record["branch"]) == {"wall", "cpu"}


def test_a_norm_outside_any_fusion_is_a_branch_of_its_own() -> None:
    assert branch_of("a.fusion.att.norm/InstanceNormalization_2") == "a.fusion"
    assert branch_of("a.att/InstanceNormalization") == "a.att"
