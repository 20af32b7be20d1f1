"""LTS's first half: where in the fused map is it? Scores whose sigmoid is the position prior.

``Filtering``: the sentence makes a convolution kernel. ``CrossAttention``: pixels look at each
other and at the words. What depends on the expression alone is ``project_text``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .darknet import SLOPE
from .lts_neck import Share, Tensors
from .text import MASKED
from .transformer import FeedForward, SelfAttention, join_heads, sine_grid, split_heads

Located = tuple[Tensor, Tensor, Tensors]  # scores [B, 1, h, w], map [B, C, h, w], attention


class Filtering(nn.Module):
    """Scores are the fused map convolved with a kernel of 1x1 or 3x3 made from the sentence.

    count: how often; before another round, the prior so far is convolved into the map.
    """

    def __init__(self, text: int, width: int, side: int, kernel: int, count: int) -> None:
        super().__init__()
        self.width, self.side, self.kernel = width, side, kernel
        self.kernels = nn.ModuleList(nn.Linear(text, kernel**2 * width + 1) for _ in range(count))
        self.mix = nn.ModuleList(Share(width, width, 3) for _ in range(count - 1))
        self.evidence = nn.ModuleList(Evidence(width) for _ in range(count - 1))
        taps = torch.eye(kernel**2).reshape(1, kernel**2, kernel, kernel)
        self.register_buffer("taps", taps, persistent=False)

    taps: Tensor

    def shapes(self, words: int) -> dict[str, tuple[int, ...]]:
        """Text products by name: their shapes without the batch."""
        count = len(self.kernels)
        return {"kernels": (count, self.kernel**2, self.width), "biases": (count, 1, 1)}

    def project_text(self, states: Tensor, sentence: Tensor) -> Tensors:
        """Sentence [B, E] to kernels [B, count, k * k, C] and biases [B, count, 1, 1]."""
        made = torch.stack([layer(sentence) for layer in self.kernels], dim=1)
        kernels = made[:, :, :-1].reshape(-1, len(self.kernels), self.kernel**2, self.width)
        return kernels, made[:, :, -1:, None]

    def forward(self, fused: Tensor, words: Tensor | None, products: Tensors) -> Located:
        kernels, biases = products
        scores = self._filter(fused, kernels[:, 0], biases[:, :1])
        for i, (mix, evidence) in enumerate(zip(self.mix, self.evidence, strict=True), start=1):
            fused = F.leaky_relu(mix(fused) + evidence(torch.sigmoid(scores)), SLOPE)
            scores = self._filter(fused, kernels[:, i], biases[:, i : i + 1])
        return scores, fused, ()

    def _filter(self, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """One product for all taps, each then moved to its place: a kernel for every row."""
        found = (kernel @ x.flatten(2)).reshape(-1, self.kernel**2, self.side, self.side)
        if self.kernel > 1:
            found = F.conv2d(found, self.taps, padding=self.kernel // 2)
        return found + bias


class Evidence(nn.Conv2d):
    """The prior's share of a 3x3 convolution of map and prior."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width, 3, padding=1, bias=False)


class CrossAttention(nn.Module):
    """Scores from post-norm layers: pixels among themselves, pixels to words, feed-forward."""

    def __init__(
        self, text: int, channels: int, side: int, width: int, heads: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.side, self.heads = side, heads
        self.enter = nn.Linear(channels, width)
        self.layers = nn.ModuleList(LocatorLayer(text, width, heads, hidden) for _ in range(layers))
        self.score = nn.Linear(width, 1)
        self.register_buffer("positions", sine_grid(side, width), persistent=False)

    positions: Tensor

    def shapes(self, words: int) -> dict[str, tuple[int, ...]]:
        """Text products by name: their shapes without the batch."""
        heads, depth = self.heads, self.score.in_features // self.heads
        return {
            name: shape
            for i in range(1, len(self.layers) + 1)
            for name, shape in (
                (f"keys_{i}", (heads, depth, words)),
                (f"values_{i}", (heads, words, depth)),
            )
        }

    def project_text(self, states: Tensor, sentence: Tensor) -> Tensors:
        """States [B, T, E] to keys [B, heads, d, T] and values [B, heads, T, d] of each layer."""
        across = [m for m in self.modules() if isinstance(m, WordsToPixels)]
        return tuple(x for module in across for x in module.project_text(states))

    def forward(self, fused: Tensor, words: Tensor | None, products: Tensors) -> Located:
        x = self.enter(fused.flatten(2).transpose(1, 2)) + self.positions
        attention = []
        for i, layer in enumerate(self.layers):
            x, weights = layer(x, *products[2 * i : 2 * i + 2], words)
            attention.append(weights.mean(1).transpose(1, 2))
        scores = self.score(x).reshape(-1, 1, self.side, self.side)
        return scores, fused, tuple(attention)


class LocatorLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each followed by a norm."""

    def __init__(self, text: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.among = SelfAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.across = WordsToPixels(text, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed = FeedForward(width, hidden)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, words: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = self.norm1(x + self.among(x))
        told, weights = self.across(x, keys, values, words)
        x = self.norm2(x + told)
        return self.norm3(x + self.feed(x)), weights


class WordsToPixels(nn.Module):
    """Multi-head attention of pixels [B, N, D] to words; weights [B, heads, N, T] come along."""

    def __init__(self, text: int, width: int, heads: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(text, width)
        self.v = nn.Linear(text, width)
        self.out = nn.Linear(width, width)
        self.heads = heads

    def project_text(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, T, E] to scaled keys [B, heads, d, T] and values [B, heads, T, d]."""
        keys, values = (split_heads(layer(states), self.heads) for layer in (self.k, self.v))
        return keys.transpose(2, 3) * keys.shape[3] ** -0.5, values

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, words: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scores = split_heads(self.q(x), self.heads) @ keys
        if words is not None:
            scores = torch.where(words[:, None, None, :], scores, MASKED)
        weights = torch.softmax(scores, dim=-1)
        return self.out(join_heads(weights @ values)), weights
