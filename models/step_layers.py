"""Layers of STEP: maps that know where they are, attention to words, heat maps, a ConvGRU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lts_neck import coordinates
from .text import MASKED

EPS = 1e-12


class Atrous(nn.Module):
    """3x3 convolution of rate 3 over a map and its coordinates, batch norm, ReLU.

    The weights of the coordinates are a convolution of their own, whose result is a constant; so
    nothing has to be concatenated, and the coordinates stay exact when the map is quantized. It
    enters behind the batch norm.
    """

    def __init__(self, channels: int, out: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=3, dilation=3, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.place = nn.Conv2d(8, out, 3, padding=3, dilation=3, bias=False)
        self.register_buffer("code", coordinates(side, 8), persistent=False)

    code: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + self.place(self.code))


class Unit(nn.Module):
    """L2 norm over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return x / ((x * x).sum(-1, keepdim=True) + EPS).sqrt()


class WordAttention(nn.Module):
    """Which words each pixel attends to: queries [B, N, K], keys [B, K, T] to [B, N, T]."""

    def forward(self, queries: Tensor, keys: Tensor, words: Tensor) -> Tensor:
        scores = torch.where(words[:, None], queries @ keys, MASKED)
        return scores.softmax(-1)


class Focus(nn.Module):
    """Weights of words [B, 1, T]: the attention [B, N, T] of the pixels of a mask [B, 1, h, w].

    Pixels count by the softmax of their probabilities, which is nearly flat; without a mask, all
    count alike.
    """

    def forward(self, attention: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return attention.mean(1, keepdim=True)
        return mask.flatten(2).softmax(-1) @ attention


class Point(nn.Module):
    """Where an expression lies in the joint space.

    weights [B, 1, T] of its words and their values [B, T, D] to [B, 1, D].
    """

    def __init__(self) -> None:
        super().__init__()
        self.unit = Unit()

    def forward(self, weights: Tensor, values: Tensor) -> Tensor:
        unit: Tensor = self.unit(torch.tanh(weights @ values))
        return unit


class HeatMap(nn.Module):
    """Cosine of pixels [B, N, D] and points [B, 1, D], none below zero: [B, 1, side, side]."""

    def forward(self, pixels: Tensor, point: Tensor, side: int) -> Tensor:
        return F.relu(pixels @ point.transpose(1, 2)).reshape(-1, 1, side, side)


class ConvGRU(nn.Module):
    """A convolutional GRU (Ballas et al., ICLR 2016); x [B, inputs, H, W], h [B, filters, H, W].

    inputs holds the three input kernels, for reset, update and candidate; gates and candidate the
    recurrent ones. Channels that x lacks, and a state of None, are zero.
    """

    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__()
        self.inputs = nn.Conv2d(inputs, 3 * filters, 3, padding=1)
        self.gates = nn.Conv2d(filters, 2 * filters, 3, padding=1, bias=False)
        self.candidate = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.filters = filters

    def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
        weight = self.inputs.weight[:, : x.shape[1]]
        seen = F.conv2d(x, weight, self.inputs.bias, padding=1)
        gates, new = torch.split(seen, [2 * self.filters, self.filters], 1)
        if h is None:
            return torch.sigmoid(-gates[:, self.filters :]) * torch.tanh(new)
        reset, keep = torch.sigmoid(gates + self.gates(h)).chunk(2, 1)
        new = torch.tanh(new + self.candidate(reset * h))
        return new + keep * (h - new)


def resize(x: Tensor, side: int) -> Tensor:
    """Bilinear, [B, C, h, h] to half, the same or double the side."""
    if x.shape[2] == side:
        return x
    if x.shape[2] == 2 * side:
        return F.avg_pool2d(x, 2)  # what bilinear halving is
    return F.interpolate(x, scale_factor=2.0, mode="bilinear")


def rows(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H * W, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
