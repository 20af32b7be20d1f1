"""What a model must say of itself to be trained, exported and run: parts, tensors, examples.

A model is cut where something can be computed once: ``text`` per expression, ``image`` per picture
(late fusion), ``mask`` for what is left. Each part is a plain ``nn.Module`` whose forward takes and
returns the tensors that its ports name, in order.

With an image part, ``mask`` has two dynamic sizes, pictures and expressions; its int32 input
``image_index`` [batch] names each expression's picture and is gathered as late as possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

BATCH = "batch"  # expressions
IMAGES = "images"  # pictures, in a model with an image part


@dataclass(frozen=True)
class Port:
    """A named tensor: dtype as NumPy spells it; shape of integers and a symbol at axis 0."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Part:
    """One graph of a model.

    inputs come from the host (``pixels``, ``ids``, ``words``, ``image_index``) or, by name, from
    an earlier part. example makes inputs of a batch size and a seed, in the order of ``inputs``;
    with an image part there are ``pictures(batch)`` pictures.
    """

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    example: Callable[[int, int], tuple[Tensor, ...]]


def pictures(batch: int) -> int:
    """Pictures in an example of so many expressions, in a model with an image part."""
    return (batch + 1) // 2


@dataclass(frozen=True)
class Framing:
    """How a photo becomes a model's square input, and a logit its mask.

    resize:    ``squash``, or ``letterbox`` (aspect kept, centred, the border filled).
    filter:    Pillow's name of the resampling filter.
    fill:      colour of the border, RGB of 0 to 255.
    threshold: probability above which a pixel belongs to the mask.
    """

    resize: str = "squash"
    filter: str = "bilinear"
    fill: tuple[int, int, int] = (0, 0, 0)
    threshold: float = 0.5


@dataclass(frozen=True)
class Rehearsal:
    """What one forward gives while a model is trained.

    logits:    [B, S, S], S the model's size.
    maps:      [B or pictures, C_i, h_i, w_i]: maps that should know what is seen where.
    attention: [B, T, h * w]: weights of words at pixels, summing to 1 over the words.
    extra:     losses of the model's own, by name, already weighted (scalars).
    """

    logits: Tensor
    maps: tuple[Tensor, ...] = ()
    attention: tuple[Tensor, ...] = ()
    extra: dict[str, Tensor] | None = None


class Config(Protocol):
    """The fields that every model's configuration (a frozen dataclass) has."""

    @property
    def size(self) -> int:
        """Pixels per side."""

    @property
    def words(self) -> int:
        """Tokens per expression."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""


class Network(Protocol):
    """What refedge asks of a model, an ``nn.Module`` built from its configuration.

    high:       prefixes of the torch modules that stay in float32 in every plan.
    tokens:     ``wordpiece``, ``clip`` or ``word-level``: the kind of tokenizer of the paper.
    map_widths: channels of the maps of a ``Rehearsal``.
    """

    config: Any
    high: ClassVar[tuple[str, ...]]
    tokens: ClassVar[str]

    @property
    def framing(self) -> Framing:
        """Preprocessing and threshold."""

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of ``Rehearsal.maps``."""

    def encode_text(self, ids: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        """ids [B, T] int32 and words [B, T] bool to all that depends on the expression alone."""

    def forward(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor | None = None
    ) -> Tensor:
        """pixels [B or pictures, S, S, 3] uint8 to logits [B, S, S].

        image_index: [B] int64, each expression's picture; None where there is one for each.
        """

    def rehearse(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor, masks: Tensor
    ) -> Rehearsal:
        """The same with what training looks at; masks [B, S, S] bool are the truth."""

    def rescale(self, shift: float, scale: float) -> None:
        """Change the last layer so that logits become ``scale * (logits - shift)``."""

    def parts(self) -> tuple[Part, ...]:
        """``text``, perhaps ``image``, ``mask``."""
