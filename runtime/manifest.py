"""What a bundle says of itself: frozen records, one JSON file.

``docs/bundle.md`` is the specification. A manifest carries a digest of its own bytes and the
SHA-256 of every other file, so a reader knows that it holds what the exporter wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from ..errors import BundleError
from .sealed import BLANK, broken, seal

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor: NumPy dtype name, shape of integers and symbols such as ``batch``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class PartSpec:
    """One graph of the model; ``profile`` gives the least, usual and largest batch."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: tuple[int, int, int]


@dataclass(frozen=True)
class PreprocessSpec:
    """How a picture becomes ``pixels``: uint8 RGB, height x width, resized on the host.

    resize: ``squash`` (both sides to the target, aspect not kept) or ``letterbox`` (aspect kept,
            the picture in the middle, the border filled).
    filter: Pillow's name of the resampling filter, which antialiases when it shrinks.
    fill:   colour of the border, RGB.
    """

    height: int
    width: int
    resize: Literal["squash", "letterbox"] = "squash"
    filter: Literal["bilinear", "bicubic"] = "bilinear"
    fill: tuple[int, int, int] = (0, 0, 0)

    def frame(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of where a picture of a size (width, height) lies."""
        if self.resize == "squash":
            return 0, 0, self.width, self.height
        scale = min(self.width / size[0], self.height / size[1])
        width = max(1, min(self.width, round(size[0] * scale)))
        height = max(1, min(self.height, round(size[1] * scale)))
        left, top = (self.width - width) // 2, (self.height - height) // 2
        return left, top, left + width, top + height


@dataclass(frozen=True)
class TokenizerSpec:
    """How an expression becomes ``ids`` and ``words``.

    words:      ids per expression; shorter ones are padded with ``pad``.
    truncation: ``cut`` keeps the first ids, even if that drops a closing special token;
                ``keep-last`` puts the last id in the last place.
    unknown:    id of unknown words, -1 where there are none; ``closed`` vocabularies refuse them,
                because the model has never seen anything but its vocabulary.
    stand_in:   the vocabulary is made up, because the real one is a download.
    """

    file: str
    words: int
    pad: int
    unknown: int
    closed: bool
    stand_in: bool
    truncation: Literal["cut", "keep-last"] = "cut"


@dataclass(frozen=True)
class PostprocessSpec:
    """How logits become a mask: those of the picture resized to it, then ``> threshold``."""

    threshold: float = 0.0
    resize: str = "bilinear"


@dataclass(frozen=True)
class DialectSpec:
    """The graphs of one precision plan for one family of runtimes.

    graphs: part name to file; files: everything else that loading them takes (weights, sidecars).
    fused: in a dialect with the plugin, the operator of every attention to words, or why none.
    """

    name: str
    plan: str
    graphs: dict[str, str]
    files: tuple[str, ...] = ()
    fused: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class FileSpec:
    """Size in bytes and SHA-256 of a file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The whole manifest; see ``docs/bundle.md``.

    canonical: the graphs that every dialect is made from.
    high:  torch modules whose nodes stay in float32 in every plan.
    plans: precision plan to its file; ``fp32`` needs none.
    folding: what became of each block of attention to words: folded or left, and why.
    """

    model: str
    config: dict[str, Any]
    preprocess: PreprocessSpec
    tokenizer: TokenizerSpec
    postprocess: PostprocessSpec
    protocol: str
    parts: tuple[PartSpec, ...]
    canonical: DialectSpec
    high: tuple[str, ...]
    plans: dict[str, str]
    dialects: tuple[DialectSpec, ...]
    files: dict[str, FileSpec]
    provenance: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    folding: tuple[dict[str, Any], ...] = ()
    accuracy: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA
    digest: str = BLANK

    def part(self, name: str) -> PartSpec:
        """The part of that name."""
        return next(p for p in self.parts if p.name == name)


def encode_manifest(manifest: Manifest) -> bytes:
    """Indented JSON with its own digest filled in."""
    return seal(manifest)


def decode_manifest(raw: bytes) -> Manifest:
    """Check the digest, then parse and validate."""
    if why := broken(raw):
        raise _damaged(why)
    try:
        version = msgspec.json.decode(raw)["schema"]
        if version != SCHEMA:
            raise BundleError(
                "bundle-schema",
                f"the bundle has schema {version}",
                why=f"this version of refedge reads schema {SCHEMA}",
                fix="export the model again, or install the refedge that wrote it",
            )
        return msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(str(error)) from error


def _damaged(why: str) -> BundleError:
    return BundleError(
        "bundle-damaged",
        f"the bundle's {MANIFEST} is damaged",
        why=why,
        fix="copy the bundle again, or export it anew",
    )
