"""Post-norm transformer layers over rows of tokens, and sinusoidal positions.

Vaswani et al., "Attention is all you need", NeurIPS 2017; positions of maps as in Carion et al.,
ECCV 2020: half of the channels for the row, half for the column.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .text import MASKED


class SelfAttention(nn.Module):
    """Heads of scaled products; x [B, N, D], words [B, N] bool or None where nothing is padded."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{width} channels cannot be split over {heads} heads")
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor, words: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x).chunk(3, dim=-1))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if words is not None:
            scores = torch.where(words[:, None, None, :], scores, MASKED)
        mixed: Tensor = self.out(join_heads(torch.softmax(scores, dim=-1) @ v))
        return mixed


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.up(x)))
        return out


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward block, each followed by a norm; [B, N, D] to the same."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.feed = FeedForward(width, hidden)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, words: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.attention(x, words))
        out: Tensor = self.norm2(x + self.feed(x))
        return out


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, D] to [B, heads, N, D / heads]."""
    return x.reshape(-1, x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """The way back: [B, heads, N, d] to [B, N, heads * d]."""
    return x.transpose(1, 2).reshape(-1, x.shape[2], x.shape[1] * x.shape[3])


def sine_row(length: int, width: int) -> Tensor:
    """Positions of a row of tokens: [1, length, width] float32, sines beside cosines."""
    rates = 1e4 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)[None].float()


def sine_grid(side: int, width: int) -> Tensor:
    """Positions of a square map in row-major order: [1, side^2, width] float32."""
    row = sine_row(side, width // 2)[0]
    down = row[:, None].expand(side, side, -1)
    return torch.cat((down, down.transpose(0, 1)), dim=2).reshape(1, side**2, width)
