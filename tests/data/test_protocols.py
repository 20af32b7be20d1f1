"""Golden numbers: masks small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from refedge.data.protocols import PROTOCOLS, Meter, protocol_named
from refedge.errors import DataError


def mask(*rows: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in rows])


TRUTH = mask("##..", "##..", "....", "....")
HALF = mask("#...", "#...", "....", "....")  # IoU 2/4
WIDE = mask("####", "####", "....", "....")  # IoU 4/8
MISS = mask("....", "....", "..##", "..##")  # IoU 0/8
NONE = np.zeros((4, 4), bool)


def test_golden_scores() -> None:
    meter = Meter(PROTOCOLS["lavt480"])
    ious = [meter.add(p, TRUTH) for p in (TRUTH, HALF, WIDE, MISS)]
    assert ious == [1.0, 0.5, 0.5, 0.0]
    scores = meter.scores()
    assert scores.count == 4
    assert scores.miou == 0.5
    assert scores.oiou == pytest.approx((4 + 2 + 4 + 0) / (4 + 4 + 8 + 8))
    assert scores.precision == (0.75, 0.25, 0.25, 0.25, 0.25)  # >= counts the two halves
    assert scores.n_acc is None


def test_strict_counts_greater_only() -> None:
    from dataclasses import replace

    meter = Meter(replace(PROTOCOLS["lavt480"], strict=True))
    meter.add(HALF, TRUTH)
    assert meter.scores().precision[0] == 0.0


def test_lavt_counts_an_empty_union_as_zero() -> None:
    meter = Meter(PROTOCOLS["lavt480"])
    assert meter.add(NONE, NONE) == 0.0
    assert meter.scores().miou == 0.0


def test_refshapes_scores_no_target_apart() -> None:
    meter = Meter(PROTOCOLS["refshapes"])
    assert meter.add(NONE, NONE, family="none") == 1.0
    assert meter.add(HALF, NONE, family="none") == 0.0
    assert meter.add(HALF, TRUTH, family="attribute") == 0.5
    assert meter.add(NONE, TRUTH, family="attribute") == 0.0
    scores = meter.scores()
    assert (scores.count, scores.miou, scores.n_acc, scores.t_acc) == (2, 0.25, 0.5, 0.5)
    families = meter.by_family()
    assert families["none"].miou is None
    assert families["none"].n_acc == 0.5
    assert families["attribute"].miou == 0.25


def test_no_target_tolerates_fifty_pixels_of_480() -> None:
    empty = np.zeros((480, 480), bool)
    for pixels, said in ((49, 1.0), (50, 0.0)):
        speck = empty.copy()
        speck.ravel()[:pixels] = True
        assert Meter(PROTOCOLS["refshapes"]).add(speck, empty) == said


def test_object_accuracy_asks_which_thing_fits_best() -> None:
    things = np.zeros((4, 4), np.uint8)
    things[:2, :2], things[2:, 2:] = 1, 2
    meter = Meter(PROTOCOLS["refshapes"])
    meter.add(HALF, TRUTH, things=things)
    meter.add(MISS, TRUTH, things=things)
    meter.add(NONE, TRUTH, things=things)
    meter.add(TRUTH | MISS, TRUTH, things=things)  # both fit equally: not wrong
    assert meter.scores().object_accuracy == 0.5


masks = hnp.arrays(bool, (5, 6))


@given(st.lists(st.tuples(masks, masks), min_size=1, max_size=6))
def test_scores_are_shares_and_bounded(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for protocol in PROTOCOLS.values():
        meter = Meter(protocol)
        for predicted, truth in pairs:
            iou = meter.add(predicted, truth)
            assert 0.0 <= iou <= 1.0
        scores = meter.scores()
        assert all(0 <= p <= 1 for p in scores.precision)
        assert list(scores.precision) == sorted(scores.precision, reverse=True)
        if scores.miou is not None:
            assert scores.miou <= 1.0


@given(masks, masks)
def test_iou_is_symmetric_and_one_for_equals(a: np.ndarray, b: np.ndarray) -> None:
    def iou(p: np.ndarray, q: np.ndarray) -> float:
        return Meter(PROTOCOLS["lavt480"]).add(p, q)

    assert iou(a, b) == iou(b, a)
    assert iou(a, a) == float(a.any())


def test_mismatched_masks_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        Meter(PROTOCOLS["lavt480"]).add(NONE[:2], TRUTH)
    assert caught.value.code == "mask-shape"
    with pytest.raises(DataError):
        Meter(PROTOCOLS["lavt480"]).add(TRUTH.astype(np.uint8), TRUTH)


def test_unknown_protocols_are_named() -> None:
    with pytest.raises(DataError) as caught:
        protocol_named("coco")
    assert "refshapes" in str(caught.value)


def test_cris_counts_above_the_bar_only_and_adds_to_the_union() -> None:
    meter = Meter(PROTOCOLS["cris-native"])
    ious = [meter.add(p, TRUTH) for p in (TRUTH, HALF, WIDE, MISS)]
    assert ious == [4 / (4 + 1e-6), 2 / (4 + 1e-6), 4 / (8 + 1e-6), 0.0]
    scores = meter.scores()
    assert scores.precision == (0.25, 0.25, 0.25, 0.25, 0.25)  # > leaves out the two halves
    assert scores.miou == pytest.approx(0.5, abs=1e-6)
    assert scores.miou is not None
    assert scores.miou < 0.5
    assert scores.oiou == 10 / 24  # epsilon is not in it
    assert (scores.n_acc, scores.t_acc, scores.giou) == (None, None, None)


def test_cris_counts_an_empty_union_as_zero() -> None:
    assert Meter(PROTOCOLS["cris-native"]).add(NONE, NONE) == 0.0


def test_gres_by_hand() -> None:
    """Six expressions on 4 x 4: four with a target of 4 pixels, two without."""
    meter = Meter(PROTOCOLS["gres"])
    assert meter.add(NONE, NONE) == 1.0  # nothing there, and said so: I = U = 0
    assert meter.add(WIDE, NONE) == 0.0  # nothing there, 8 pixels predicted: U += 8
    assert meter.add(TRUTH, TRUTH) == 1.0  # I 4, U 4
    assert meter.add(HALF, TRUTH) == 0.5  # I 2, U 4
    assert meter.add(MISS, TRUTH) == 0.0  # I 0, U 8
    assert meter.add(NONE, TRUTH) == 0.0  # said nothing: I 0, U 4
    scores = meter.scores()
    assert scores.giou == 2.5 / 6
    assert scores.oiou == 6 / (8 + 4 + 4 + 8 + 4)
    assert (scores.n_acc, scores.t_acc) == (1 / 2, 3 / 4)
    assert scores.count == 4
    assert scores.miou == 1.5 / 4
    assert scores.precision == (0.5, 0.25, 0.25, 0.25, 0.25)


def test_gres_takes_the_word_of_a_head_for_it() -> None:
    """The mask of a model that says "nothing there" still counts in the union of a target."""
    meter = Meter(PROTOCOLS["gres"])
    assert meter.add(WIDE, TRUTH, nothing=True) == 0.0  # I := 0, U 8
    assert meter.add(WIDE, NONE, nothing=True) == 1.0  # I = U = 0
    assert meter.add(NONE, NONE, nothing=False) == 0.0  # U += 0
    assert meter.add(NONE, TRUTH, nothing=False) == 0.0  # U 4
    scores = meter.scores()
    assert scores.oiou == 0 / 12
    assert scores.giou == 1 / 4
    assert (scores.n_acc, scores.t_acc) == (1 / 2, 1 / 2)


def test_gres_few_pixels_say_nothing() -> None:
    truth = np.zeros((480, 480), bool)
    truth[:100, :100] = True
    for pixels, iou in ((49, 0.0), (50, 50 / 10_000)):
        speck = np.zeros_like(truth)
        speck[0, :pixels] = True
        meter = Meter(PROTOCOLS["gres"])
        assert meter.add(speck, truth) == iou
        assert meter.scores().oiou == iou


def test_gres_keeps_families_apart() -> None:
    meter = Meter(PROTOCOLS["gres"])
    meter.add(NONE, NONE, family="no-target")
    meter.add(HALF, TRUTH, family="target")
    families = meter.by_family()
    assert families["no-target"].giou == 1.0
    assert (families["no-target"].oiou, families["no-target"].precision) == (None, ())
    assert families["target"].giou == families["target"].miou == 0.5


def test_a_target_that_the_resize_lost_is_still_one() -> None:
    for name in ("gres", "refshapes"):
        meter = Meter(PROTOCOLS[name])
        assert meter.add(NONE, NONE, target=True) == 0.0
        assert meter.add(HALF, NONE, target=True) == 0.0
        scores = meter.scores()
        assert (scores.count, scores.n_acc, scores.t_acc) == (2, None, 0.5)


def test_giou_is_told_by_gres_alone() -> None:
    for name, protocol in PROTOCOLS.items():
        meter = Meter(protocol)
        meter.add(HALF, TRUTH)
        assert (meter.scores().giou is not None) == (name == "gres")


def test_thresholds_are_probabilities() -> None:
    logits = np.array([-0.7, -0.62, -0.619, -1e-7, 0.0, 1e-7, 2.0], np.float32)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    cris, lavt = PROTOCOLS["cris-native"], PROTOCOLS["lavt480"]
    assert cris.predicted(logits).tolist() == (probabilities > 0.35).tolist()
    assert cris.predicted(logits).tolist() == [False] * 2 + [True] * 5
    assert lavt.predicted(logits).tolist() == (logits > 0).tolist()
    assert lavt.predicted(logits).dtype == bool


def test_what_each_protocol_reads() -> None:
    reads = {p.name: (p.space, p.text, p.overlap, p.strict) for p in PROTOCOLS.values()}
    assert reads == {
        "refshapes": ("model", "raw", "any", False),
        "lavt480": ("model", "raw", "eq1", False),
        "cris-native": ("picture", "sent", "any", True),
        "gres": ("model", "raw", "any", False),
    }
