from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from refedge.data.folder import Folder
from refedge.data.refshapes.dataset import RefShapes
from refedge.errors import DataError

from .refer_writer import crop

SCENE = crop(RefShapes("val", size=96)[2], 64, 90)
LINES: list[dict[str, Any]] = [
    {
        "image": "photos/scene.png",
        "text": e.text,
        "mask": f"masks/{e.family}.png" if e.target >= 0 else None,
        "family": e.family,
    }
    for e in SCENE.expressions
]
MASKS = {e.family: SCENE.mask(e) for e in SCENE.expressions}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The expressions of a scene, as a person would lay them out."""
    folder = tmp_path / "mine"
    (folder / "photos").mkdir(parents=True)
    (folder / "masks").mkdir()
    Image.fromarray(SCENE.image).save(folder / "photos/scene.png")
    for family, mask in MASKS.items():
        if mask.any():
            save(folder / f"masks/{family}.png", mask.astype(np.uint8) * 255)
    write(folder, LINES)
    return folder


def save(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path)


def write(root: Path, lines: list[dict[str, Any]]) -> None:
    (root / "expressions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def refused(root: Path, lines: list[dict[str, Any]] | bytes, **options: Any) -> DataError:
    if isinstance(lines, bytes):
        (root / "expressions.jsonl").write_bytes(lines)
    else:
        write(root, lines)
    with pytest.raises(DataError) as caught:
        for item in Folder(root, **options):
            item.mask()
    return caught.value


def test_items_are_what_was_written(root: Path) -> None:
    items = Folder(root)
    assert [i.text for i in items] == [e.text for e in SCENE.expressions]
    assert [i.family for i in items] == [e.family for e in SCENE.expressions]
    assert [i.id for i in items] == [f"mine/{n}" for n in range(1, 6)]
    for item in items:
        assert item.size == (90, 64)
        assert item.image_path == root / "photos/scene.png"
        assert np.array_equal(item.mask(), MASKS[item.family])
        assert item.target == MASKS[item.family].any()
        assert np.array_equal(pickle.loads(pickle.dumps(item)).mask(), item.mask())
    assert not items[-1].target
    assert items[-1] == items[4]
    with pytest.raises(IndexError):
        items[5]


def test_families_may_be_left_out(root: Path) -> None:
    without = [{k: v for k, v in line.items() if k != "family"} for line in LINES]
    write(root, without)
    assert [i.family for i in Folder(root)] == ["target"] * 4 + ["no-target"]
    assert {i.family for i in Folder(root, limit=4)} == {"all"}


def test_no_mask_is_the_same_as_null(root: Path) -> None:
    write(root, [{"image": "photos/scene.png", "text": "a dog"}])
    item = Folder(root)[0]
    assert not item.target
    assert item.mask().shape == (64, 90)


def test_masks_of_any_single_channel(root: Path) -> None:
    mask = MASKS[LINES[0]["family"]]
    path = root / LINES[0]["mask"]
    for value, kind in ((1, np.uint8), (255, np.uint8), (40_000, np.uint16), (1, bool)):
        save(path, mask.astype(kind) * kind(value))
        assert np.array_equal(Folder(root)[0].mask(), mask)
    palette = Image.fromarray(mask.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(path)
    assert np.array_equal(Folder(root)[0].mask(), mask)
    save(path, np.full((64, 90), 255, np.uint8))
    assert Folder(root)[0].mask().all()


def test_the_upright_picture_counts(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(SCENE.image).save(root / "photos/lying.jpg", exif=exif)
    line = {"image": "photos/lying.jpg", "text": "it", "mask": "masks/upright.png"}
    save(root / "masks/upright.png", np.rot90(MASKS[LINES[0]["family"]].astype(np.uint8), 3))
    write(root, [line])
    assert Folder(root)[0].size == (64, 90)
    assert Folder(root)[0].mask().shape == (90, 64)
    assert refused(root, [line | {"mask": LINES[0]["mask"]}]).code == "data-mask"


def test_windows_files_and_blank_lines(root: Path) -> None:
    text = "\r\n\r\n".join(json.dumps(line) for line in LINES)
    (root / "expressions.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert [i.id for i in Folder(root)] == [f"mine/{n}" for n in (1, 3, 5, 7, 9)]


def test_a_linked_folder_of_pictures_is_fine(root: Path) -> None:
    (root / "photos").rename(root.parent / "elsewhere")
    (root / "photos").symlink_to(root.parent / "elsewhere")
    assert len(Folder(root)) == 5


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"image": "../outside.png"}, "data-escape"),
        ({"mask": "masks/../../outside.png"}, "data-escape"),
        ({"image": "/etc/hostname"}, "data-escape"),
        ({"image": "..\\outside.png"}, "data-escape"),
        ({"image": "a\0.png"}, "data-escape"),
        ({"image": ""}, "data-escape"),
        ({"image": "photos/none.png"}, "data-missing"),
        ({"mask": "masks/none.png"}, "data-missing"),
        ({"image": "photos"}, "data-corrupt"),
        ({"image": "expressions.jsonl"}, "data-corrupt"),
        ({"image": None}, "data-line"),
        ({"text": ""}, "data-line"),
        ({"text": " \n"}, "data-line"),
        ({"text": 5}, "data-line"),
        ({"maks": "masks/a.png"}, "data-line"),
    ],
)
def test_bad_lines_are_named_by_number(root: Path, change: dict[str, Any], code: str) -> None:
    save(root.parent / "outside.png", SCENE.image)
    error = refused(root, [*LINES[:2], LINES[2] | change])
    assert error.code == code
    assert "line 3 " in str(error)


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"image": "a"}']
)
def test_lines_that_are_no_objects(root: Path, line: bytes) -> None:
    error = refused(root, json.dumps(LINES[0]).encode() + b"\n" + line)
    assert error.code == "data-line"
    assert "line 2 " in error.what


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((64, 90), np.uint8),
        np.arange(64 * 90, dtype=np.uint8).reshape(64, 90),
        np.full((64, 90, 3), 255, np.uint8),
        np.full((90, 64), 255, np.uint8),
    ],
    ids=["empty", "grey", "colour", "turned"],
)
def test_masks_that_are_none(root: Path, values: np.ndarray) -> None:
    save(root / LINES[0]["mask"], values)
    error = refused(root, LINES)
    assert error.code == "data-mask"
    assert LINES[0]["mask"] in error.what


def test_lossy_masks_are_refused(root: Path) -> None:
    save(root / "masks/a.jpg", MASKS[LINES[0]["family"]].astype(np.uint8) * 255)
    assert refused(root, [LINES[0] | {"mask": "masks/a.jpg"}]).code == "data-mask"


def test_cut_masks_are_refused(root: Path) -> None:
    path = root / LINES[0]["mask"]
    path.write_bytes(path.read_bytes()[:60])
    assert refused(root, LINES).code == "data-corrupt"


def test_huge_pictures_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (5000, 1000):  # Pillow warns first, and refuses beyond twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert refused(root, LINES).code == "data-corrupt"


def test_nothing_to_read(root: Path) -> None:
    assert refused(root, []).code == "data-empty"
    assert refused(root, b"\n\n").code == "data-empty"
    assert refused(root, LINES, limit=0).code == "data-empty"
    (root / "expressions.jsonl").unlink()
    with pytest.raises(DataError) as caught:
        Folder(root)
    assert caught.value.code == "data-missing"
    assert "expressions.jsonl" in caught.value.what
    with pytest.raises(DataError):
        Folder(root / "photos/scene.png")


@given(st.binary(max_size=200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_expressions_or_an_error(root: Path, raw: bytes) -> None:
    (root / "expressions.jsonl").write_bytes(raw)
    with pytest.raises(DataError):
        Folder(root)
