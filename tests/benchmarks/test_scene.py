from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from refedge.benchmarks import scene
from refedge.benchmarks.parity import record
from refedge.benchmarks.tables import README, filled, models, parity
from refedge.runtime.bundle import open_bundle


def test_both_ways_are_timed_and_recorded(bundle: Path, tmp_path: Path) -> None:
    times = scene.scene_times(bundle, count=3, plans=["fp32"], rounds=2)
    assert [t.plan for t in times] == ["fp32"]
    assert not times[0].image_part
    assert times[0].gain == times[0].one_by_one.p50 / times[0].together.p50 > 0
    assert len(times[0].together.samples) == 2
    scene.write_scene_times(times, tmp_path / "a.json", bundle, 3)
    record = json.loads((tmp_path / "a.json").read_bytes())
    assert record["bundle"] == open_bundle(bundle).manifest.digest
    assert record["expressions"] == 3
    header, rows = scene.table(times)
    assert len(header) == len(rows[0])


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


def test_the_readme_has_the_tables_of_the_records() -> None:
    assert filled(README.read_text()) == README.read_text()
