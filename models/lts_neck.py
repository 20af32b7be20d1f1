"""LTS's fusion neck: three maps and a sentence become one map that knows its coordinates.

The sentence gates the coarsest map, then the finer maps join (Ding et al., ICCV 2021, whose public
code this follows; LTS itself has none). A convolution of maps put together is written as a sum of
convolutions: a map is projected before it is doubled, what depends on the picture alone is
projected once per picture, and every norm folds into its convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .darknet import SLOPE, ConvNorm
from .pictures import pick

Tensors = tuple[Tensor, ...]


class Share(ConvNorm):
    """One map's share of a convolution of several: convolution and norm, not activated."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


class VectorNorm(nn.Module):
    """Linear, batch norm, leaky ReLU: vectors [B, E] to maps [B, C, 1, 1]."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels_in, channels_out, bias=False)
        self.bn = nn.BatchNorm1d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.bn(self.linear(x)), SLOPE)[:, :, None, None]


class Neck(nn.Module):
    """Maps at strides 8, 16 and 32 and a gate to one map at stride 8 or 16.

    widths: channels of the three maps, finest first.
    top:    channels of the gated map, and so of the gate.
    width:  channels of everything after it.
    side:   of the fused map; codes: 8 or 2 coordinates.
    """

    def __init__(
        self, widths: tuple[int, ...], top: int, width: int, stride: int, side: int, codes: int
    ) -> None:
        super().__init__()
        self.doubling = 16 // stride
        self.top = ConvNorm(widths[2], top, 1)
        self.middle = nn.Sequential(ConvNorm(widths[1], width, 3), Share(width, width, 1))
        pool = nn.AvgPool2d(2) if stride == 16 else nn.Identity()
        half = width // 2
        self.low = nn.Sequential(ConvNorm(widths[0], half, 3), pool, Share(half, width, 1))
        self.norm = nn.BatchNorm2d(top)
        self.top_to_middle = Share(top, width, 1)
        self.middle_to_low = Share(width, width, 1)
        self.from_top = nn.Sequential(ConvNorm(top, width, 3), Share(width, width, 1))
        self.from_middle = nn.Sequential(ConvNorm(width, width, 3), Share(width, width, 1))
        self.from_low = nn.Sequential(ConvNorm(width, width, 3), Share(width, width, 1))
        self.out = Share(width, width, 3)
        self.place = nn.Conv2d(codes, width, 3, padding=1, bias=False)
        self.register_buffer("code", coordinates(side, codes), persistent=False)

    code: Tensor

    def laterals(self, maps: Tensors) -> Tensors:
        """Maps, finest first, to what the picture alone makes of them, coarsest first."""
        low, middle, top = maps
        return self.top(top), self.middle(middle), self.low(low)

    def forward(self, laterals: Tensors, gate: Tensor, image_index: Tensor | None) -> Tensor:
        """Laterals of pictures and gate [B, top, 1, 1] to the fused map [B, width, side, side]."""
        top, middle, low = laterals
        top = F.relu(self.norm(pick(top, image_index) * gate))
        middle = pick(middle, image_index) + enlarge(self.top_to_middle(top), 2)
        middle = F.leaky_relu(middle, SLOPE)
        low = pick(low, image_index) + enlarge(self.middle_to_low(middle), self.doubling)
        low = F.leaky_relu(low, SLOPE)
        coarse = self.from_middle(middle) + enlarge(self.from_top(top), 2)
        fused = F.leaky_relu(self.from_low(low) + enlarge(coarse, self.doubling), SLOPE)
        return F.leaky_relu(self.out(fused) + self.place(self.code), SLOPE)


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Every pixel repeated, factor times each way."""
    return x if factor == 1 else F.interpolate(x, scale_factor=float(factor), mode="nearest")


def coordinates(side: int, codes: int) -> Tensor:
    """[1, codes, side, side] float32 in -1 to 1: where each cell of a map is.

    Two: x and y of the centre. Eight: left, top, right, bottom, centre x, centre y, and twice
    1 / side (Liu et al., ICCV 2017).
    """
    edges = torch.arange(side + 1) * (2.0 / side) - 1.0
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    left, top, right, bottom = edges[x], edges[y], edges[x + 1], edges[y + 1]
    centre = ((left + right) / 2, (top + bottom) / 2)
    share = torch.full((side, side), 1.0 / side)
    every = centre if codes == 2 else (left, top, right, bottom, *centre, share, share)
    return torch.stack(every)[None]
