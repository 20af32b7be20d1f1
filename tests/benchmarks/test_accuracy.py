from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refedge.benchmarks import accuracy as module
from refedge.benchmarks.accuracy import (
    SHOWN,
    Accuracy,
    _Tally,
    changes,
    evaluate,
    open_plans,
    paired_change,
    table,
)
from refedge.benchmarks.contestants import open_original
from refedge.benchmarks.demo import gallery, torch_scores
from refedge.data.items import Item, Items, open_items
from refedge.data.protocols import PROTOCOLS
from refedge.errors import BackendError, DataError
from refedge.runtime.manifest import PreprocessSpec
from refedge.runtime.segmenter import load

RULES = PROTOCOLS["refshapes"]


def shapes(data: str, scenes: int) -> Items:
    return open_items(data, PreprocessSpec(96, 96), RULES, limit=scenes)


def tally(items: Items, answer: object, reference: _Tally | None = None) -> _Tally:
    """Score an answer, a function of an item's query, as one plan."""
    found = _Tally("plan", RULES)
    for item in items:
        found.add(item, [answer(q) for q in item.queries], None)  # type: ignore[operator]
    return found


def test_an_oracle_scores_one() -> None:
    meter = tally(shapes("refshapes:val", 10), lambda q: q.truth)._meter
    overall = meter.scores()
    assert (overall.miou, overall.oiou, overall.object_accuracy, overall.n_acc) == (1, 1, 1, 1)
    assert overall.count == 40
    assert {n: s.count for n, s in meter.by_family().items()} == {
        "attribute": 10, "superlative": 10, "extreme": 10, "relation": 10, "none": 0,
    }  # fmt: skip


def test_everything_scores_the_share_of_the_target() -> None:
    items = shapes("refshapes:val", 10)
    overall = tally(items, lambda q: np.ones((96, 96), bool))._meter.scores()
    shares = [q.truth.mean() for item in items for q in item.queries if q.target]
    assert overall.miou == pytest.approx(np.mean(shares))
    assert overall.n_acc == 0.0


def test_a_plan_agrees_with_itself(bundle: Path) -> None:
    segmenter = load(bundle)
    result = evaluate(
        {"fp32": segmenter, "copy": segmenter}, shapes("refshapes:val", 4), RULES, "refshapes:val"
    )
    reference, copy = result.plans
    assert reference.agreement is None
    assert reference.agreements == ()
    assert (copy.agreement.mean, copy.agreement.worst5, copy.agreement.flips) == (1, 1, 0)
    assert (copy.miou_change.mean, copy.miou_change.low, copy.miou_change.high) == (0, 0, 0)
    assert copy.ious == reference.ious
    assert len(result.ids) == len(copy.agreements) == 20


@pytest.fixture(scope="module")
def scored(quantized: Path) -> Accuracy:
    seen: list[int] = []

    def watch(items: Iterable[Item]) -> Iterable[Item]:
        for item in items:
            seen.append(len(item.queries))
            yield item

    items = shapes("refshapes:test", 12)
    result = evaluate(open_plans(quantized, (), 1), items, RULES, "refshapes:test", progress=watch)
    assert seen == [5] * 12
    return result


def test_plans_beside_fp32(scored: Accuracy) -> None:
    plans = {p.plan: p for p in scored.plans}
    assert list(plans) == ["fp32", "fp16", "int8", "naive"]
    # 60 expressions: fp16 rounds weights to 11 bits and flips a pixel or two of a mask; int8 keeps
    # nearly all of every mask; naive int8 cannot read the expression any more
    assert plans["fp16"].agreement.mean > 0.995
    assert plans["int8"].agreement.mean > 0.9
    assert plans["naive"].agreement.mean < 0.5
    assert plans["naive"].miou_change.high < 0.0
    for plan in scored.plans:
        assert set(plan.artefacts) == {"text", "mask", "checkpoint"}
    assert len({plan.artefacts["mask"] for plan in scored.plans}) == 4


def test_the_worst_are_kept_and_ordered(scored: Accuracy) -> None:
    for plan in scored.plans[1:]:
        kept = [d.agreement for d in scored.worst if d.plan == plan.plan]
        assert kept == sorted(kept)
        assert kept == pytest.approx(sorted(plan.agreements)[:SHOWN], abs=1e-5)


def test_tables_and_record(scored: Accuracy) -> None:
    header, rows = table(scored)
    assert [r[1] for r in rows[:6]] == [
        "attribute", "superlative", "extreme", "relation", "none", "all",
    ]  # fmt: skip
    assert all(len(r) == len(header) for r in rows)
    header, rows = changes(scored)
    assert [r[0] for r in rows] == ["fp16", "int8", "naive"]
    assert all(len(r) == len(header) for r in rows)
    record = scored.record()
    assert record["schema"] == "refedge-accuracy-1"
    assert record["device"]["cores"] >= 1
    assert "worst" not in record
    assert len(record["plans"][2]["ious"]) == len(record["ids"]) == 60


def test_scoring_on_calibration_samples_is_refused(quantized: Path) -> None:
    items = shapes("refshapes:calibration", 3)
    with pytest.raises(DataError) as caught:
        evaluate(open_plans(quantized, ("int8",), 1), items, RULES, "refshapes:calibration")
    assert caught.value.code == "calibrate-overlap"
    # fp32 was not calibrated
    evaluate({"fp32": load(quantized, threads=1)}, items, RULES, "refshapes:calibration")


def test_the_interval_is_that_of_scene_means() -> None:
    """With one expression a scene, it is the interval of a mean of differences."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(400), rng.random(400)
    found = paired_change([[v] for v in ours], [[v] for v in theirs])
    difference = ours - theirs
    half = 1.959964 * difference.std(ddof=1) / 20
    assert found.mean == pytest.approx(difference.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))


def test_expressions_of_a_scene_are_no_independent_samples() -> None:
    rng = np.random.default_rng(1)
    scenes = rng.normal(0, 0.1, 200)
    alike = paired_change([[s] * 5 for s in scenes], [[0.0] * 5] * 200)
    single = paired_change([[s] for s in scenes], [[0.0]] * 200)
    assert alike.high - alike.low == pytest.approx(single.high - single.low)


def test_torch_and_bundle_score_alike(bundle: Path) -> None:
    segmenter = load(bundle, threads=1)
    items = shapes("refshapes:test", 6)
    torch = torch_scores(open_original(segmenter.manifest), segmenter, items, RULES)
    ours = evaluate({"fp32": segmenter}, items, RULES, "refshapes:test").plans[0].overall
    # logits differ by 1e-5 sigma, which flips no more than a pixel of a mask
    assert torch.miou == pytest.approx(ours.miou, abs=1e-3)
    assert torch.object_accuracy == ours.object_accuracy


def test_the_gallery_shows_every_family(bundle: Path, tmp_path: Path) -> None:
    path = gallery(load(bundle), tmp_path / "gallery.png", scenes=2)
    assert Image.open(path).size == (5 * 192, 2 * 222)


def test_a_board_without_onnx_runtime_scores_what_it_names(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    real = module.load

    def load(path: Path, plan: str = "fp32", **more: Any) -> Any:
        asked.append((plan, more.get("backend", "auto")))
        if plan == "fp32":
            raise BackendError("backend-missing", "no", why="so", fix="so")
        return real(path, plan=plan, threads=more["threads"])

    monkeypatch.setattr(module, "load", load)
    assert list(open_plans(quantized, ["int8"], None, "tensorrt")) == ["int8"]
    assert asked == [("fp32", "auto"), ("int8", "tensorrt")]
    for plans in ((), ("fp32", "int8")):
        with pytest.raises(BackendError):
            open_plans(quantized, plans, None)
