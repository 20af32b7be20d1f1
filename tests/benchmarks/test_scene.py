from __future__ import annotations

import json
from pathlib import Path

from refedge.benchmarks import scene
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
