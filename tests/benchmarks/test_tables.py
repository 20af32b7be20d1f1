"""Tables come from records, and pages have the tables of the records."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from refedge.benchmarks import tables
from refedge.benchmarks.parity import record
from refedge.benchmarks.tables import filled, models, parity
from refedge.runtime.bundle import open_bundle


def test_the_models_table_refuses_to_mix_artefacts(tmp_path: Path) -> None:
    def plan(name: str, mask: str) -> dict[str, object]:
        series = {"p50": 1.25, "unstable": mask == "b"}
        return {
            "name": name,
            "plan": name,
            "artefacts": {"mask": mask},
            "stages": dict.fromkeys(("text", "image", "mask"), series),
            "end_to_end": dict.fromkeys(("uncached", "cached"), series),
            "overall": {"miou": 0.5},
            "agreement": {"mean": 0.99},
        }

    names = ("torch", "fp32", "fp16", "int8")
    speed = {"contestants": [plan(n, "a") for n in names]}
    (tmp_path / "bench-x-tiny.json").write_text(json.dumps(speed))
    scores = tmp_path / "eval-x-tiny.json"
    scores.write_text(json.dumps({"plans": [plan(n, "a") for n in names[1:]]}))
    text = models(tmp_path)
    assert text.count("\n") == 6
    assert "| x-tiny | torch | - | - | - | - | 1.25 | 1.2 | 1.2 |" in text
    assert "|  | int8 | 0.500 | 0.9900 |" in text
    scores.write_text(json.dumps({"plans": [plan(n, "b") for n in names[1:]]}))
    with pytest.raises(ValueError, match="different artefacts"):
        models(tmp_path)


def test_a_parity_record_names_the_graphs(bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(bundle)
    found = record(opened.manifest)
    for part, digest in found["graphs"]["canonical"].items():
        file = opened.file(opened.manifest.canonical.graphs[part])
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
    assert set(found["graphs"]) == {"canonical", *(d.name for d in opened.manifest.dialects)}
    (tmp_path / "parity-slvit-tiny.json").write_text(json.dumps(found))
    row = parity(tmp_path).splitlines()[2]
    assert row.startswith("| slvit-tiny | ")
    assert found["graphs"]["canonical"]["mask"][:12] in row


def side(median: float, speedup: float) -> dict[str, Any]:
    one = {"least": median, "median": median, "speedup": speedup}
    return {"cpu": one, "wall": {**one, "speedup": 1.5}}


def rewritten(threads: int, why: str) -> dict[str, Any]:
    """A model of two parts, whose mask part was 2.0 ms and is 1.0 by processor time."""
    both = {"before": side(2.0, 1.0), "after": side(1.0, 2.0)}
    shape = {"pixels": 900, "words": 17, "heads": 8, "channels": 512, "inner": 512, "out": 512}
    block = {"fold": {"folded": True, "why": why, "block": shape}, "ms": both}
    return {
        "model": "x:tiny",
        "plan": "fp32",
        "threads": threads,
        "graphs": {"before": {"text": "a", "mask": "b"}, "after": {"text": "a", "mask": "c"}},
        "stages": dict.fromkeys(("text", "mask", "new", "kept"), both),
        "branch": both["after"],
        "blocks": [block, block],
    }


def test_a_rewrite_is_told_by_the_clock_that_fits(tmp_path: Path) -> None:
    why = "estimated 2000 µs folded, 9000 µs as it was"
    rows = [rewritten(1, why), rewritten(2, why)]
    only = {k: rows[0][k] for k in ("graphs", "stages")}
    found = {"rows": rows, "alone": {"x:tiny": {"heads": only, "norm": {}}}}
    (tmp_path / "folding-paper.json").write_text(json.dumps(found))
    (tmp_path / "folding-tiny.json").write_text(json.dumps({"rows": [], "alone": {}}))
    lines = tables.folding(tmp_path).splitlines()[2:]
    assert lines[0] == "| x:tiny | fp32 | 1 | 2 of 2 | 2.00 | same | - | 2.00 | 2.00 | 2.00 | - |"
    assert lines[1] == "| x:tiny | fp32 | 2 | 2 of 2 | 1.50 | same | - | 1.50 | 1.50 | 1.50 | - |"
    (line,) = tables.blocks(tmp_path).splitlines()[2:]
    assert line.startswith("| x:tiny | 900 x 17, 512 | folded | 2 |")
    assert line.endswith("| 9.00 → 2.00 (4.50) | 2.00 → 1.00 (2.00) |")
    (line,) = tables.alone(tmp_path).splitlines()[2:]
    assert line == "| x:tiny | heads | same | 2.00 | 2.00 |"


def test_a_block_without_an_estimate_is_left_out(tmp_path: Path) -> None:
    found = {"rows": [rewritten(1, "its scores serve a softmax over pixels too")], "alone": {}}
    for size in ("paper", "tiny"):
        (tmp_path / f"folding-{size}.json").write_text(json.dumps(found))
    assert tables.blocks(tmp_path).count("\n") == 2


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda p: p.name)
def test_a_page_has_the_tables_of_the_records(page: Path) -> None:
    assert filled(page.read_text()) == page.read_text()
