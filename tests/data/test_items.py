from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refedge.data.items import Item, open_items
from refedge.data.protocols import PROTOCOLS
from refedge.data.refshapes.dataset import RefShapes
from refedge.errors import DataError
from refedge.runtime.manifest import PreprocessSpec
from refedge.runtime.preprocess import open_photo, to_pixels

from .refer_writer import crop, grefcoco, refcoco

SPEC = PreprocessSpec(96, 96)
MODEL = PROTOCOLS["refshapes"]
PICTURE = PROTOCOLS["cris-native"]
SCENE = crop(RefShapes("val", size=96)[2], 64, 90)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two expressions of a picture of 90 x 64, the second of them without a target."""
    root = tmp_path / "mine"
    root.mkdir()
    Image.fromarray(SCENE.image).save(root / "a.png")
    mask = next(SCENE.mask(e) for e in SCENE.expressions if SCENE.mask(e).any())
    Image.fromarray(mask.astype(np.uint8) * 255).save(root / "m.png")
    lines = [
        {"image": "a.png", "mask": "m.png", "text": "the thing"},
        {"image": "a.png", "text": "the unicorn"},
    ]
    (root / "expressions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def refused(name: str, **options: object) -> DataError:
    with pytest.raises(DataError) as caught:
        open_items(name, SPEC, MODEL, **options)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize(
    ("name", "difficulty", "split"),
    [
        ("refshapes:test", "lite", "test"),
        ("refshapes:calibration", "lite", "calibration"),
        ("refshapes-lite:val", "lite", "val"),
        ("refshapes-full:val", "full", "val"),
    ],
)
def test_refshapes(name: str, difficulty: str, split: str) -> None:
    items = open_items(name, SPEC, MODEL, limit=3)
    shapes = RefShapes(split, difficulty=difficulty, size=96)
    assert len(items) == 3
    for i, item in enumerate(items):
        sample = shapes[i]
        assert np.array_equal(item.pixels, sample.image)
        assert np.array_equal(item.things, sample.things)
        assert item.size == (96, 96)
        assert [q.text for q in item.queries] == [e.text for e in sample.expressions]
        assert [q.family for q in item.queries] == [e.family for e in sample.expressions]
        assert [q.id for q in item.queries] == [f"{sample.id}/{k}" for k in range(5)]
        for query, expression in zip(item.queries, sample.expressions, strict=True):
            assert np.array_equal(query.truth, sample.mask(expression))
            assert query.target == (expression.target >= 0) == query.truth.any()


def test_refshapes_are_rendered_at_the_models_size() -> None:
    item = open_items("refshapes:val", PreprocessSpec(64, 64), MODEL, limit=1)[0]
    assert item.pixels.shape == (64, 64, 3)
    assert item.size == (64, 64)
    assert {q.truth.shape for q in item.queries} == {(64, 64)}


def test_the_whole_split() -> None:
    assert len(open_items("refshapes:test", SPEC, MODEL)) == 1000


def test_ids_without_making_anything() -> None:
    """All queries' names, though RefShapes may say an expression less than it has families."""
    items = open_items("refshapes-full:val", SPEC, MODEL, limit=8)
    made = {q.id for item in items for q in item.queries}
    assert made <= items.ids()
    assert len(items.ids()) == 8 * 5


def test_ids_are_disjoint_between_splits() -> None:
    """What calibration saw and what is scored can be told apart by name."""
    splits = [open_items(f"refshapes:{s}", SPEC, MODEL, limit=50).ids() for s in ("val", "test")]
    splits.append(open_items("refshapes:calibration", SPEC, MODEL, limit=50).ids())
    splits.append(open_items("refshapes-full:val", SPEC, MODEL, limit=50).ids())
    assert len(set.union(*splits)) == 4 * 250


def test_a_folder_in_the_models_space(folder: Path) -> None:
    spec = PreprocessSpec(48, 80)
    items = open_items("folder", spec, MODEL, root=folder)
    assert len(items) == 2
    here, nowhere = items
    photo = open_photo(folder / "a.png")
    assert np.array_equal(here.pixels, to_pixels(photo, spec))
    assert here.pixels.shape == (48, 80, 3)
    assert here.size == (80, 48)
    assert here.things is None
    (query,) = here.queries
    assert query.truth.shape == (48, 80)
    assert query.truth.dtype == bool
    # nearest: row y is that of the picture under the centre of y
    truth = np.asarray(Image.open(folder / "m.png")) > 0
    rows = ((np.arange(48) + 0.5) * 64 / 48).astype(int)
    columns = ((np.arange(80) + 0.5) * 90 / 80).astype(int)
    assert np.array_equal(query.truth, truth[rows][:, columns])
    assert (query.text, query.target, query.family) == ("the thing", True, "target")
    assert not nowhere.queries[0].target
    assert not nowhere.queries[0].truth.any()
    assert nowhere.queries[0].truth.shape == (48, 80)
    assert items.ids() == {"mine/1", "mine/2"}


def test_a_folder_in_the_pictures_space(folder: Path) -> None:
    item = open_items("folder", SPEC, PICTURE, root=folder)[0]
    assert item.pixels.shape == (96, 96, 3)  # the model still sees its own size
    assert item.size == (90, 64)
    assert np.array_equal(item.queries[0].truth, np.asarray(Image.open(folder / "m.png")) > 0)


def test_the_spaces_differ_in_the_truth_only(folder: Path) -> None:
    model, picture = (
        open_items("folder", SPEC, replace(MODEL, space=space), root=folder)[0]
        for space in ("model", "picture")
    )
    assert np.array_equal(model.pixels, picture.pixels)
    assert model.queries[0].truth.shape == (96, 96)
    assert picture.queries[0].truth.shape == (64, 90)


def test_a_limit_takes_the_first(folder: Path, tmp_path: Path) -> None:
    assert open_items("folder", SPEC, MODEL, root=folder, limit=1).ids() == {"mine/1"}
    root = refcoco(("val",) * 6).write(tmp_path)
    assert len(open_items("refcoco:val", SPEC, MODEL, root=root)) == 18
    some = open_items("refcoco:val", SPEC, MODEL, root=root, limit=4)
    assert len(some) == len(some.ids()) == 4
    for name in ("folder", "refshapes:val"):
        assert refused(name, root=folder, limit=0).code == "data-empty"


@pytest.mark.parametrize("space", ["model", "picture"])
def test_refcoco(tmp_path: Path, space: str) -> None:
    data = refcoco(("val",) * 6)
    root = data.write(tmp_path)
    protocol = replace(MODEL, space=space)
    items = list(open_items("refcoco:val", SPEC, protocol, root=root))
    ids = open_items("refcoco:val", SPEC, protocol, root=root).ids()
    assert [q.id for i in items for q in i.queries] == sorted(ids, key=lambda n: [*n.split("/")])
    for item in items:
        (query,) = item.queries
        assert query.target
        assert query.truth.shape == item.size[::-1]
        assert item.pixels.shape == (96, 96, 3)
    # two pictures, 96 x 70 and 80 x 96
    sizes = {i.size for i in items}
    assert sizes == ({(96, 96)} if space == "model" else {(96, 70), (80, 96)})


def texts(items: list[Item]) -> list[str]:
    return [q.text for i in items for q in i.queries]


def test_the_protocol_chooses_text_and_overlap(tmp_path: Path) -> None:
    root = refcoco(("val",) * 6).write(tmp_path)

    def opened(**options: str) -> list[Item]:
        protocol = replace(PICTURE, **options)
        return list(open_items("refcoco:val", SPEC, protocol, root=root))

    raw, sent = opened(text="raw"), opened(text="sent")
    assert [f"{t.upper()}!" for t in texts(sent)] == texts(raw)
    whole, once = opened(overlap="any"), opened(overlap="eq1")
    areas = [[int(i.queries[0].truth.sum()) for i in found] for found in (whole, once)]
    assert sum(a != b for a, b in zip(*areas, strict=True)) == 3  # three sentences on one object


def test_grefcoco_has_queries_without_target(tmp_path: Path) -> None:
    root = grefcoco().write(tmp_path, "grefcoco", "grefs(unc).json")
    items = list(open_items("grefcoco:val", SPEC, PROTOCOLS["gres"], root=root))
    nothing = [q for i in items for q in i.queries if not q.target]
    assert len(nothing) == 3
    assert all(q.family == "no-target" and not q.truth.any() for q in nothing)
    assert {q.family for i in items for q in i.queries} == {"target", "no-target"}


@pytest.mark.parametrize(
    "name",
    ["coco:val", "refshapes", "refshapes:", "refshapes:tests", "refshapes-hard:val", "", ":val",
     "folder:val", "Folder", "refshapes:val:x"],
)  # fmt: skip
def test_unknown_names(name: str, tmp_path: Path) -> None:
    error = refused(name, root=tmp_path)
    assert error.code == "data-unknown"
    assert repr(name) in error.what
    assert "refshapes-full:SPLIT" in error.why


@pytest.mark.parametrize("name", ["folder", "refcoco:val", "grefcoco:val"])
def test_a_root_is_needed(name: str) -> None:
    error = refused(name)
    assert error.code == "data-root"
    assert name in error.what


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    for name in ("folder", "refcoco:val"):
        assert refused(name, root=tmp_path / "none").code == "data-missing"


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    root = refcoco().write(tmp_path)
    assert refused("refcoco:testC", root=root).code == "data-split"
