"""What a model must say of itself to be trained, exported and run: parts, tensors, examples.

A model is cut where something can be computed once: ``text`` per expression, ``image`` per picture
(late fusion), ``mask`` for what is left. Each part takes and returns the tensors that its ports
name, in order.

With an image part, ``mask`` has two dynamic sizes, pictures and expressions; its int32 input
``image_index`` [batch] names each expression's picture and is gathered as late as possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

BATCH = "batch"  # expressions
IMAGES = "images"  # pictures, in a model with an image part
HOST = ("pixels", "ids", "words", "image_index")  # in the order of a model's forward


@dataclass(frozen=True)
class Port:
    """A named tensor: dtype as NumPy spells it; shape of integers and a symbol at axis 0."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Method(nn.Module):
    """One function of a model as a module of its own."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor | tuple[Tensor, ...]]):
        super().__init__()
        self.model, self._function = model, function

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._function(*inputs)


@dataclass(frozen=True)
class Part:
    """One graph of a model.

    inputs come from the host (``pixels``, ``ids``, ``words``, ``image_index``) or, by name, from
    an earlier part; ``module`` takes them in this order.
    """

    name: str
    module: Method
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


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

    resize: Literal["squash", "letterbox"] = "squash"
    filter: Literal["bilinear", "bicubic"] = "bilinear"
    fill: tuple[int, int, int] = (0, 0, 0)
    threshold: float = 0.5


@dataclass(frozen=True)
class AttentionShape:
    """Where pixels and words meet: so many calls of one shape.

    pixels, words: tokens on either side; heads x width: of the scores.
    """

    name: str
    calls: int
    pixels: int
    words: int
    heads: int
    width: int


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


class Network(nn.Module):
    """What refedge asks of a model; a model of one's own is a subclass.

    config: a frozen dataclass; it has ``size`` (pixels per side), ``words`` (tokens per expression)
            and ``vocabulary`` (number of token ids).
    high:   prefixes of the names of modules that stay in float32 in every plan.
    tokens: kind of tokenizer: ``wordpiece``, ``clip`` or ``word-level``.
    last:   name of the last layer, for ``rescale``.

    To be exported and run it needs ``config``, ``encode_text``, ``forward`` and ``parts``; to be
    trained, ``rehearse`` and ``map_widths``; to be seeded without a checkpoint, ``last`` or a
    ``rescale`` of its own.
    """

    config: Any
    high: ClassVar[tuple[str, ...]] = ()
    tokens: ClassVar[str] = "word-level"
    last: str = ""

    @property
    def framing(self) -> Framing:
        """Preprocessing and threshold: the configuration's, where it has one."""
        found: Framing = getattr(self.config, "framing", Framing())
        return found

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of ``Rehearsal.maps``."""
        return ()

    def encode_text(self, ids: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        """ids [B, T] int32 and words [B, T] bool to all that depends on the expression alone."""
        raise NotImplementedError

    def forward(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor | None = None
    ) -> Tensor:
        """pixels [B or pictures, S, S, 3] uint8 to logits [B, S, S].

        image_index: [B] integers, each expression's picture; None where there is one for each.
        """
        raise NotImplementedError

    def rehearse(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor, masks: Tensor
    ) -> Rehearsal:
        """The same with what training looks at; masks [B, S, S] bool are the truth."""
        return Rehearsal(self(pixels, ids, words, image_index))

    @torch.no_grad()
    def rescale(self, shift: float, scale: float) -> None:
        """Change the last layer so that logits become ``scale * (logits - shift)``.

        Here the one that ``last`` names, of one output or of two, foreground less background.
        """
        if not self.last:
            raise NotImplementedError
        weight, bias = self.get_submodule(self.last).parameters()
        bias[-1] -= shift
        weight.mul_(scale)
        bias.mul_(scale)

    def cross_attention(self) -> tuple[AttentionShape, ...]:
        """The shapes in which pixels and words meet."""
        return ()

    def host_ports(self, pictures: str = IMAGES) -> tuple[Port, Port, Port, Port, Port]:
        """``ids``, ``words``, ``pixels`` and ``image_index``, which the host gives, and ``logits``.

        pictures: symbol of the pixels' axis 0, ``BATCH`` in a model without an image part.
        """
        size, words = self.config.size, self.config.words
        return (
            Port("ids", "int32", (BATCH, words)),
            Port("words", "bool", (BATCH, words)),
            Port("pixels", "uint8", (pictures, size, size, 3)),
            Port("image_index", "int32", (BATCH,)),
            Port("logits", "float32", (BATCH, size, size)),
        )

    def parts(self) -> tuple[Part, ...]:
        """``text``, perhaps ``image``, ``mask``."""
        raise NotImplementedError
