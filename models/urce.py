"""Uncertain-region cross-scale enhancement, the neck of SLViT (Ouyang et al., IJCAI 2023).

The public code scores regions by a map that is constant up to rounding, so that what it enhances
is chance; here the score is the caller's relevance, or a fixed choice.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mscan import MapLinear


class RegionAttention(nn.Module):
    """Self-attention inside each region: 8 heads, no scaling, no norm, as published."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv_linear = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, K, L, C] to the same."""
        regions, length, width = tokens.shape[1:]
        qkv = self.qkv_linear(tokens)
        qkv = qkv.reshape(-1, regions, length, 3 * self.heads, width // self.heads)
        q, k, v = qkv.transpose(2, 3).chunk(3, dim=2)
        out = (torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v).transpose(2, 3)
        mixed: Tensor = self.proj(out.reshape(-1, regions, length, width))
        return mixed


class GroupAttention(nn.Module):
    """The residual around the region attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.ones(width))
        self.Attention = RegionAttention(width, heads)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = tokens + self.layer_scale * self.Attention(tokens)
        return out


class CrossScaleEnhancement(nn.Module):
    """Uncertain-region cross-scale enhancement (URCE).

    The image is a grid of regions, each seen at four scales (64 + 16 + 4 + 1 tokens). The regions
    whose relevance the scales disagree on most exchange information across scales; the others are
    doubled, so that both kinds carry the sum of two terms. Regions are taken out and put back by
    products with one-hot rows, exact in any precision and plain matrix products everywhere.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        grid: int,
        width: int,
        heads: int,
        regions: int,
        score: str,
    ) -> None:
        super().__init__()
        self.fc_module = nn.ModuleList(MapLinear(c, width) for c in widths)
        self.fc_rever_module = nn.ModuleList(MapLinear(width, c) for c in widths)
        self.group_attention = nn.ModuleList([GroupAttention(width, heads)])
        self.grid, self.width, self.regions, self.score = grid, width, regions, score

    def forward(self, maps: list[Tensor], relevances: list[Tensor]) -> list[Tensor]:
        """Maps in, enhanced maps of the same shapes out."""
        scales = [
            self._to_regions(fc(x), 2 ** (3 - i))
            for i, (x, fc) in enumerate(zip(maps, self.fc_module, strict=True))
        ]
        lengths = [64, 16, 4, 1]
        if self.score == "all":
            tokens = self._tokens(scales, lengths)
            scales = [p.flatten(2) for p in torch.split(self._enhance(tokens), lengths, dim=2)]
        else:
            chosen = self.choose(relevances)
            picked = [chosen @ scale for scale in scales]
            enhanced = torch.split(self._enhance(self._tokens(picked, lengths)), lengths, dim=2)
            rest = 2.0 - 2.0 * chosen.sum(1).unsqueeze(-1)
            put_back = chosen.transpose(1, 2)
            scales = [
                rest * scale + put_back @ part.flatten(2)
                for scale, part in zip(scales, enhanced, strict=True)
            ]
        return [
            fc(self._to_map(scale, 2 ** (3 - i)))
            for i, (scale, fc) in enumerate(zip(scales, self.fc_rever_module, strict=True))
        ]

    def choose(self, relevances: list[Tensor]) -> Tensor:
        """[B, K, grid^2] one-hot float rows: the chosen regions, most uncertain first."""
        count = self.regions
        numbers = torch.arange(self.grid**2, device=relevances[0].device)
        if self.score == "official":
            first = (numbers[None, None] == numbers[None, :count, None]).to(relevances[0].dtype)
            return first.expand(relevances[0].shape[0], -1, -1)
        top = torch.topk(self.uncertainty(relevances), count, dim=1).indices
        return (top[:, :, None] == numbers).to(relevances[0].dtype)

    def uncertainty(self, relevances: list[Tensor]) -> Tensor:
        """[B, grid^2]: how much the relevance of a region changes from scale to scale."""
        same = [
            F.interpolate(s, scale_factor=1 / 2 ** (3 - i), mode="bilinear", align_corners=True)
            for i, s in enumerate(relevances[:3])
        ] + [relevances[3]]
        steps = [(a - b).abs() for a, b in pairwise(same)]
        return (steps[0] + steps[1] + steps[2]).flatten(1)

    def _tokens(self, scales: list[Tensor], lengths: list[int]) -> Tensor:
        width = self.width
        return torch.cat(
            [s.reshape(-1, s.shape[1], n, width) for s, n in zip(scales, lengths, strict=True)],
            dim=2,
        )

    def _enhance(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.group_attention[0](tokens)
        return out

    def _to_regions(self, x: Tensor, window: int) -> Tensor:
        """[B, C, grid * w, grid * w] to [B, grid^2, w^2 * C], row-major in grid and window."""
        grid = self.grid
        rows = x.permute(0, 2, 3, 1).reshape(-1, grid, window, grid, window * x.shape[1])
        return rows.transpose(2, 3).reshape(-1, grid**2, window**2 * x.shape[1])

    def _to_map(self, regions: Tensor, window: int) -> Tensor:
        grid, width = self.grid, self.width
        rows = regions.reshape(-1, grid, grid, window, window * width).transpose(2, 3)
        return rows.reshape(-1, grid * window, grid * window, width).permute(0, 3, 1, 2)
