"""The two files of a REFER dataset, parsed and validated: refs and ``instances.json``.

``docs/datasets.md`` lists the keys that are read; all others are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from ..errors import DataError
from .files import corrupt, missing, parse_json, read_bytes
from .safe_pickle import loads_plain

NOTHING = -1  # gRefCOCO's annotation id of an expression that means nothing in the picture

_MOST_PIXELS = 1 << 27
_Id = Annotated[int, msgspec.Meta(ge=NOTHING, le=2**63 - 1)]
_Side = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]


class Sentence(msgspec.Struct, frozen=True, gc=False):
    """One expression; ``raw`` is what a person typed, ``sent`` its lower-cased, cleaned form."""

    sent_id: _Id
    raw: str | None = None
    sent: str | None = None


class Ref(msgspec.Struct, frozen=True):
    """What some sentences speak of. A ref's own ``file_name`` names a crop and is not read."""

    ref_id: _Id
    image_id: _Id
    ann_id: _Id | list[_Id]
    split: str
    sentences: list[Sentence]

    @property
    def annotations(self) -> list[int]:
        """Ids of the objects that are meant."""
        return self.ann_id if isinstance(self.ann_id, list) else [self.ann_id]


class Picture(msgspec.Struct, frozen=True, gc=False):
    """One of the ``images``; sides in pixels."""

    id: int
    file_name: str
    width: _Side
    height: _Side


class Annotation(msgspec.Struct, frozen=True, gc=False):
    """One of the ``annotations``; its outline stays JSON until somebody asks for the mask."""

    id: int
    image_id: int
    segmentation: msgspec.Raw = msgspec.Raw(b"[]")
    iscrowd: int = 0


class _File(msgspec.Struct, frozen=True):
    images: list[Picture]
    annotations: list[Annotation]


class Instances(msgspec.Struct, frozen=True):
    """What some refs point to, by id."""

    pictures: dict[int, Picture]
    annotations: dict[int, Annotation]


def find_refs(folder: Path, stem: str) -> Path:
    """``stem.json`` or ``stem.p`` in a dataset's folder; JSON where both are there."""
    for suffix in (".json", ".p"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    if not folder.is_dir():
        raise missing(folder, "lay the files out as in docs/datasets.md")
    held = sorted(p.name for p in folder.iterdir() if "refs(" in p.name)
    raise DataError(
        "data-missing",
        f"there is no {stem}.p in {folder}",
        why=f"it holds {', '.join(held)}" if held else "it holds no refs file at all",
        fix="put the dataset's file there, or name the division that is there",
    )


def read_refs(path: Path) -> list[Ref]:
    """Every ref of a refs file."""
    raw = read_bytes(path, "put the dataset's refs file there")
    if path.suffix == ".json":
        found: list[Ref] = parse_json(raw, list[Ref], path)
        return found
    try:
        return msgspec.convert(loads_plain(raw, path), list[Ref])
    except (msgspec.ValidationError, RecursionError) as error:
        raise corrupt(path, str(error)) from error


def of_split(refs: list[Ref], split: str, path: Path) -> list[Ref]:
    """The refs of a split, by the rules of the REFER toolkit.

    ``testA``, ``testB`` and ``testC`` take every ref whose split has that letter (refclef has
    ``testAB``), ``test`` those of all test splits; other names are matched exactly.
    """
    if split in ("testA", "testB", "testC"):
        found = [r for r in refs if split[-1] in r.split]
    elif split == "test":
        found = [r for r in refs if "test" in r.split]
    else:
        found = [r for r in refs if r.split == split]
    if not found:
        raise DataError(
            "data-split",
            f"{path.parent.name} has no split called {split!r}",
            why=f"{path.name} holds {', '.join(sorted({r.split for r in refs})) or 'no ref'}",
            fix="choose one of these",
        )
    return found


def read_instances(path: Path, refs: list[Ref]) -> Instances:
    """What these refs point to; of a large file nothing else stays in memory."""
    images = {ref.image_id for ref in refs}
    annotations = {a for ref in refs for a in ref.annotations}
    raw = read_bytes(path, "put the dataset's instances.json there")
    found: _File = parse_json(raw, _File, path)
    pictures = {p.id: p for p in found.images if p.id in images}
    for picture in pictures.values():
        if picture.width * picture.height > _MOST_PIXELS:
            size = f"{picture.width} x {picture.height}"
            raise corrupt(path, f"image {picture.id} claims {size} pixels")
    kept = {
        a.id: msgspec.structs.replace(a, segmentation=a.segmentation.copy())
        for a in found.annotations
        if a.id in annotations
    }
    return Instances(pictures, kept)
