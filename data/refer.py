"""RefCOCO and its family, read from the files that their authors publish.

The layout is that of the REFER toolkit (Kazemzadeh et al. 2014, Yu et al. 2016, Mao et al. 2016)
and of gRefCOCO (Liu et al. 2023); ``docs/datasets.md`` draws it. A *ref* is what several sentences
speak of; published evaluations score every sentence of every ref, and so does this reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import DataError
from .coco_masks import OVERLAPS, decode, pycocotools
from .files import corrupt, inside
from .refer_files import (
    NOTHING,
    Annotation,
    Instances,
    Ref,
    Sentence,
    find_refs,
    of_split,
    read_instances,
    read_refs,
)
from .referral import Bools, Referral, first, nowhere

FIELDS = ("raw", "sent")

_COCO = ("images/mscoco/images/train2014", "images/train2014")


@dataclass(frozen=True)
class Layout:
    """Where a dataset lies under the root, in a folder of its own name.

    split_by:    who divided it into splits, the usual division first.
    refs:        the stem of ``refs(unc).p``.
    images:      folders that its pictures are looked for in.
    generalized: an expression may mean several objects or none, and crowds are skipped.
    lost:        pictures that refs speak of and that were never published; their refs are dropped.
    """

    split_by: tuple[str, ...]
    refs: str = "refs"
    images: tuple[str, ...] = _COCO
    generalized: bool = False
    lost: tuple[str, ...] = ()


DATASETS = {
    "refcoco": Layout(("unc", "google")),
    "refcoco+": Layout(("unc",)),
    "refcocog": Layout(("umd", "google")),
    "grefcoco": Layout(("unc",), refs="grefs", generalized=True),
    "refclef": Layout(
        ("unc", "berkeley"),
        images=("images/saiapr_tc-12",),
        lost=("17975.jpg", "19575.jpg", "19579.jpg"),
    ),
}


@dataclass(frozen=True)
class _Meant:
    """A ref with what it points to; no objects where the expression means nothing."""

    ref_id: int
    path: Path
    size: tuple[int, int]
    objects: tuple[Annotation, ...]


class Refer:
    """A split of a dataset: every sentence of every ref, in the order of the file.

    root:     the folder that holds ``refcoco/`` and ``images/``.
    dataset:  a key of ``DATASETS``.
    split:    ``train``, ``val``, ``test``, ``testA``, ...; see ``refer_files.of_split``.
    split_by: who divided it; None for the usual division.
    field:    ``raw`` or ``sent``; a protocol says which of them its models read.
    overlap:  ``any`` or ``eq1``, see ``coco_masks.decode``; a protocol says which.
    limit:    at most so many expressions, from the first on.
    """

    def __init__(
        self,
        root: str | Path,
        dataset: str = "refcoco",
        split: str = "val",
        split_by: str | None = None,
        *,
        field: str = "raw",
        overlap: str = "any",
        limit: int | None = None,
    ) -> None:
        _choose("data-unknown", "dataset", dataset, tuple(DATASETS))
        self.layout = DATASETS[dataset]
        division = split_by or self.layout.split_by[0]
        _choose("data-unknown", f"division of {dataset}", division, self.layout.split_by)
        _choose("data-option", "text field", field, FIELDS)
        _choose("data-option", "overlap mode", overlap, OVERLAPS)
        pycocotools()
        self.name = f"{dataset}/{division}/{split}"
        self.overlap = overlap
        source = find_refs(Path(root) / dataset, f"{self.layout.refs}({division})")
        instances = source.with_name("instances.json")
        refs = of_split(read_refs(source), split, source)
        held = read_instances(instances, refs)
        refs = [ref for ref in refs if not _is_lost(ref, held, self.layout)]
        said = [(i, s) for i, ref in enumerate(refs) for s in ref.sentences]
        said = first(said, limit, source)
        refs = refs[: said[-1][0] + 1]
        paths = _find({ref.image_id for ref in refs}, held, Path(root), self.layout)
        self._said = [(i, s.sent_id, _text(s, field, source)) for i, s in said]
        self._meant = [_resolve(ref, held, paths, self.layout, source) for ref in refs]

    def __len__(self) -> int:
        return len(self._said)

    def __iter__(self) -> Iterator[Referral]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Referral:
        ref, sentence, text = self._said[index]
        meant = self._meant[ref]
        target = bool(meant.objects)
        return Referral(
            id=f"{self.name}/{meant.ref_id}/{sentence}",
            image_path=meant.path,
            text=text,
            family=("target" if target else "no-target") if self.layout.generalized else "all",
            target=target,
            size=meant.size,
            decode=partial(_truth, meant, self.overlap),
        )


def _truth(meant: _Meant, overlap: str) -> Bools:
    """[height, width] bool: the union of what is meant."""
    mask = nowhere(*meant.size)
    for a in meant.objects:
        name = f"annotation {a.id} of ref {meant.ref_id}"
        mask |= decode(bytes(a.segmentation), *meant.size, overlap, name)
    return mask


def _is_lost(ref: Ref, held: Instances, layout: Layout) -> bool:
    picture = held.pictures.get(ref.image_id)
    return picture is not None and picture.file_name in layout.lost


def _resolve(
    ref: Ref, held: Instances, paths: dict[int, Path], layout: Layout, source: Path
) -> _Meant:
    """Follow a ref to its picture and objects, before anybody waits for an evaluation."""
    problem = _problem(ref, held, layout)
    if problem is not None:
        fix = f"take {source.name} and instances.json from the same release"
        raise corrupt(source, f"ref {ref.ref_id} {problem}", fix)
    objects = tuple(held.annotations[a] for a in ref.annotations if a != NOTHING)
    if layout.generalized:
        objects = tuple(a for a in objects if not a.iscrowd)
    picture = held.pictures[ref.image_id]
    return _Meant(ref.ref_id, paths[ref.image_id], (picture.width, picture.height), objects)


def _problem(ref: Ref, held: Instances, layout: Layout) -> str | None:
    """Why a ref cannot be followed, if so."""
    if ref.image_id not in held.pictures:
        return f"points to image {ref.image_id}, which is not there"
    if layout.generalized and ref.annotations == [NOTHING]:
        return None
    if not layout.generalized and len(ref.annotations) != 1:
        return f"means {len(ref.annotations)} objects instead of one"
    for a in ref.annotations:
        if a not in held.annotations:
            return f"points to annotation {a}, which is not there"
        if held.annotations[a].image_id != ref.image_id:
            return f"is about image {ref.image_id}, its annotation {a} about another"
    if layout.generalized and all(held.annotations[a].iscrowd for a in ref.annotations):
        return "means neither an object nor, with [-1], nothing"
    return None


def _find(images: set[int], held: Instances, root: Path, layout: Layout) -> dict[int, Path]:
    """Where each picture lies."""
    found: dict[int, Path] = {}
    absent: list[str] = []
    for picture in (held.pictures[i] for i in images if i in held.pictures):
        name = picture.file_name
        places = [inside(root / folder, name, "instances.json") for folder in layout.images]
        place = next((p for p in places if p.is_file()), None)
        if place is None:
            absent.append(name)
        else:
            found[picture.id] = place
    if absent:
        raise DataError(
            "data-missing",
            f"{len(absent)} of {len(images)} pictures are missing, such as {min(absent)}",
            why=f"they are in none of {', '.join(str(root / folder) for folder in layout.images)}",
            fix="put the pictures there, or a link to their folder",
        )
    return found


def _text(sentence: Sentence, field: str, source: Path) -> str:
    text = sentence.raw if field == "raw" else sentence.sent
    if text is None:
        raise corrupt(source, f"sentence {sentence.sent_id} has no {field!r}", "read another field")
    return text


def _choose(code: str, what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise DataError(
            code,
            f"there is no {what} called {value!r}",
            why=f"known are {', '.join(known)}",
            fix="choose one of these",
        )
