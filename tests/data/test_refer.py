from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refedge.data import refer as refer_module
from refedge.data.coco_masks import decode
from refedge.data.refer import DATASETS, Refer
from refedge.data.referral import Referral
from refedge.errors import DataError

from .refer_writer import Dataset, grefcoco, refcoco

SEVERAL = ("train", "val", "testA", "testB", "testAB", "testC")


def annotation_of(data: Dataset, item: Referral) -> Any:
    """The annotation id or ids of the ref that an item's own id names."""
    ref_id = int(item.id.split("/")[-2])
    return next(r["ann_id"] for r in data.refs if r["ref_id"] == ref_id)


def union(data: Dataset, *annotations: int) -> np.ndarray:
    return np.logical_or.reduce([p for a in annotations for p in data.parts[a]])


def refused(*arguments: Any, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        for item in Refer(*arguments, **options):
            item.mask()
    return caught.value


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 5])
def test_masks_are_those_of_refshapes(tmp_path: Path, protocol: int) -> None:
    data = refcoco(("val",) * 6)
    items = Refer(data.write(tmp_path, protocol=protocol))
    assert len(items) == 18
    for item in items:
        mask = item.mask()
        truth = union(data, annotation_of(data, item))
        assert mask.dtype == bool
        assert mask.shape == item.size[::-1] == truth.shape
        assert item.size[0] != item.size[1]
        assert np.array_equal(mask, truth)
    forms = [
        type(a["segmentation"][0]) for a in data.annotations if isinstance(a["segmentation"], list)
    ]
    assert {list, dict} == set(forms)
    assert len(forms) < 6  # single records as well
    assert min(int(item.mask().sum()) for item in items) < 20


def test_overlapping_parts(tmp_path: Path) -> None:
    data = refcoco()
    root = data.write(tmp_path)
    kinds = {mode: [i.mask() for i in Refer(root, overlap=mode)] for mode in ("any", "eq1")}
    once = np.sum(data.parts[901], axis=0) == 1
    assert np.array_equal(kinds["any"][3], union(data, 901))
    assert np.array_equal(kinds["eq1"][3], once)
    assert (kinds["any"][3] & ~kinds["eq1"][3]).sum() > 10
    for plain in (0, 6):
        assert np.array_equal(kinds["any"][plain], kinds["eq1"][plain])


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("train", ["train"]),
        ("val", ["val"]),
        ("testA", ["testA", "testAB"]),
        ("testB", ["testB", "testAB"]),
        ("testC", ["testC"]),
        ("testAB", ["testAB"]),
        ("test", ["testA", "testB", "testAB", "testC"]),
    ],
)
def test_splits_are_matched_as_the_toolkit_does(
    tmp_path: Path, asked: str, found: list[str]
) -> None:
    data = refcoco(SEVERAL)
    items = Refer(data.write(tmp_path), split=asked)
    splits = {r["ann_id"]: r["split"] for r in data.refs}
    assert [splits[annotation_of(data, i)] for i in items] == [s for s in found for _ in range(3)]
    assert {i.id.split("/")[2] for i in items} == {asked}


def test_unknown_splits_name_those_of_the_file(tmp_path: Path) -> None:
    root = refcoco().write(tmp_path)
    for split in ("testC", "dev", ""):
        error = refused(root, split=split)
        assert error.code == "data-split"
        assert "testA, testB, train, val" in error.why


def test_every_sentence_of_every_ref_with_the_text_that_was_asked_for(tmp_path: Path) -> None:
    data = refcoco()
    root = data.write(tmp_path)
    for field in ("raw", "sent"):
        said = [s[field] for r in data.refs if r["split"] == "val" for s in r["sentences"]]
        items = Refer(root, field=field)
        assert [i.text for i in items] == said
        assert len(items) == 9
    assert any("é" in i.text for i in items)
    assert items[0].id == "refcoco/unc/val/40/7400"
    assert {i.family for i in items} == {"all"}
    assert all(i.target for i in items)


def test_the_picture_is_that_of_the_instances_file(tmp_path: Path) -> None:
    data = refcoco()
    items = Refer(data.write(tmp_path))
    for item in items:
        assert item.image_path.name.startswith("COCO_train2014_0000001")
        with Image.open(item.image_path) as image:
            assert image.size == item.size


@pytest.mark.parametrize("images", ["images/mscoco/images/train2014", "images/train2014"])
@pytest.mark.parametrize(
    ("dataset", "split_by"),
    [
        ("refcoco", "unc"),
        ("refcoco", "google"),
        ("refcoco+", "unc"),
        ("refcocog", "umd"),
        ("refcocog", "google"),
    ],
)
def test_every_dataset_and_division(
    tmp_path: Path, dataset: str, split_by: str, images: str
) -> None:
    root = refcoco().write(tmp_path, dataset, f"refs({split_by}).p", images=images)
    item = Refer(root, dataset, "val", split_by)[-1]
    assert item.id.startswith(f"{dataset}/{split_by}/val/")
    assert item.mask().any()
    if split_by == DATASETS[dataset].split_by[0]:
        assert Refer(root, dataset)[-1] == item


def test_refclef_lacks_three_pictures(tmp_path: Path) -> None:
    data = refcoco(("val",) * 6)
    data.images[0]["file_name"] = "19575.jpg"
    lost = data.images[0]["id"]
    data.pictures.pop("COCO_train2014_000000100000.jpg")
    root = data.write(tmp_path, "refclef", images="images/saiapr_tc-12")
    kept = [r["ref_id"] for r in data.refs if r["image_id"] != lost]
    assert [int(i.id.split("/")[-2]) for i in Refer(root, "refclef")] == [
        k for k in kept for _ in range(3)
    ]


@pytest.mark.parametrize("refs", ["grefs(unc).json", "grefs(unc).p"])
def test_grefcoco_means_several_one_or_nothing(tmp_path: Path, refs: str) -> None:
    data = grefcoco()
    items = Refer(data.write(tmp_path, "grefcoco", refs, images="images/train2014"), "grefcoco")
    one, several, none, beside_crowd = items[0], items[3], items[6], items[9]
    assert np.array_equal(one.mask(), union(data, 900))
    assert np.array_equal(several.mask(), union(data, 900, 901, 902))
    assert np.array_equal(beside_crowd.mask(), union(data, 901))
    assert none.mask().shape == none.size[::-1]
    assert not none.mask().any()
    assert [i.target for i in (one, several, none)] == [True, True, False]
    assert [i.family for i in (one, several, none)] == ["target", "target", "no-target"]
    assert none.id == "grefcoco/unc/val/42/7420"


def test_json_beside_the_pickle_is_preferred(tmp_path: Path) -> None:
    data = refcoco()
    data.write(tmp_path)
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(b"never read")
    assert len(Refer(data.write(tmp_path, refs="refs(unc).json"))) == 9


def test_nothing_is_decoded_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    monkeypatch.setattr(
        refer_module,
        "decode",
        lambda *a: decoded.append(a) or decode(*a),  # type: ignore[func-returns-value]
    )
    items = Refer(refcoco().write(tmp_path))
    listed = list(items)
    assert decoded == []
    listed[4].mask()
    assert len(decoded) == 1


def test_it_is_a_sequence(tmp_path: Path) -> None:
    root = refcoco().write(tmp_path)
    items = Refer(root)
    assert items[-1] == items[8] == list(items)[8]
    with pytest.raises(IndexError):
        items[9]
    assert [i.id for i in Refer(root, limit=4)] == [i.id for i in items][:4]
    assert len(Refer(root, limit=400)) == 9
    assert np.array_equal(pickle.loads(pickle.dumps(items[3])).mask(), items[3].mask())
    for limit in (0, -1):
        assert refused(root, limit=limit).code == "data-empty"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"dataset": "refcoco++"}, "data-unknown"),
        ({"dataset": "../refcoco"}, "data-unknown"),
        ({"split_by": "umd"}, "data-unknown"),
        ({"split_by": "../x"}, "data-unknown"),
        ({"split_by": "google"}, "data-missing"),
        ({"dataset": "refcocog"}, "data-missing"),
        ({"field": "tokens"}, "data-option"),
        ({"overlap": "all"}, "data-option"),
    ],
)
def test_what_does_not_exist_is_refused(tmp_path: Path, options: dict[str, str], code: str) -> None:
    assert refused(refcoco().write(tmp_path), **options).code == code


def edit(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / "refcoco" / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def each(part: str, **values: Any) -> Callable[[Any], None]:
    def apply(content: Any) -> None:
        for record in content[part] if part else content:
            record.update(values)

    return apply


def cut(name: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / "refcoco" / name
        path.write_bytes(path.read_bytes()[:-40])

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: next(root.glob(name)).unlink()


REFS, INSTANCES = "refs(unc).json", "instances.json"


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        (remove(f"refcoco/{REFS}"), "data-missing", "refs(unc)"),
        (remove(f"refcoco/{INSTANCES}"), "data-missing", INSTANCES),
        (remove("images/**/*00.jpg"), "data-missing", "COCO_train2014_000000100000.jpg"),
        (cut(REFS), "data-corrupt", REFS),
        (cut(INSTANCES), "data-corrupt", INSTANCES),
        (edit(REFS, each("", ann_id=1)), "data-corrupt", "annotation 1"),
        (edit(REFS, each("", ann_id=-1)), "data-corrupt", "annotation -1"),
        (edit(REFS, each("", ann_id=[900, 902])), "data-corrupt", "2 objects"),
        (edit(REFS, each("", ann_id=901)), "data-corrupt", "another"),
        (edit(REFS, each("", ann_id="900")), "data-corrupt", "ann_id"),
        (edit(REFS, each("", image_id=5)), "data-corrupt", "image 5"),
        (edit(REFS, each("", ref_id=10**400)), "data-corrupt", REFS),
        (edit(REFS, each("", sentences=[{"sent_id": 1, "sent": "a"}])), "data-corrupt", "'raw'"),
        (edit(REFS, each("", sentences=[])), "data-empty", REFS),
        (edit(REFS, lambda c: c.clear()), "data-split", "no ref"),
        (edit(INSTANCES, each("images", file_name="../../../x.jpg")), "data-escape", "x.jpg"),
        (edit(INSTANCES, each("images", file_name="a\0b")), "data-escape", INSTANCES),
        (edit(INSTANCES, each("images", height=0)), "data-corrupt", INSTANCES),
        (edit(INSTANCES, each("images", height=60000, width=60000)), "data-corrupt", "60000"),
        (edit(INSTANCES, each("annotations", segmentation=[])), "data-corrupt", "annotation 900"),
        (edit(INSTANCES, lambda c: c.pop("images")), "data-corrupt", "images"),
    ],
)  # fmt: skip
def test_damage_is_named(
    tmp_path: Path, damage: Callable[[Path], None], code: str, says: str
) -> None:
    root = refcoco().write(tmp_path, refs=REFS)
    damage(root)
    error = refused(root)
    assert error.code == code
    assert says in str(error)


@pytest.mark.parametrize("ids", [[], [-1, 900], [903], [1]])
def test_grefcoco_refs_that_mean_nothing_sensible(tmp_path: Path, ids: list[int]) -> None:
    data = grefcoco()
    data.refs[0]["ann_id"] = ids
    root = data.write(tmp_path, "grefcoco", "grefs(unc).json")
    assert refused(root, "grefcoco").code == "data-corrupt"


def test_nesting_does_not_overflow(tmp_path: Path) -> None:
    root = refcoco().write(tmp_path, refs=REFS)
    for name in (REFS, INSTANCES):
        path = root / "refcoco" / name
        whole = path.read_text()
        path.write_text("[" * 200_000 + "]" * 200_000)
        assert refused(root).code == "data-corrupt"
        path.write_text(whole)


def test_without_pycocotools_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = refcoco().write(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    error = refused(root)
    assert error.code == "package-missing"
    assert "pip install pycocotools" in error.fix
