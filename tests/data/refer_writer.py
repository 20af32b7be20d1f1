"""RefShapes scenes written as the REFER family's files, in the format of the published ones.

Pickles are as Python 2 wrote them (byte strings, protocol 2 or 0), ``instances.json`` has every
key of COCO's, pictures are COCO-named JPEGs that are not square, a ref's ``file_name`` names
a crop that does not exist, and ``raw`` and ``sent`` differ. The true masks are RefShapes' own.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco
from refedge.data.refshapes.dataset import RefShapes, Sample

COCO_IMAGES = "images/mscoco/images/train2014"
CATEGORY = {"supercategory": "shape", "id": 3, "name": "thing"}


class Python2Pickler(pickle._Pickler):
    """Strings as Python 2's ``str``, which is what the published files hold."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_str(self, text: str) -> None:
        raw = text.encode("latin1")
        if not self.bin:
            self.write(pickle.STRING + repr(raw)[1:].encode("ascii") + b"\n")
        elif len(raw) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(raw)]) + raw)
        else:
            self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)
        self.memoize(text)

    dispatch[str] = save_str


def dumps_like_python2(content: Any, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol).dump(content)
    return file.getvalue()


@dataclass
class Dataset:
    """What is about to be written; ``parts`` holds, for each annotation, the masks of its parts."""

    refs: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    parts: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def add_picture(self, pixels: np.ndarray, name: str = "COCO_train2014_{:012d}.jpg") -> int:
        number = 100_000 + len(self.images)
        height, width = pixels.shape[:2]
        file = name.format(number)
        self.images.append(
            {"license": 1, "file_name": file, "coco_url": "", "height": height, "width": width,
             "date_captured": "2013-11-14 11:18:45", "flickr_url": "", "id": number}
        )  # fmt: skip
        self.pictures[file] = pixels
        return number

    def add_object(self, image: int, parts: list[np.ndarray], form: str, crowd: int = 0) -> int:
        """form: ``polygons``, ``rle`` (a list of codes), ``one-rle`` or ``counts`` (a record)."""
        union = np.logical_or.reduce(parts)
        codes = [coco.encode(np.asfortranarray(p.astype(np.uint8))) for p in parts]
        box = coco.toBbox(coco.encode(np.asfortranarray(union.astype(np.uint8))))
        texts = [{"size": c["size"], "counts": c["counts"].decode()} for c in codes]
        segmentation: Any = {
            "polygons": lambda: [polygon for p in parts for polygon in outlines(p)],
            "rle": lambda: texts,
            "one-rle": lambda: texts[0],
            "counts": lambda: {"size": list(union.shape), "counts": runs(union)},
        }[form]()
        number = 900 + len(self.annotations)
        self.annotations.append(
            {"segmentation": segmentation, "area": float(union.sum()), "iscrowd": crowd,
             "image_id": image, "bbox": box.tolist(), "category_id": 3, "id": number}
        )  # fmt: skip
        self.parts[number] = parts
        return number

    def add_ref(self, image: int, ann_id: int | list[int], split: str, texts: list[str]) -> int:
        number = 40 + len(self.refs)
        first = 7000 + 10 * number
        sentences = [
            {"tokens": text.split(), "raw": f"{text.upper()}!", "sent_id": first + i,
             "sent": text}
            for i, text in enumerate(texts)
        ]  # fmt: skip
        self.refs.append(
            {"sent_ids": [s["sent_id"] for s in sentences], "ann_id": ann_id, "ref_id": number,
             "file_name": f"COCO_train2014_000000000000_{ann_id}.jpg", "image_id": image,
             "split": split, "sentences": sentences,
             "category_id": [3] if isinstance(ann_id, list) else 3}
        )  # fmt: skip
        return number

    def instances(self) -> dict[str, Any]:
        return {"info": {"year": 2014}, "licenses": [], "images": self.images,
                "annotations": self.annotations, "categories": [CATEGORY]}  # fmt: skip

    def write(
        self,
        root: Path,
        name: str = "refcoco",
        refs: str = "refs(unc).p",
        *,
        images: str = COCO_IMAGES,
        protocol: int = 2,
    ) -> Path:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        if refs.endswith(".json"):
            (folder / refs).write_text(json.dumps(self.refs))
        elif protocol <= 2:
            (folder / refs).write_bytes(dumps_like_python2(self.refs, protocol))
        else:
            (folder / refs).write_bytes(pickle.dumps(self.refs, protocol))
        (folder / "instances.json").write_text(json.dumps(self.instances()))
        (root / images).mkdir(parents=True, exist_ok=True)
        for file, pixels in self.pictures.items():
            Image.fromarray(pixels).save(root / images / file)
        return root


def refcoco(splits: tuple[str, ...] = ("val", "val", "val", "train", "testA", "testB")) -> Dataset:
    """Six refs: polygons, overlapping polygons, codes, a tiny object, runs, one code."""
    data = Dataset()
    wide = crop(RefShapes("val", size=96)[0], 70, 96)
    tall = crop(RefShapes("val", size=96)[3], 96, 80)
    images = [(s, data.add_picture(s.image), by_size(s)) for s in (wide, tall)]
    forms = ("polygons", "polygons", "rle", "polygons", "counts", "one-rle")
    for i, (form, split) in enumerate(zip(forms, splits, strict=True)):
        scene, image, order = images[i % 2]
        thing = order[i // 2]
        mask = scene.things == thing
        parts = halves(mask) if i == 1 else [tip(mask)] if i == 3 else [mask]
        data.add_ref(image, data.add_object(image, parts, form), split, said(scene, thing))
    return data


def grefcoco(split: str = "val") -> Dataset:
    """One object, three of them, none, and one beside a crowd."""
    data = Dataset()
    scene = crop(RefShapes("val", size=96)[5], 96, 72)
    image = data.add_picture(scene.image)
    masks = [scene.things == i for i in by_size(scene)[:3]]
    forms = ("polygons", "rle", "rle")
    a, b, c = (data.add_object(image, [m], f) for m, f in zip(masks, forms, strict=True))
    crowd = data.add_object(image, [masks[0] | masks[1]], "counts", crowd=1)
    meant = ([a], "one"), ([a, b, c], "all three"), ([-1], "the missing one"), ([b, crowd], "b")
    for ids, text in meant:
        data.add_ref(image, ids, split, [f"{text} {i}" for i in range(3)])
    return data


def crop(sample: Sample, height: int, width: int) -> Sample:
    box = (slice(0, height), slice(0, width))
    return replace(sample, image=sample.image[box], things=sample.things[box])


def by_size(sample: Sample) -> list[int]:
    """Numbers of the things in the map of what is seen, the largest first."""
    areas = np.bincount(sample.things.ravel())[1:]
    return [int(i) + 1 for i in np.argsort(-areas, kind="stable")]


def said(sample: Sample, thing: int) -> list[str]:
    """Three texts; one with a letter that is not ASCII."""
    texts = [e.text for e in sample.expressions if e.target == thing - 1]
    return [*texts, f"thing {thing}", f"the caf\xe9 thing {thing}", "it"][:3]


def halves(mask: np.ndarray) -> list[np.ndarray]:
    """Left and right part of a mask; they overlap in the middle."""
    columns = np.flatnonzero(mask.any(0))
    low, high = np.quantile(columns, (0.4, 0.6)).astype(int)
    left, right = mask.copy(), mask.copy()
    left[:, high + 1 :] = False
    right[:, :low] = False
    return [left, right]


def tip(mask: np.ndarray) -> np.ndarray:
    """The first few pixels of a mask: less than 20."""
    small = np.zeros_like(mask)
    row = np.flatnonzero(mask.sum(1) >= 4)[0]
    column = np.flatnonzero(mask[row])[0]
    small[row : row + 4, column : column + 4] = mask[row : row + 4, column : column + 4]
    return small


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs down the columns, starting with zeros."""
    flat = np.concatenate(([0], mask.ravel(order="F").astype(int)))
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate(([0], edges, [mask.size]))).tolist()


def outlines(mask: np.ndarray) -> Iterator[list[float]]:
    """Polygons around a mask's pixels, along their edges; holes are filled."""
    padded = np.pad(mask, 1)
    starts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y, x in zip(*np.nonzero(padded), strict=True):
        # clockwise around each pixel, where the neighbour across the edge is not part of it
        for (dy, dx), a, b in (
            ((-1, 0), (x, y), (x + 1, y)),
            ((0, 1), (x + 1, y), (x + 1, y + 1)),
            ((1, 0), (x + 1, y + 1), (x, y + 1)),
            ((0, -1), (x, y + 1), (x, y)),
        ):
            if not padded[y + dy, x + dx]:
                starts.setdefault(a, []).append(b)
    while starts:
        first = next(iter(starts))
        loop = [first]
        while not (len(loop) > 1 and loop[-1] == first):
            after = starts[loop[-1]]
            loop.append(after.pop())
            if not after:
                del starts[loop[-2]]
        area = sum(a[0] * b[1] - b[0] * a[1] for a, b in pairwise(loop))
        if area > 0:
            yield [float(v - 1) for point in loop[:-1] for v in point]
