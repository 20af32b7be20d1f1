"""The cross-modal half of CRIS: neck, decoder, and a projector whose kernel is the sentence.

Wang et al., "CRIS: CLIP-driven referring image segmentation", CVPR 2022. Everything that depends on
one side alone has a method of its own: ``look`` (the picture), ``gate``, ``keys_values`` and
``kernel`` (the expression), so that a part of a model can make it once. Names follow the public
code; attention has separate projections.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .text import MASKED

TAPS = 9  # of a 3x3 kernel
CENTRE = 4


def conv_layer(width_in: int, width: int, kernel: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(width_in, width, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def linear_layer(width_in: int, width: int) -> nn.Sequential:
    """The same for vectors [B, C]."""
    return nn.Sequential(nn.Linear(width_in, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())


class CoordConv(nn.Module):
    """A 3x3 convolution that also sees where it is: x and y from -1 to 1 (Liu et al., 2018).

    The two coordinates have a convolution of their own, whose result is one constant map: cheaper
    than two more channels, and no quantizer rounds a position.
    """

    def __init__(self, width_in: int, width: int, grid: int) -> None:
        super().__init__()
        self.conv1 = conv_layer(width_in + 2, width, 3)
        line = torch.linspace(-1.0, 1.0, grid)
        places = torch.stack((line[None].expand(grid, -1), line[:, None].expand(-1, grid)))
        self.register_buffer("places", places[None].contiguous(), persistent=False)

    places: Tensor

    def forward(self, x: Tensor) -> Tensor:
        weight, seen = self.conv1.get_parameter("0.weight"), x.shape[1]
        y = F.conv2d(x, weight[:, :seen], padding=1)
        y = y + F.conv2d(self.places, weight[:, seen:], padding=1)
        moved: Tensor = self.conv1[1:](y)
        return moved


class Neck(nn.Module):
    """One map times the gated sentence, then two 3x3 convolutions with coordinates."""

    def __init__(self, widths: tuple[int, ...], state: int, width: int, grid: int) -> None:
        super().__init__()
        self.txt_proj = linear_layer(state, width)
        self.f1_v_proj = conv_layer(widths[-1], width, 1)
        self.norm_layer = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        self.coordconv = nn.Sequential(CoordConv(width, width, grid), conv_layer(width, width, 3))

    def gate(self, state: Tensor) -> Tensor:
        """The sentence [B, E] to a factor for every channel [B, C]."""
        factor: Tensor = self.txt_proj(state)
        return factor

    def look(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """All that depends on the picture alone."""
        return (self.f1_v_proj(maps[-1]),)

    def forward(self, seen: tuple[Tensor, ...], gate: Tensor) -> Tensor:
        """What ``look`` gave, one row for every expression, to a map [B, C, g, g]."""
        fused: Tensor = self.coordconv(self.norm_layer(seen[0] * gate[:, :, None, None]))
        return fused


class PyramidNeck(nn.Module):
    """Three maps of strides 8, 16 and 32, the coarsest gated, to one of stride 16.

    widths: of the three maps. width: C of the result; inside, the maps have C/2, C and 2C.
    """

    def __init__(self, widths: tuple[int, ...], state: int, width: int, grid: int) -> None:
        super().__init__()
        fine, coarse = width // 2, 2 * width
        self.txt_proj = linear_layer(state, coarse)
        self.f1_v_proj = conv_layer(widths[2], coarse, 1)
        self.norm_layer = nn.Sequential(nn.BatchNorm2d(coarse), nn.ReLU())
        self.f2_v_proj = conv_layer(widths[1], width, 3)
        self.f2_cat = conv_layer(coarse + width, width, 1)
        self.f3_v_proj = conv_layer(widths[0], fine, 3)
        self.f3_cat = conv_layer(fine + width, width, 1)
        self.f4_proj5 = conv_layer(coarse, width, 3)
        self.f4_proj4 = conv_layer(width, width, 3)
        self.f4_proj3 = conv_layer(width, width, 3)
        self.aggr = conv_layer(3 * width, width, 1)
        self.coordconv = nn.Sequential(CoordConv(width, width, grid), conv_layer(width, width, 3))

    def gate(self, state: Tensor) -> Tensor:
        """The sentence [B, E] to a factor for every channel [B, 2C]."""
        factor: Tensor = self.txt_proj(state)
        return factor

    def look(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """All that depends on the picture alone: C/2 and C channels at g, 2C at g/2."""
        fine = F.avg_pool2d(self.f3_v_proj(maps[0]), 2)
        return fine, self.f2_v_proj(maps[1]), self.f1_v_proj(maps[2])

    def forward(self, seen: tuple[Tensor, ...], gate: Tensor) -> Tensor:
        """What ``look`` gave, one row for every expression, to a map [B, C, g, g]."""
        fine, middle, coarse = seen
        f5 = self.norm_layer(coarse * gate[:, :, None, None])
        f4 = self.f2_cat(torch.cat((middle, _twice(f5)), dim=1))
        f3 = self.f3_cat(torch.cat((fine, f4), dim=1))
        maps = (self.f4_proj3(f3), self.f4_proj4(f4), _twice(self.f4_proj5(f5)))
        fused: Tensor = self.coordconv(self.aggr(torch.cat(maps, dim=1)))
        return fused


def _upsample(factor: int) -> nn.Module:
    return nn.Identity() if factor == 1 else nn.Upsample(scale_factor=factor, mode="bilinear")


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Attention(nn.Module):
    """Multi-head attention whose keys and values may be made elsewhere.

    keys: [B, H, D, T], scaled. values: [B, H, T, D].
    """

    def __init__(self, width: int, source: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(source, width)
        self.v_proj = nn.Linear(source, width)
        self.out_proj = nn.Linear(width, width)
        self.heads, self.depth, self.dropout = heads, width // heads, dropout

    def keys_values(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """From what keys and values are made of, both [B, T, source]."""
        made = self._split(self.k_proj(keys)).permute(0, 2, 3, 1) * self.depth**-0.5
        return made, self._split(self.v_proj(values)).transpose(1, 2)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, words: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, N, C] to the same and the weights [B, H, N, T]; words [B, T] bool."""
        scores = self._split(self.q_proj(x)).transpose(1, 2) @ keys
        if words is not None:
            scores = torch.where(words[:, None, None], scores, MASKED)
        weights = torch.softmax(scores, dim=-1)
        mixed = F.dropout(weights, self.dropout, self.training) @ values
        joined = mixed.transpose(1, 2).reshape(-1, x.shape[1], x.shape[2])
        return self.out_proj(joined), weights

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[1], self.heads, self.depth)


class DecoderLayer(nn.Module):
    """Self-attention, attention to the words, feed-forward; normalised before and after."""

    def __init__(self, width: int, text: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.self_attn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = Attention(width, width, heads, dropout)
        self.norm2, self.cross_attn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.multihead_attn = Attention(width, text, heads, dropout)
        self.norm3 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, width),
        )
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, places: Tensor, keys: Tensor, values: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = self.norm1(x)
        placed = y + places
        y, _ = self.self_attn(placed, *self.self_attn.keys_values(placed, y))
        x = x + self.drop(self.self_attn_norm(y))
        y, weights = self.multihead_attn(self.norm2(x) + places, keys, values, words)
        x = x + self.drop(self.cross_attn_norm(y))
        return x + self.drop(self.ffn(self.norm3(x))), weights


class Decoder(nn.Module):
    """Places of a map attend to each other and to the words, layer by layer.

    width, text: channels of the map and of the words. grid, words: places per side, words.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        text: int,
        heads: int,
        hidden: int,
        grid: int,
        words: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(width, text, heads, hidden, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        line = sinusoids(width // 2, grid)
        rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
        places = torch.cat((columns, rows), dim=2).reshape(grid**2, width)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("order", sinusoids(text, words), persistent=False)

    places: Tensor
    order: Tensor

    def keys_values(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Word vectors [B, T, E] to keys [B, L, H, D, T] and values [B, L, H, T, D].

        Both are zero at padding.
        """
        placed = features + self.order
        valid = words[:, None, None].to(features.dtype)
        layers = (layer for layer in self.layers if isinstance(layer, DecoderLayer))
        pairs = [layer.multihead_attn.keys_values(placed, features) for layer in layers]
        keys = torch.stack([keys * valid for keys, _ in pairs], dim=1)
        return keys, torch.stack([values * valid.transpose(2, 3) for _, values in pairs], dim=1)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, words: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """A map [B, C, g, g] to the same and each layer's weights [B, H, N, T]."""
        width, side = x.shape[1], x.shape[2]
        tokens = x.flatten(2).transpose(1, 2)
        attention = []
        for i, layer in enumerate(self.layers):
            tokens, weights = layer(tokens, self.places, keys[:, i], values[:, i], words)
            attention.append(weights)
        return self.norm(tokens).transpose(1, 2).reshape(-1, width, side, side), attention


def sinusoids(width: int, length: int) -> Tensor:
    """[length, width]: sine and cosine in turns, with wavelengths up to 10000."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)


class DynamicConv(nn.Module):
    """A 3x3 convolution with a kernel of its own for each row, to one channel; zeros outside.

    First what each tap says of each pixel, one matrix product; then a fixed convolution brings the
    nine answers to where they count. Exact, and plain operators at any batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moves", torch.eye(TAPS).reshape(1, TAPS, 3, 3), persistent=False)

    moves: Tensor

    def forward(self, x: Tensor, kernel: Tensor, offset: Tensor) -> Tensor:
        """x [B, C, H, W], kernel [B, 9, C], offset [B, 9, 1] to [B, 1, H, W]."""
        height, width = x.shape[2:]
        answers = (kernel @ x.flatten(2) + offset).reshape(-1, TAPS, height, width)
        return F.conv2d(answers, self.moves, padding=1)


class Projector(nn.Module):
    """The decoder's map, enlarged twice, convolved with a kernel that the sentence makes.

    The 1x1 convolution before it is linear, so it is applied to the kernel, once per expression.
    """

    def __init__(self, width: int, state: int, enlarge: tuple[int, int]) -> None:
        super().__init__()
        narrow = width // 2
        self.vis = nn.Sequential(
            _upsample(enlarge[0]),
            conv_layer(width, width, 3),
            _upsample(enlarge[1]),
            conv_layer(width, narrow, 3),
            nn.Conv2d(narrow, narrow, 1),
        )
        self.txt = nn.Linear(state, narrow * TAPS + 1)
        self.dynamic = DynamicConv()

    def kernel(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The sentence [B, E] to the kernel [B, 9, C] and what each tap adds, [B, 9, 1]."""
        weight, bias = (self.vis.get_parameter(f"4.{n}") for n in ("weight", "bias"))
        made = self.txt(state)
        taps = made[:, :-1].reshape(-1, len(bias), TAPS).transpose(1, 2)
        centre = F.pad(made[:, -1:], (CENTRE, TAPS - 1 - CENTRE))[:, :, None]
        return taps @ weight[:, :, 0, 0], taps @ bias[:, None] + centre

    def forward(self, x: Tensor, kernel: Tensor, offset: Tensor) -> Tensor:
        """A map [B, C, g, g] to logits [B, 1, e * g, e * g]."""
        logits: Tensor = self.dynamic(self.vis[:4](x), kernel, offset)
        return logits

    @torch.no_grad()
    def rescale(self, shift: float, scale: float) -> None:
        """Logits become ``scale * (logits - shift)``."""
        self.txt.bias[-1] -= shift
        self.txt.weight.mul_(scale)
        self.txt.bias.mul_(scale)
