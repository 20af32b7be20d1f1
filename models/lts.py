"""LTS: locate then segment (Jing et al., CVPR 2021, arXiv 2103.16284).

A neck fuses Darknet's maps with the sentence, a locator scores where the target is, and a light
head cuts it out of the fused map and the sigmoid of those scores, the position prior. There is no
public code or checkpoint; sizes are those of the paper's family, names are this module's own.

A picture can be kept as far as the sentence's gate: its three projected maps. An expression as its
gate and what the locator makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .aspp import MaskHead
from .darknet import BLOCKS, WIDTHS, Darknet
from .locators import CrossAttention, Filtering
from .lts_neck import Neck, Tensors, VectorNorm
from .parts import BATCH, IMAGES, AttentionShape, Framing, Method, Network, Part, Port, Rehearsal
from .pictures import unit_pixels
from .recurrent import BiRecurrent, WordVectors, masked_mean

LOCATORS = ("filtering", "transformer")


@dataclass(frozen=True)
class LTSConfig:
    """Sizes of a LTS; the defaults are the paper's on RefCOCO, as far as they are known.

    size:          pixels per side, a multiple of 32.
    words:         words per expression; 20 on RefCOCOg.
    vocabulary:    rows of the table of word vectors: words that the data knows.
    embedding, hidden: width of a word vector; of the GRU, per direction.
    widths, blocks: of the Darknet.
    top, width:    channels of the gated map, and of the fused one.
    stride:        of the fused map: 16 or 8.
    codes:         coordinates in the fused map: 8 or 2.
    locator:       ``filtering`` or ``transformer``.
    filters, kernel: how often to filter; side of the kernel that the sentence makes, 1 or 3.
    layers, heads, attention, ffn: of the transformer; its width and that of its feed-forward.
    pyramid, rates: channels of ASPP's branches and their rates.
    doublings:     channels after each transposed convolution.
    location:      weight of the locator's loss.
    framing:       the paper's family puts a grey border around and asks for 35 %.
    """

    size: int = 416
    words: int = 15
    vocabulary: int = 12000
    embedding: int = 300
    hidden: int = 512
    widths: tuple[int, int, int, int, int, int] = WIDTHS
    blocks: tuple[int, int, int, int, int] = BLOCKS
    top: int = 1024
    width: int = 512
    stride: int = 16
    codes: int = 8
    locator: str = "filtering"
    filters: int = 1
    kernel: int = 1
    layers: int = 2
    heads: int = 8
    attention: int = 256
    ffn: int = 1024
    pyramid: int = 256
    rates: tuple[int, ...] = (6, 12, 18)
    doublings: tuple[int, ...] = (128, 64)
    location: float = 1.0
    framing: Framing = field(
        default_factory=lambda: Framing("letterbox", fill=(128, 128, 128), threshold=0.35)
    )

    def __post_init__(self) -> None:
        if self.size % 32 or self.stride not in (8, 16) or self.codes not in (2, 8):
            raise ValueError(f"size {self.size}, stride {self.stride} or {self.codes} coordinates")
        if self.locator not in LOCATORS:
            raise ValueError(f"{self.locator!r} is not one of the {len(LOCATORS)} {LOCATORS}")
        if self.filters < 1 or self.kernel not in (1, 3):
            raise ValueError(f"{self.filters} filters of {self.kernel}x{self.kernel}")
        if self.attention % (4 * self.heads) or self.layers < 1:
            raise ValueError(f"{self.attention} channels, {self.heads} heads, {self.layers} layers")
        if self.stride % 2 ** len(self.doublings):
            raise ValueError(f"stride {self.stride} cannot be doubled {len(self.doublings)} times")

    @property
    def side(self) -> int:
        """Side of the fused map."""
        return self.size // self.stride

    @property
    def scale(self) -> int:
        """From the mask head's logits to pixels."""
        return self.stride >> len(self.doublings)


PAPER = LTSConfig()
TINY = LTSConfig(
    size=96,
    words=20,
    vocabulary=64,
    embedding=48,
    hidden=32,
    widths=(8, 16, 32, 64, 96, 128),
    blocks=(0, 1, 1, 1, 1),
    top=96,
    width=64,
    stride=8,
    locator="transformer",
    layers=2,
    heads=2,
    attention=64,
    ffn=128,
    pyramid=32,
    rates=(1, 2, 4),
    doublings=(24,),
    framing=Framing(),
)
CONFIGS = {"paper": PAPER, "tiny": TINY}


class _Found(NamedTuple):
    logits: Tensor
    scores: Tensor
    fused: Tensor
    attention: Tensors


class LTS(Network):
    """The whole network; see the module docstring."""

    def __init__(self, config: LTSConfig = PAPER) -> None:
        super().__init__()
        self.config = c = config
        text = 2 * c.hidden
        self.embeddings = WordVectors(c.vocabulary, c.embedding)
        self.recurrent = BiRecurrent("gru", c.embedding, c.hidden)
        self.gate = VectorNorm(text, c.top)
        self.backbone = Darknet(c.widths, c.blocks)
        self.neck = Neck(c.widths[3:], c.top, c.width, c.stride, c.side, c.codes)
        self.locator: Filtering | CrossAttention
        if c.locator == "filtering":
            self.locator = Filtering(text, c.width, c.side, c.kernel, c.filters)
        else:
            self.locator = CrossAttention(
                text, c.width, c.side, c.attention, c.heads, c.ffn, c.layers
            )
        self.head = MaskHead(c.width, c.pyramid, c.rates, c.doublings)

    # float32 in every precision plan: coordinates, scores, the prior's convolutions, last layer
    high: ClassVar[tuple[str, ...]] = (
        "neck.place",
        "locator.score",
        "locator.evidence",
        "head.evidence",
        "head.logit",
    )
    tokens: ClassVar[str] = "word-level"
    last = "head.logit"
    config: LTSConfig

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of Darknet's maps at strides 8 and 16, and of the fused map."""
        return (*self.config.widths[3:5], self.config.width)

    def encode_text(self, ids: Tensor, words: Tensor) -> Tensors:
        """ids and words [B, T] to the gate [B, top, 1, 1] and the locator's products."""
        states = self.recurrent(self.embeddings(ids), words)
        sentence = masked_mean(states, words)
        return (self.gate(sentence), *self.locator.project_text(states, sentence))

    def encode_image(self, pixels: Tensor) -> Tensors:
        """Pixels [I, S, S, 3] uint8 to the neck's laterals: top, middle, low."""
        return self.neck.laterals(self.backbone(unit_pixels(pixels)))

    def decode(
        self, words: Tensor | None, text: Tensors, image: Tensors, image_index: Tensor | None
    ) -> _Found:
        """Products of both sides to logits [B, S, S] and what training looks at.

        words: [B, T] bool, where the locator is ``masked``.
        """
        fused = self.neck(image, text[0], image_index)
        scores, fused, attention = self.locator(fused, words, text[1:])
        logits = self.head(fused, torch.sigmoid(scores))
        if self.config.scale > 1:
            logits = F.interpolate(logits, scale_factor=float(self.config.scale), mode="bilinear")
        return _Found(logits.squeeze(1), scores, fused, attention)

    def forward(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor | None = None
    ) -> Tensor:
        text = self.encode_text(ids, words)
        return self.decode(words, text, self.encode_image(pixels), image_index).logits

    def rehearse(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor, masks: Tensor
    ) -> Rehearsal:
        maps = self.backbone(unit_pixels(pixels))
        text = self.encode_text(ids, words)
        found = self.decode(words, text, self.neck.laterals(maps), image_index)
        where = F.avg_pool2d(masks[:, None].float(), self.config.stride)
        location = F.binary_cross_entropy_with_logits(found.scores.float(), where)
        return Rehearsal(
            found.logits,
            (*maps[:2], found.fused),
            found.attention,
            {"location": self.config.location * location},
        )

    def cross_attention(self) -> tuple[AttentionShape, ...]:
        """The sentence's kernel at every pixel, or the locator's layers."""
        c = self.config
        pixels = c.side**2
        if self.masked:
            depth = c.attention // c.heads
            return (AttentionShape("locator", c.layers, pixels, c.words, c.heads, depth),)
        return (AttentionShape("filter", c.filters, pixels, c.kernel**2, 1, c.width),)

    def parts(self) -> tuple[Part, ...]:
        """``text`` once per expression, ``image`` once per picture, ``mask`` for every pair."""
        c = self.config
        ids, words, pixels, index, logits = self.host_ports()
        text = tuple(
            Port(name, "float32", (BATCH, *shape))
            for name, shape in {"gate": (c.top, 1, 1), **self.locator.shapes(c.words)}.items()
        )
        image = tuple(
            Port(name, "float32", (IMAGES, width, side, side))
            for name, width, side in (
                ("top", c.top, c.size // 32),
                ("middle", c.width, c.size // 16),
                ("low", c.width, c.side),
            )
        )
        inputs = (index, words, *text, *image) if self.masked else (index, *text, *image)
        return (
            Part("text", Method(self, self.encode_text), (ids, words), text),
            Part("image", Method(self, self.encode_image), (pixels,), image),
            Part("mask", Method(self, self._mask), inputs, (logits,)),
        )

    @property
    def masked(self) -> bool:
        """Whether the mask part needs to know what is padding."""
        return isinstance(self.locator, CrossAttention)

    def _mask(self, image_index: Tensor, *products: Tensor) -> Tensor:
        words = None
        if self.masked:
            words, products = products[0], products[1:]
        cut = 1 + len(self.locator.shapes(self.config.words))
        return self.decode(words, products[:cut], products[cut:], image_index).logits
