"""SLViT: scale-wise language-guided vision transformer (Ouyang et al., IJCAI 2023).

MSCAN with a text branch in every block of all four stages, cross-scale enhancement of the regions
that the scales disagree on, and a light Hamburger decoder. Module names are those of the official
checkpoints, so a state dict maps by key. Two things the public code leaves to chance are fixed
here: which regions are enhanced (``SLViTConfig.score``) and the first bases of the decoder.

Text enters as keys and values of every block, which depend on the expression alone: they are the
output of the ``text`` part and may be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hamburger import LightHamHead
from .mscan import ChannelNorm, Mlp, PatchEmbed, Stem, StripConvs
from .parts import BATCH, AttentionShape, Method, Network, Part, Port, Rehearsal
from .pictures import MEAN, STD, normalise_pixels
from .text import TextConfig, bert, encode
from .urce import CrossScaleEnhancement
from .word_attention import GatedCross

SCORES = ("paper", "official", "all")

TextProducts = tuple[Tensor, ...]


@dataclass(frozen=True)
class SLViTConfig:
    """Sizes of a SLViT; the defaults are the paper's.

    size:     pixels per side, a multiple of 32.
    words:    tokens per expression; longer ones are cut, shorter ones padded.
    regions:  how many of the (size/32)^2 regions are enhanced.
    layer_scale: first value of the residual branches' scales (training starts from it).
    score:    ``paper``: relevance is the largest attention weight over words; ``official``: as the
              public code, whose relevance is constant, made deterministic (the first regions);
              ``all``: every region, without TopK.
    """

    size: int = 480
    words: int = 20
    widths: tuple[int, int, int, int] = (64, 128, 320, 512)
    depths: tuple[int, int, int, int] = (3, 3, 12, 3)
    ratios: tuple[int, int, int, int] = (8, 8, 4, 4)
    drop_path: float = 0.2
    layer_scale: float = 1e-2
    regions: int = 32
    region_width: int = 256
    region_heads: int = 8
    score: str = "paper"
    head_width: int = 512
    head_out: int = 256
    head_rank: int = 64
    head_groups: int = 32
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        if self.size % 32 or self.score not in SCORES:
            raise ValueError(f"{self.size} is no multiple of 32, or {self.score!r} not of {SCORES}")
        if self.regions > self.grid**2:
            raise ValueError(f"{self.regions} regions of {self.grid**2} cannot be chosen")

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.text.vocabulary

    @property
    def grid(self) -> int:
        """Regions per side: the side of the coarsest map."""
        return self.size // 32


PAPER = SLViTConfig()
TINY = SLViTConfig(
    size=96,
    widths=(16, 40, 72, 104),
    depths=(1, 2, 3, 1),
    ratios=(4, 4, 3, 3),
    drop_path=0.0,
    layer_scale=0.3,
    regions=4,
    region_width=48,
    region_heads=4,
    head_width=48,
    head_out=24,
    head_rank=16,
    head_groups=8,
    text=TextConfig(vocabulary=64, width=48, layers=2, heads=4, hidden=96, positions=20),
)
CONFIGS = {"paper": PAPER, "tiny": TINY}


class LMFA(StripConvs):
    """Language-guided multi-scale fusion attention: strip convolutions plus the text branch."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__(width)
        self.conv3 = nn.Conv2d(width, width, 1)
        self.fusion = GatedCross(width, text_width)

    def forward(
        self, u: Tensor, keys: Tensor, values: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        base, total = self.strips(u)
        fused, weights = self.fusion(base, keys, values, words)
        return self.conv3(total + fused) * u, weights


class Attention(nn.Module):
    """1x1, GELU, LMFA, 1x1, residual."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(width, width, 1)
        self.spatial_gating_unit = LMFA(width, text_width)
        self.proj_2 = nn.Conv2d(width, width, 1)

    def forward(
        self, z: Tensor, keys: Tensor, values: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        u = F.gelu(self.proj_1(z))
        gated, weights = self.spatial_gating_unit(u, keys, values, words)
        return self.proj_2(gated) + z, weights


class Block(nn.Module):
    """Attention and MLP, each behind a batch norm, scaled per channel, on a residual path."""

    def __init__(self, width: int, ratio: int, text_width: int, drop: float, scale: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.attn = Attention(width, text_width)
        self.norm2 = nn.BatchNorm2d(width)
        self.mlp = Mlp(width, ratio)
        self.layer_scale_1 = nn.Parameter(torch.full((width,), scale))
        self.layer_scale_2 = nn.Parameter(torch.full((width,), scale))
        self.drop = drop

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        attended, weights = self.attn(self.norm1(x), keys, values, words)
        x = x + self._thin(self.layer_scale_1.view(-1, 1, 1) * attended)
        x = x + self._thin(self.layer_scale_2.view(-1, 1, 1) * self.mlp(self.norm2(x)))
        return x, weights

    def _thin(self, x: Tensor) -> Tensor:
        """Stochastic depth, in training only (Huang et al., ECCV 2016)."""
        if not self.training or self.drop == 0.0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.drop
        return x * keep / (1.0 - self.drop)


class Encoder(nn.Module):
    """The four stages; every one returns its normalised map and how relevant each pixel is."""

    def __init__(self, config: SLViTConfig) -> None:
        super().__init__()
        last = max(1, sum(config.depths) - 1)
        rates = [config.drop_path * i / last for i in range(last + 1)]
        for i, (width, depth, ratio) in enumerate(
            zip(config.widths, config.depths, config.ratios, strict=True), start=1
        ):
            embed = Stem(width) if i == 1 else PatchEmbed(config.widths[i - 2], width)
            blocks = [
                Block(width, ratio, config.text.width, rates.pop(0), config.layer_scale)
                for _ in range(depth)
            ]
            setattr(self, f"patch_embed{i}", embed)
            setattr(self, f"block{i}", nn.ModuleList(blocks))
            setattr(self, f"norm{i}", ChannelNorm(width))

    def blocks(self, stage: int) -> list[Block]:
        """The blocks of stage 1 to 4."""
        return list(getattr(self, f"block{stage}"))

    def project_text(self, text: Tensor, words: Tensor) -> TextProducts:
        """Word vectors [B, T, E] to keys_1, values_1, keys_2, ... of the four stages.

        keys_i: [B, depth_i, T, C_i]; values_i: [B, depth_i, C_i, T].
        """
        products: list[Tensor] = []
        for stage in (1, 2, 3, 4):
            pairs = [
                block.attn.spatial_gating_unit.fusion.vis_lang_att.project_text(text, words)
                for block in self.blocks(stage)
            ]
            products.append(torch.stack([keys for keys, _ in pairs], dim=1))
            products.append(torch.stack([values for _, values in pairs], dim=1).transpose(2, 3))
        return tuple(products)

    def forward(
        self, x: Tensor, words: Tensor, products: TextProducts
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Normalised pixels to four maps [B, C_i, H_i, W_i] and what their blocks attended to.

        The attention of a block is [B, T, H_i * W_i].
        """
        maps: list[Tensor] = []
        attention: list[list[Tensor]] = []
        for stage in (1, 2, 3, 4):
            x = getattr(self, f"patch_embed{stage}")(x)
            keys, values = products[2 * stage - 2 : 2 * stage]
            attention.append([])
            for j, block in enumerate(self.blocks(stage)):
                x, weights = block(x, keys[:, j], values[:, j], words)
                attention[-1].append(weights)
            x = getattr(self, f"norm{stage}")(x)
            maps.append(x)
        return maps, attention


def _relevances(maps: list[Tensor], attention: list[list[Tensor]]) -> list[Tensor]:
    """[B, 1, H_i, W_i]: the largest weight that a pixel's last attention gives to a word."""
    return [
        weights[-1].amax(1).reshape(-1, 1, *x.shape[2:])
        for x, weights in zip(maps, attention, strict=True)
    ]


class SLViT(Network):
    """The whole network; see the module docstring."""

    def __init__(self, config: SLViTConfig = PAPER) -> None:
        super().__init__()
        self.config = config
        self.backbone = Encoder(config)
        self.text_encoder = bert(config.text)
        self.inter_trans = CrossScaleEnhancement(
            config.widths,
            config.grid,
            config.region_width,
            config.region_heads,
            config.regions,
            config.score,
        )
        self.squeelayers = nn.ModuleList(nn.Conv2d(2 * c, c, 1) for c in config.widths)
        self.normlayers = nn.ModuleList(ChannelNorm(c) for c in config.widths)
        self.classifier = LightHamHead(
            config.widths,
            config.head_width,
            config.head_out,
            config.head_rank,
            config.head_groups,
            (6, 7),
        )
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)

    mean: Tensor
    std: Tensor
    last = "classifier.conv1"
    # float32 in every precision plan: the ratios of the factorisation, and the last layer
    high = ("classifier.hamburger.ham", "classifier.conv1")
    tokens = "wordpiece"
    config: SLViTConfig

    def encode_text(self, ids: Tensor, words: Tensor) -> TextProducts:
        """ids [B, T] int32, words [B, T] bool to the text products of every block."""
        return self.backbone.project_text(encode(self.text_encoder, ids, words), words)

    def features(
        self, pixels: Tensor, words: Tensor, products: TextProducts
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The encoder's maps and relevances; pixels [B, H, W, 3] uint8."""
        maps, attention = self._attend(pixels, words, products)
        return maps, _relevances(maps, attention)

    def _attend(
        self, pixels: Tensor, words: Tensor, products: TextProducts
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        x = normalise_pixels(pixels, self.mean, self.std)
        found: tuple[list[Tensor], list[list[Tensor]]] = self.backbone(x, words, products)
        return found

    def decode(self, maps: list[Tensor], relevances: list[Tensor]) -> Tensor:
        """Maps to logits [B, H, W], foreground minus background, so the mask is logit > 0.

        The difference is taken before the upsampling, with which it commutes.
        """
        enhanced = self.inter_trans(maps, relevances)
        fused = [
            F.relu(norm(squeeze(torch.cat((g, f), dim=1))))
            for g, f, squeeze, norm in zip(
                enhanced, maps, self.squeelayers, self.normlayers, strict=True
            )
        ]
        classes = self.classifier(fused)
        logit = classes[:, 1:2] - classes[:, 0:1]
        logit = F.interpolate(logit, scale_factor=4, mode="bilinear", align_corners=True)
        return logit.squeeze(1)

    def forward(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor | None = None
    ) -> Tensor:
        """pixels [B, H, W, 3] uint8, ids [B, T] int32, words [B, T] bool to logits [B, H, W]."""
        pixels = pixels if image_index is None else pixels[image_index]
        maps, relevances = self.features(pixels, words, self.encode_text(ids, words))
        return self.decode(maps, relevances)

    def _mask(self, pixels: Tensor, words: Tensor, *products: Tensor) -> Tensor:
        return self.decode(*self.features(pixels, words, products))

    def rehearse(
        self, pixels: Tensor, ids: Tensor, words: Tensor, image_index: Tensor, masks: Tensor
    ) -> Rehearsal:
        """With the maps of the last three stages and the attention of every block."""
        products = self.encode_text(ids, words)
        maps, attention = self._attend(pixels[image_index], words, products)
        logits = self.decode(maps, _relevances(maps, attention))
        return Rehearsal(logits, tuple(maps[1:]), tuple(a for stage in attention for a in stage))

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of the last three stages."""
        return self.config.widths[1:]

    @torch.no_grad()
    def selection_margin(self, inputs: Mapping[str, npt.NDArray[Any]]) -> float:
        """How far the choice of regions is from a tie, over a batch of host inputs.

        The gap between the last chosen and the first left out, as a share of the spread of all;
        0 is a tie, whose outcome rounding decides.
        """
        pixels, ids, words = (torch.from_numpy(inputs[n]) for n in ("pixels", "ids", "words"))
        _, relevances = self.features(pixels, words, self.encode_text(ids, words))
        scores = self.inter_trans.uncertainty(relevances).sort(1, descending=True).values
        count = self.config.regions
        if self.config.score != "paper" or count == scores.shape[1]:
            return 1.0
        gap = scores[:, count - 1] - scores[:, count]
        return float((gap / (scores[:, 0] - scores[:, -1]).clamp_min(1e-30)).min())

    def cross_attention(self) -> tuple[AttentionShape, ...]:
        """One head as wide as the map, in every block."""
        c = self.config
        return tuple(
            AttentionShape(f"stage {i}", depth, (c.size >> i + 1) ** 2, c.words, 1, width)
            for i, (depth, width) in enumerate(zip(c.depths, c.widths, strict=True), start=1)
        )

    def parts(self) -> tuple[Part, ...]:
        """The two graphs: ``text`` once per expression, ``mask`` for every picture."""
        c = self.config
        ids, words, pixels, _, logits = self.host_ports(BATCH)
        products = tuple(
            port
            for i, (depth, width) in enumerate(zip(c.depths, c.widths, strict=True), start=1)
            for port in (
                Port(f"keys_{i}", "float32", (BATCH, depth, c.words, width)),
                Port(f"values_{i}", "float32", (BATCH, depth, width, c.words)),
            )
        )
        return (
            Part("text", Method(self, self.encode_text), (ids, words), products),
            Part("mask", Method(self, self._mask), (pixels, words, *products), (logits,)),
        )
