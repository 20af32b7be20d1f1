"""LAVT: language-aware vision transformer (Yang et al., CVPR 2022).

Swin-B reads the picture; at the end of each of its four stages pixels attend to words (PWAM), and
what they found is added, through a gate, to what the next stage sees. Built from the paper and the
published key names alone; the gate behind the last stage, which the public checkpoints hold and
nothing uses, is not built.

Text enters as keys and values of the four stages, which depend on the expression alone: they are
the output of the ``text`` part and may be kept. The first stage sees no text, so while training
it runs once per picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import BATCH, AttentionShape, Method, Network, Part, Port, Rehearsal
from .pictures import MEAN, STD, normalise_pixels, pick
from .pwam import PWAM
from .swin import Swin, SwinConfig
from .text import TextConfig, bert, encode

TextProducts = tuple[Tensor, ...]


@dataclass(frozen=True)
class LAVTConfig:
    """Sizes of a LAVT; the defaults are the paper's.

    size:       pixels per side, a multiple of 32.
    words:      tokens per expression; longer ones are cut, shorter ones padded.
    head_width: channels of the decoder.
    """

    size: int = 480
    words: int = 20
    swin: SwinConfig = field(default_factory=SwinConfig)
    head_width: int = 512
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        # instance normalisation of a single pixel is zero
        if self.size % 32 or self.size < 64:
            raise ValueError(f"{self.size} is no multiple of 32 of at least 64")
        if self.words > self.text.positions:
            raise ValueError(f"{self.words} words, but BERT has {self.text.positions} positions")

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.text.vocabulary


PAPER = LAVTConfig()
TINY = LAVTConfig(
    size=96,
    swin=SwinConfig(
        width=28, depths=(2, 2, 2, 1), heads=(4, 4, 8, 8), window=12, ratio=2, drop_path=0.0
    ),
    head_width=40,
    text=TextConfig(vocabulary=64, width=48, layers=2, heads=4, hidden=96, positions=20),
)
CONFIGS = {"paper": PAPER, "tiny": TINY}


class Decoder(nn.Module):
    """From the coarsest map up: twice the size, the finer map beside it, two convolutions.

    maps: [B, C_i, H / 2^(i+2), W / 2^(i+2)], finest first.
    returns [B, 2, H / 4, W / 4]: background and foreground.
    """

    def __init__(self, widths: tuple[int, ...], width: int) -> None:
        super().__init__()
        below = widths[3]
        for level in (4, 3, 2):
            for n, channels in ((1, below + widths[level - 2]), (2, width)):
                conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                self.add_module(f"conv{n}_{level}", conv)
                self.add_module(f"bn{n}_{level}", nn.BatchNorm2d(width))
            below = width
        self.conv1_1 = nn.Conv2d(width, 2, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = maps[3]
        for level in (4, 3, 2):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = torch.cat((x, maps[level - 2]), dim=1)
            for n in (1, 2):
                conv, norm = getattr(self, f"conv{n}_{level}"), getattr(self, f"bn{n}_{level}")
                x = F.relu(norm(conv(x)))
        out: Tensor = self.conv1_1(x)
        return out


def _gate(width: int) -> nn.Sequential:
    """How much of what was found is let through to the next stage, per pixel and channel."""
    first, second = (nn.Linear(width, width, bias=False) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second, nn.Tanh())


class LAVT(Network):
    """The whole network; see the module docstring."""

    def __init__(self, config: LAVTConfig = PAPER) -> None:
        super().__init__()
        self.config = config
        self.backbone = Swin(config.swin, config.size)
        for i, (stage, width) in enumerate(
            zip(self.backbone.layers, config.swin.widths, strict=True)
        ):
            stage.add_module("fusion", PWAM(width, config.text.width))
            if i < 3:
                stage.add_module("res_gate", _gate(width))
        self.text_encoder = bert(config.text)
        self.classifier = Decoder(config.swin.widths, config.head_width)
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)

    mean: Tensor
    std: Tensor
    last = "classifier.conv1_1"
    high: ClassVar[tuple[str, ...]] = ("classifier.conv1_1",)
    tokens: ClassVar[str] = "wordpiece"
    config: LAVTConfig

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of the four stages."""
        return self.config.swin.widths

    def fusion(self, i: int) -> PWAM:
        """The attention to words behind stage 0 to 3."""
        return cast(PWAM, self.backbone.layers[i].get_submodule("fusion"))

    def encode_text(self, ids: Tensor, words: Tensor) -> TextProducts:
        """ids [B, T] int32, words [B, T] bool to keys_1, values_1, keys_2, ... of the four stages.

        keys_i: [B, T, C_i]; values_i: [B, C_i, T].
        """
        text = encode(self.text_encoder, ids, words)
        products: list[Tensor] = []
        for i in range(4):
            products += self.fusion(i).image_lang_att.project_text(text, words)
        return tuple(products)

    def features(
        self,
        pixels: Tensor,
        words: Tensor,
        products: TextProducts,
        image_index: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """What the four stages found [B, C_i, H_i, W_i], their weights [B, T, H_i * W_i], and the
        rows that go on to the next stage [B, H_i * W_i, C_i] (of the last stage, its own).

        pixels: [B or pictures, S, S, 3] uint8; image_index: [B], each expression's picture.
        """
        swin = self.backbone
        x = swin.stage(0, swin.embed(normalise_pixels(pixels, self.mean, self.std)))
        x = pick(x, image_index)
        maps, attention, stream = [], [], []
        for i in range(4):
            keys, values = products[2 * i : 2 * i + 2]
            found, weights = self.fusion(i)(x, keys, values, words)
            maps.append(swin.output(i, found))
            attention.append(weights)
            if i < 3:
                gate = swin.layers[i].get_submodule("res_gate")
                x = x + gate(found) * found
            stream.append(x)
            if i < 3:
                x = swin.stage(i + 1, swin.downsample(i, x))
        return maps, attention, stream

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Maps to logits [B, S, S], foreground minus background, so the mask is logit > 0.

        The difference is taken before the upsampling, with which it commutes.
        """
        classes = self.classifier(maps)
        logit = classes[:, 1:2] - classes[:, 0:1]
        logit = F.interpolate(logit, scale_factor=4, mode="bilinear", align_corners=True)
        return logit.squeeze(1)

    def forward(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor | None = None
    ) -> Tensor:
        """pixels [B or pictures, S, S, 3] uint8, ids [B, T] int32, words [B, T] bool to logits
        [B, S, S].
        """
        maps, _, _ = self.features(pixels, words, self.encode_text(ids, words), image_index)
        return self.decode(maps)

    def _mask(self, pixels: Tensor, words: Tensor, *products: Tensor) -> Tensor:
        maps, _, _ = self.features(pixels, words, products)
        return self.decode(maps)

    def rehearse(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor, masks: Tensor
    ) -> Rehearsal:
        """With the stream and the attention of every stage.

        What a stage found is what it shows times what words say, zero on average: attributes are
        asked of the stream.
        """
        products = self.encode_text(ids, words)
        maps, attention, stream = self.features(pixels, words, products, image_index)
        seen = tuple(x.transpose(1, 2).reshape(m.shape) for x, m in zip(stream, maps, strict=True))
        return Rehearsal(self.decode(maps), seen, tuple(attention))

    def cross_attention(self) -> tuple[AttentionShape, ...]:
        """One head as wide as the map, behind every stage."""
        c = self.config
        return tuple(
            AttentionShape(f"stage {i}", 1, (c.size >> i + 1) ** 2, c.words, 1, width)
            for i, width in enumerate(c.swin.widths, start=1)
        )

    def parts(self) -> tuple[Part, ...]:
        """The two graphs: ``text`` once per expression, ``mask`` for every picture."""
        c = self.config
        ids, words, pixels, _, logits = self.host_ports(BATCH)
        products = tuple(
            port
            for i, width in enumerate(c.swin.widths, start=1)
            for port in (
                Port(f"keys_{i}", "float32", (BATCH, c.words, width)),
                Port(f"values_{i}", "float32", (BATCH, width, c.words)),
            )
        )
        return (
            Part("text", Method(self, self.encode_text), (ids, words), products),
            Part("mask", Method(self, self._mask), (pixels, words, *products), (logits,)),
        )
