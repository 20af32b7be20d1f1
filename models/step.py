"""STEP: see-through-text grouping (Chen et al., ICCV 2019).

A recurrent network looks at the maps F1 .. F5 of a dilated ResNet in turn, ``folds`` times over.
Every step pools the words by what the pixels of the mask so far attend to, compares the pooled
words with every pixel in a joint space, and feeds the heat map to a ConvGRU whose state is read out
as the next mask.

The paper pools a sentence vector from all pixels and words in every step. The sums are ordered
differently here, which is exact: which word a pixel attends to does not change from step to step,
so that it is computed once per level; the pooled sentence is then a mean of T vectors, and its
projection into the joint space is one of vectors projected beforehand, with the text. All products
of pixels alone and of words alone leave the loop.

The output is the logit of the last mask, upsampled. The paper upsamples the probability; the two
masks agree on the grid and, between its points, where neighbours lie on the same side of one half.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deeplab import DeepLab, DeepLabConfig
from .parts import BATCH, IMAGES, AttentionShape, Framing, Method, Network, Part, Port, Rehearsal
from .pictures import MEAN, STD, normalise_pixels, pick_all
from .recurrent import BiRecurrent, WordVectors
from .step_layers import Atrous, ConvGRU, Focus, HeatMap, Point, Unit, WordAttention, resize, rows

LEVELS = 5
FINE = 2  # levels of stride 4; the others have stride 8
EARLY = 0.3  # weight in training of the masks before the last

Products = tuple[Tensor, ...]


@dataclass(frozen=True)
class STEPConfig:
    """Sizes of a STEP; the defaults are the paper's, or where it is silent the usual ones.

    size:      pixels per side, a multiple of 8.
    words:     tokens per expression; longer ones are cut, shorter ones padded.
    hidden:    width of the LSTM, per direction.
    context:   channels of the atrous convolutions.
    keep_dim:  let them have the channels of their inputs, coordinates included, instead.
    key:       width in which pixels attend to words.
    joint:     width in which pooled words and pixels are compared.
    filters:   channels of the ConvGRU.
    folds:     how often the five levels are visited.
    deep_first: visit F5 to F1 instead of F1 to F5.
    stride:    pixels per cell of the ConvGRU's state, 4 or 8.
    echoes:    the ConvGRU also sees the last mask and the last heat map.
    framing:   how pictures are preprocessed; a letterbox's border is zero once it is normalised.
    """

    size: int = 320
    words: int = 20
    vocabulary: int = 12112
    word_width: int = 300
    hidden: int = 1000
    backbone: DeepLabConfig = field(default_factory=DeepLabConfig)
    context: int = 512
    keep_dim: bool = False
    key: int = 400
    joint: int = 1000
    filters: int = 32
    folds: int = 5
    deep_first: bool = False
    stride: int = 4
    echoes: bool = False
    framing: Framing = field(default_factory=lambda: Framing("letterbox", fill=(124, 116, 104)))

    def __post_init__(self) -> None:
        if self.size % 8 or self.stride not in (4, 8) or self.folds < 1:
            raise ValueError(
                f"size {self.size} is no multiple of 8, stride {self.stride} not 4 or 8, "
                f"or {self.folds} folds are none"
            )

    @property
    def grids(self) -> tuple[int, ...]:
        """Cells per side of F1 to F5."""
        return tuple(self.size // (4 if level < FINE else 8) for level in range(LEVELS))

    @property
    def contexts(self) -> tuple[int, ...]:
        """Channels of the atrous convolutions of F1 to F5."""
        kept = tuple(c + 8 for c in self.backbone.channels)
        return kept if self.keep_dim else (self.context,) * LEVELS

    @property
    def schedule(self) -> tuple[int, ...]:
        """The level of every step, from 0."""
        once = tuple(range(LEVELS))
        return (once[::-1] if self.deep_first else once) * self.folds


PAPER = STEPConfig()
TINY = STEPConfig(
    size=96,
    vocabulary=64,
    word_width=48,
    hidden=48,
    backbone=DeepLabConfig(24, 5, (24, 32, 40, 48), (1, 1, 2, 1), 2),
    context=64,
    key=48,
    joint=96,
    filters=16,
    folds=1,
    echoes=True,
    framing=Framing(),
)
CONFIGS = {"paper": PAPER, "tiny": TINY}


class STEP(Network):
    """The whole network; see the module docstring.

    Per level: ``atrous``, and two 1x1 convolutions of its map, ``vt`` into the space of the words'
    keys ``ht`` and ``phi`` into the joint space of ``psi``.
    """

    def __init__(self, config: STEPConfig = PAPER) -> None:
        super().__init__()
        self.config = c = config
        self.embeddings = WordVectors(c.vocabulary, c.word_width)
        self.recurrent = BiRecurrent("lstm", c.word_width, c.hidden)
        self.ht = nn.Linear(2 * c.hidden, c.key)
        self.psi = nn.Linear(2 * c.hidden, c.joint)
        self.backbone = DeepLab(c.backbone)
        self.atrous = nn.ModuleList(
            Atrous(*sizes) for sizes in zip(c.backbone.channels, c.contexts, c.grids, strict=True)
        )
        self.vt = nn.ModuleList(nn.Conv2d(width, c.key, 1) for width in c.contexts)
        self.phi = nn.ModuleList(nn.Conv2d(width, c.joint, 1) for width in c.contexts)
        self.unit = Unit()
        self.attend = WordAttention()
        self.focus = Focus()
        self.point = Point()
        self.heat = HeatMap()
        self.gru = ConvGRU(3 if c.echoes else 1, c.filters)
        self.head = nn.Conv2d(c.filters, 1, 1)
        # of the last mask's logits, see rescale
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)

    shift: Tensor
    scale: Tensor
    mean: Tensor
    std: Tensor
    # float32 in every precision plan: norms, the pooling by probabilities, coordinates, last layer
    high = (
        "unit",
        "point.unit",
        "focus",
        "head",
        *(f"atrous.{level}.place" for level in range(LEVELS)),
    )
    tokens = "word-level"
    config: STEPConfig

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of the atrous maps of F1 to F5."""
        return self.config.contexts

    def encode_text(self, ids: Tensor, words: Tensor) -> Products:
        """ids [B, T] int32, words [B, T] bool to keys [B, key, T] and values [B, T, joint].

        keys are the paper's ht; values are psi's linear layer applied to every word, bias and all,
        which is the same as applying it to a mean of words.
        """
        states = self.recurrent(self.embeddings(ids), words)
        return self.ht(states).transpose(1, 2), self.psi(states)

    def atrous_maps(self, pixels: Tensor) -> list[Tensor]:
        """pixels [I, S, S, 3] uint8 to five maps [I, context, h, w]."""
        maps = self.backbone(normalise_pixels(pixels, self.mean, self.std))
        return [atrous(x) for atrous, x in zip(self.atrous, maps, strict=True)]

    def project(self, maps: list[Tensor]) -> Products:
        """Atrous maps to queries_1, phi_1, queries_2, ...: [I, N, key] and [I, N, joint]."""
        products: list[Tensor] = []
        for x, vt, phi in zip(maps, self.vt, self.phi, strict=True):
            products.append(rows(vt(x)))
            products.append(self.unit(torch.tanh(rows(phi(x)))))
        return tuple(products)

    def encode_image(self, pixels: Tensor) -> Products:
        """pixels [I, S, S, 3] uint8 to the products of every level."""
        return self.project(self.atrous_maps(pixels))

    def steps(
        self, words: Tensor, text: Products, image: Products
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The logits [B, 1, h, w] of every step, and the attention [B, N, T] of every level.

        text and image are products of the same B pairs.
        """
        keys, values = text
        queries, embedded = image[::2], image[1::2]
        attention = [self.attend(q, keys, words) for q in queries]
        c = self.config
        grid = c.size // c.stride
        state: Tensor | None = None
        mask: Tensor | None = None
        echoes: Products = ()
        logits: list[Tensor] = []
        for level in c.schedule:
            side = c.grids[level]
            pooled = self.focus(attention[level], None if mask is None else resize(mask, side))
            heat = resize(self.heat(embedded[level], self.point(pooled, values), side), grid)
            state = self.gru(torch.cat((heat, *echoes), 1), state)
            logits.append(self.head(state))
            mask = torch.sigmoid(logits[-1])
            echoes = (mask, heat) if c.echoes else ()
        return logits, attention

    def output(self, logits: Tensor) -> Tensor:
        """The last step's [B, 1, h, w] to [B, S, S]."""
        logits = (logits - self.shift) * self.scale
        scale = float(self.config.stride)
        return F.interpolate(logits, scale_factor=scale, mode="bilinear").squeeze(1)

    def decode(self, words: Tensor, image_index: Tensor | None, *products: Tensor) -> Tensor:
        """words [B, T], keys, values, and products of pictures to logits [B, S, S]."""
        logits, _ = self.steps(words, products[:2], pick_all(products[2:], image_index))
        return self.output(logits[-1])

    def forward(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor | None = None
    ) -> Tensor:
        """pixels [I, S, S, 3] uint8, ids [B, T] int32, words [B, T] bool to logits [B, S, S]."""
        products = (*self.encode_text(ids, words), *self.encode_image(pixels))
        return self.decode(words, image_index, *products)

    def rehearse(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor, masks: Tensor
    ) -> Rehearsal:
        """The same, with a loss on the masks of the steps before the last."""
        maps = self.atrous_maps(pixels)
        image = pick_all(self.project(maps), image_index)
        logits, attention = self.steps(words, self.encode_text(ids, words), image)
        truth = F.avg_pool2d(masks[:, None].float(), self.config.stride)
        early = torch.cat(logits[:-1], 1)
        loss = F.binary_cross_entropy_with_logits(
            early, truth.expand_as(early), weight=1.0 + 3.0 * truth
        )
        return Rehearsal(
            logits=self.output(logits[-1]),
            maps=tuple(maps),
            attention=tuple(a.transpose(1, 2) for a in attention),
            extra={"steps": EARLY * loss},
        )

    @torch.no_grad()
    def rescale(self, shift: float, scale: float) -> None:
        """Exact: masks on the way, which the loop looks at again, stay as they are."""
        self.shift += shift / self.scale
        self.scale *= scale

    def cross_attention(self) -> tuple[AttentionShape, ...]:
        """Once per level, whatever the number of steps."""
        c = self.config
        return tuple(
            AttentionShape(f"F{level}", 1, side**2, c.words, 1, c.key)
            for level, side in enumerate(c.grids, start=1)
        )

    def parts(self) -> tuple[Part, ...]:
        """``text`` once per expression, ``image`` once per picture, ``mask`` for the loop."""
        c = self.config
        ids, words, pixels, index, logits = self.host_ports()
        keys = Port("keys", "float32", (BATCH, c.key, c.words))
        values = Port("values", "float32", (BATCH, c.words, c.joint))
        products = tuple(
            Port(f"{name}_{level}", "float32", (IMAGES, side * side, width))
            for level, side in enumerate(c.grids, start=1)
            for name, width in (("queries", c.key), ("phi", c.joint))
        )
        given = (words, index, keys, values, *products)
        return (
            Part("text", Method(self, self.encode_text), (ids, words), (keys, values)),
            Part("image", Method(self, self.encode_image), (pixels,), products),
            Part("mask", Method(self, self.decode), given, (logits,)),
        )
