"""Atrous spatial pyramid pooling (Chen et al., arXiv 1706.05587) and LTS's light mask head."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .darknet import SLOPE, ConvNorm
from .locators import Evidence
from .lts_neck import Share, VectorNorm


class ASPP(nn.Module):
    """A 1x1 convolution, a 3x3 one per rate, and the mean of the map; all projected to ``width``.

    The mean is projected by itself and added to every pixel: the same as putting it beside the
    others, without making it as large as they are.
    """

    def __init__(self, channels: int, width: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [ConvNorm(channels, width, 1), *(ConvNorm(channels, width, 3, rate=r) for r in rates)]
        )
        self.pooled = VectorNorm(channels, width)
        self.project = Share(width * (1 + len(rates)), width, 1)
        self.project_pooled = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        beside = self.project(torch.cat([branch(x) for branch in self.branches], dim=1))
        pooled = self.project_pooled(self.pooled(x.mean((2, 3))))
        return F.leaky_relu(beside + pooled, SLOPE)


class Doubling(nn.Module):
    """Transposed 4x4 convolution of stride 2, batch norm, leaky ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels_in, channels_out, 4, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.bn(self.conv(x)), SLOPE)


class MaskHead(nn.Module):
    """Fused map [B, C, h, w] and prior [B, 1, h, w] to logits [B, 1, s * h, s * w].

    doublings: channels after each transposed convolution.
    """

    def __init__(
        self, channels: int, width: int, rates: tuple[int, ...], doublings: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.mix = Share(channels, channels, 3)
        self.evidence = Evidence(channels)
        self.aspp = ASPP(channels, width, rates)
        before = (width, *doublings)
        self.grow = nn.Sequential(*(Doubling(a, b) for a, b in pairwise(before)))
        self.smooth = ConvNorm(before[-1], before[-1], 3)
        self.logit = nn.Conv2d(before[-1], 1, 1)

    def forward(self, fused: Tensor, prior: Tensor) -> Tensor:
        z = F.leaky_relu(self.mix(fused) + self.evidence(prior), SLOPE)
        out: Tensor = self.logit(self.smooth(self.grow(self.aspp(z))))
        return out
