"""Outlines against pycocotools' own reading of them, and against what would break it."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from pycocotools.coco import COCO
from refedge.data.coco_masks import decode
from refedge.errors import DataError

from .refer_writer import runs

points = st.lists(st.floats(-4, 60, width=32), min_size=6, max_size=24).filter(
    lambda p: len(p) % 2 == 0
)


@given(st.lists(points, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_polygons_are_filled_as_pycocotools_fills_them(polygons: list[list[float]]) -> None:
    with redirect_stdout(StringIO()):
        api = COCO()
        api.dataset = {
            "images": [{"id": 1, "height": 40, "width": 56}],
            "annotations": [{"id": 2, "image_id": 1, "category_id": 3, "segmentation": polygons}],
            "categories": [{"id": 3}],
        }
        api.createIndex()
    ours = decode(json.dumps(polygons).encode(), 56, 40, "any", "it")
    assert np.array_equal(ours, api.annToMask(api.anns[2]) > 0)
    # the toolkit's own way: one plane per polygon, added up
    planes = coco.decode(coco.frPyObjects(polygons, 40, 56)).sum(axis=2)
    assert np.array_equal(decode(json.dumps(polygons).encode(), 56, 40, "eq1", "it"), planes == 1)


@given(
    st.binary(max_size=60)
    | st.text('[]{}"0123456789,.-:sizecount6noP ', max_size=60).map(str.encode)
)
@settings(deadline=None)
def test_any_outline_is_a_mask_or_an_error(raw: bytes) -> None:
    try:
        assert decode(raw, 7, 5, "any", "it").shape == (5, 7)
    except DataError as error:
        assert error.code == "data-corrupt"


def lengths(counts: str) -> list[int] | None:
    """What a compressed code says, by its specification; None if it breaks off within a number."""
    found: list[int] = []
    value = shift = 0
    for c in counts:
        bits = ord(c) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        found.append(value + (found[-2] if len(found) > 2 else 0))
        value = shift = 0
    return None if shift else found


@given(st.text([chr(c) for c in range(48, 112)], max_size=10) | st.text("0123456:;<=", max_size=9))
@settings(max_examples=400, deadline=None)
def test_codes_fill_the_picture_exactly_or_are_refused(counts: str) -> None:
    """A code that is too short would show memory that nobody wrote."""
    raw = json.dumps({"size": [5, 7], "counts": counts}).encode()
    said = lengths(counts)
    exact = bool(said) and min(said) >= 0 and sum(said) == 35
    expected = None
    if exact:
        expected = np.repeat(np.arange(len(said)) % 2 == 1, said).reshape((5, 7), order="F")
    try:
        mask = decode(raw, 7, 5, "any", "it")
    except DataError:
        # exact codes are refused only where the library would have written them otherwise
        if expected is not None:
            usual = coco.encode(np.asfortranarray(expected.astype(np.uint8)))["counts"]
            assert usual != counts.encode()
        return
    assert expected is not None
    assert np.array_equal(mask, expected)


@given(st.integers(0, 2**35 - 1))
@settings(max_examples=100, deadline=None)
def test_every_code_of_the_library_is_read(bits: int) -> None:
    mask = np.array([bits >> i & 1 for i in range(35)], np.uint8).reshape(5, 7)
    code = coco.encode(np.asfortranarray(mask))
    raw = json.dumps({"size": [5, 7], "counts": code["counts"].decode()}).encode()
    assert np.array_equal(decode(raw, 7, 5, "any", "it"), mask > 0)
    raw = json.dumps({"size": [5, 7], "counts": runs(mask)}).encode()
    assert np.array_equal(decode(raw, 7, 5, "any", "it"), mask > 0)


def test_exact_codes_are_accepted_and_their_beginnings_refused() -> None:
    mask = np.zeros((5, 7), np.uint8)
    mask[1:4, 2:5] = 1
    whole = coco.encode(np.asfortranarray(mask))["counts"].decode()
    for end in range(len(whole) + 1):
        raw = json.dumps({"size": [5, 7], "counts": whole[:end]}).encode()
        if end == len(whole):
            assert np.array_equal(decode(raw, 7, 5, "any", "it"), mask > 0)
        else:
            with pytest.raises(DataError, match="does not fill"):
                decode(raw, 7, 5, "any", "it")


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [[1, 1, 2, 2]],  # two points
        [[1, 1, 2, 2, 3, 3, 4]],
        [[0, 0, 1e9, 0, 5, 5]],
        [[0, 0, "1", 0, 5, 5]],
        {"size": [7, 5], "counts": [35]},  # width and height exchanged
        {"size": [5, 7], "counts": [34]},
        {"size": [5, 7], "counts": [-1, 36]},
        {"size": [5, 7], "counts": "é"},
        {"counts": [35]},
        None,
    ],
)
def test_outlines_that_are_none(bad: object) -> None:
    with pytest.raises(DataError, match="annotation 9") as caught:
        decode(json.dumps(bad).encode(), 7, 5, "any", "annotation 9")
    assert caught.value.code == "data-corrupt"


def test_polygons_of_two_points_are_dropped() -> None:
    box = [1, 1, 4, 1, 4, 3, 1, 3]
    found = decode(json.dumps([[0, 0, 6, 4], box]).encode(), 7, 5, "any", "it")
    assert np.array_equal(found, decode(json.dumps([box]).encode(), 7, 5, "any", "it"))
    assert found.sum() == 6
