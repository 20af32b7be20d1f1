from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco
from refedge.runtime.manifest import PostprocessSpec, PreprocessSpec
from refedge.runtime.masks import encode_rle, iou, overlay, to_mask
from refedge.runtime.preprocess import to_pixels

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@given(SHAPES.flatmap(lambda s: hnp.arrays(bool, s)))
@settings(max_examples=300, deadline=None)
def test_rle_equals_pycocotools(mask: np.ndarray) -> None:
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encode_rle(mask) == {"size": theirs["size"], "counts": theirs["counts"].decode()}
    assert np.array_equal(coco.decode(encode_rle(mask)).astype(bool), mask)


@pytest.mark.parametrize("fill", [True, False])
def test_rle_of_plain_masks(fill: bool) -> None:
    mask = np.full((300, 500), fill)
    assert coco.area(encode_rle(mask)) == mask.sum()


def test_threshold_is_strict_and_score_is_the_mean_probability() -> None:
    logits = np.array([[-1.0, 0.0], [2.0, 4.0]], np.float32)
    mask, score = to_mask(logits, (2, 2), PostprocessSpec())
    assert mask.tolist() == [[False, False], [True, True]]
    assert score == pytest.approx((1 / (1 + np.exp(-2)) + 1 / (1 + np.exp(-4))) / 2)


def test_an_empty_mask_scores_zero() -> None:
    mask, score = to_mask(np.full((3, 3), -5, np.float32), (7, 5), PostprocessSpec())
    assert mask.shape == (5, 7)
    assert not mask.any()
    assert score == 0.0


def test_masks_are_resized_to_the_picture() -> None:
    logits = np.where(np.arange(32)[None, :] < 16, 3.0, -3.0).repeat(32, 0).astype(np.float32)
    mask, _ = to_mask(logits, (100, 60), PostprocessSpec())
    assert mask.shape == (60, 100)
    assert mask[:, :48].all()
    assert not mask[:, 52:].any()


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([32, 96]))
def test_a_letterboxed_picture_comes_back_where_it_was(width: int, height: int, side: int) -> None:
    spec = PreprocessSpec(side, side, "letterbox", fill=(9, 9, 9))
    left, top, right, bottom = frame = spec.frame((width, height))
    assert 0 <= left < right <= side
    assert 0 <= top < bottom <= side
    assert side in (right - left, bottom - top)
    assert abs((left + right) - side) <= 1
    assert abs((top + bottom) - side) <= 1
    pixels = to_pixels(Image.new("RGB", (width, height), (200, 0, 0)), spec)
    inside = np.zeros((side, side), bool)
    inside[top:bottom, left:right] = True
    assert (pixels[inside] == (200, 0, 0)).all()
    assert (pixels[~inside] == 9).all()
    # what is said of the border reaches no pixel of the mask
    logits = np.where(inside, 4.0, -4.0).astype(np.float32)
    mask, _ = to_mask(logits, (width, height), PostprocessSpec(), frame)
    assert mask.shape == (height, width)
    assert mask.all()


def test_overlay_keeps_the_mask_and_dims_the_rest() -> None:
    image = Image.new("RGB", (20, 20), (200, 100, 0))
    mask = np.zeros((20, 20), bool)
    mask[5:15, 5:15] = True
    out = np.asarray(overlay(image, mask)).astype(int)
    assert (out[10, 10] == [200, 100, 0]).all()
    assert (out[5, 5] == [255, 64, 32]).all()  # the outline
    assert (out[6, 6] == [200, 100, 0]).all()
    assert (out[0, 0] == [75, 50, 25]).all()  # a quarter of itself and a quarter of its grey


def test_overlay_of_nothing_and_everything() -> None:
    image = Image.new("RGB", (4, 4), (80, 80, 80))
    assert (np.asarray(overlay(image, np.zeros((4, 4), bool))) == 40).all()
    assert np.asarray(overlay(image, np.ones((4, 4), bool))).shape == (4, 4, 3)


def test_masks_that_are_both_empty_agree() -> None:
    empty, full = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    assert iou(empty, empty) == iou(full, full) == 1.0
    assert iou(empty, full) == 0.0
