from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refedge.benchmarks.accuracy import evaluate, open_data, score, table
from refedge.benchmarks.demo import gallery, side_by_side
from refedge.data.protocols import PROTOCOLS
from refedge.data.refshapes.dataset import RefShapes, Sample
from refedge.errors import DataError
from refedge.models.checkpoint import load_checkpoint
from refedge.runtime.manifest import PreprocessSpec
from refedge.runtime.segmenter import load


def oracle(sample: Sample) -> np.ndarray:
    masks = np.stack([sample.mask(e) for e in sample.expressions])
    return np.where(masks, 1.0, -1.0).astype(np.float32)


def test_an_oracle_scores_one() -> None:
    overall, families = score(oracle, RefShapes("val", scenes=10), PROTOCOLS["refshapes"])
    assert (overall.miou, overall.oiou, overall.object_accuracy, overall.n_acc) == (1, 1, 1, 1)
    assert overall.count == 40
    assert {n: s.count for n, s in families.items()} == {
        "attribute": 10, "superlative": 10, "extreme": 10, "relation": 10, "none": 0,
    }  # fmt: skip


def test_everything_scores_the_share_of_the_target() -> None:
    def everything(sample: Sample) -> np.ndarray:
        return np.ones((5, 96, 96), np.float32)

    samples = RefShapes("val", scenes=10)
    overall, _ = score(everything, samples, PROTOCOLS["refshapes"])
    shares = [s.mask(e).mean() for s in samples for e in s.expressions if e.target >= 0]
    assert overall.miou == pytest.approx(np.mean(shares))
    assert overall.n_acc == 0.0


def test_datasets_by_name() -> None:
    spec = PreprocessSpec(128, 128)
    data = open_data("refshapes-full:calibration", spec, scenes=3)
    assert (data.split, data.difficulty.name, data.size, len(data)) == (
        "calibration",
        "full",
        128,
        3,
    )
    assert open_data("refshapes:test", spec).difficulty.name == "lite"
    for name in ("refshapes", "refshapes:", "refcoco:val", "refshapes-hard:test"):
        with pytest.raises(DataError):
            open_data(name, spec)


def test_the_table_has_a_row_for_each_family(bundle: Path) -> None:
    seen: list[int] = []

    def watch(samples: RefShapes) -> RefShapes:
        seen.append(len(samples))
        return samples

    result = evaluate(load(bundle), "refshapes:val", scenes=3, progress=watch)  # type: ignore[arg-type]
    header, rows = table(result.families, result.overall)
    assert seen == [3]
    assert [r[0] for r in rows] == [
        "attribute",
        "superlative",
        "extreme",
        "relation",
        "none",
        "all",
    ]
    assert all(len(r) == len(header) for r in rows)
    assert result.record()["overall"]["count"] == 12


def test_torch_and_bundle_score_alike(bundle: Path) -> None:
    model = load_checkpoint("slvit-tiny").model
    result = side_by_side(model, load(bundle, threads=1), 6, iter)
    torch_row, ours = result.rows
    assert result.header[3] == "mIoU"
    assert set(result.artefacts) == {"text", "mask", "checkpoint"}
    assert result.record()["device"]["cores"] >= 1
    assert torch_row[3:] == ours[3:]  # to the three digits that are printed
    assert all(float(v) > 0 for v in ours[1:3])


def test_the_gallery_shows_every_family(bundle: Path, tmp_path: Path) -> None:
    path = gallery(load(bundle), tmp_path / "gallery.png", scenes=2)
    assert Image.open(path).size == (5 * 192, 2 * 222)
