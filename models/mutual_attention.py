"""Mutual attention of words and pixels, and the decoder of M3Att made of it.

Liu et al., "Multi-modal mutual attention and iterative interaction for referring image
segmentation", TIP 2023 (arXiv 2305.15302). One score matrix serves both directions: its softmax
over pixels says what a word sees, its softmax over words says what a pixel is told. The product of
both, one map per word, holds values of either modality.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .pictures import pick
from .text import MASKED
from .transformer import FeedForward, SelfAttention, join_heads, sine_row, split_heads


class MutualAttention(nn.Module):
    """Maps of words from keys and values of both sides; without weights.

    keys, values: of the words, both [B, H, T, d]; words [B, T] bool.
    seen_keys:    of the pixels, [B, H, d, N]; seen_values [B, H, N, d].
    returns:      F_mul [B, T, N], zero at padded words, and the attention over words [B, T, N],
                  the mean over heads.

    With A = keys seen_keys / sqrt(d) the paper's F_va is softmax_N(A) seen_values, its F_la is
    softmax_T(A)^T values, and F_mul = F_va F_la^T / sqrt(H d) summed over the heads. F_la, the only
    tensor of N rows and H d channels, is never made: F_va values^T comes first, T by T per head.
    """

    def forward(
        self, keys: Tensor, values: Tensor, words: Tensor, seen_keys: Tensor, seen_values: Tensor
    ) -> tuple[Tensor, Tensor]:
        heads, length, depth = keys.shape[1:]
        scores = (keys * depth**-0.5) @ seen_keys
        seen = torch.softmax(scores, dim=3) @ seen_values
        told = torch.softmax(torch.where(words[:, None, :, None], scores, MASKED), dim=2)
        pairs = (seen * (heads * depth) ** -0.5) @ values.transpose(2, 3)
        pairs = torch.where(words[:, None, :, None], pairs, 0.0)
        return join_heads(pairs) @ told.reshape(-1, heads * length, told.shape[3]), told.mean(1)


class Interaction(nn.Module):
    """What stands between two mutual attentions: F_mul back to channels, then the language (IMI).

    product [B, T, N], state and language [B, T, D] to the next state and language.
    """

    def __init__(self, width: int, hidden: int, pixels: int) -> None:
        super().__init__()
        self.back = nn.Linear(pixels, width)
        self.norm1 = nn.LayerNorm(width)
        self.feed = FeedForward(width, hidden)
        self.norm2 = nn.LayerNorm(width)
        self.inject = nn.Linear(width, width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, product: Tensor, state: Tensor, language: Tensor) -> tuple[Tensor, Tensor]:
        state = self.norm1(state + self.back(product))
        state = self.norm2(state + self.feed(state))
        return state, self.norm3(language + self.inject(state))


class WordAttention(nn.Module):
    """Words among themselves, residual and norm: [B, T, D] to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, state: Tensor, words: Tensor) -> Tensor:
        out: Tensor = self.norm(state + self.attention(state, words))
        return out


class MutualDecoder(nn.Module):
    """Layers of mutual attention with the language updated in between; the last gives F_mul.

    ``start`` depends on the expression alone, ``project`` on the vision alone.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, layers: int, words: int, pixels: int
    ) -> None:
        super().__init__()
        self.attend = nn.ModuleList(WordAttention(width, heads) for _ in range(layers))
        self.language = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.vision = nn.Linear(width, 2 * layers * width)
        self.mutual = nn.ModuleList(MutualAttention() for _ in range(layers))
        self.between = nn.ModuleList(Interaction(width, hidden, pixels) for _ in range(layers - 1))
        self.register_buffer("positions", sine_row(words, width), persistent=False)
        self.heads = heads

    positions: Tensor

    def start(self, language: Tensor, words: Tensor) -> Tensor:
        """Projected words [B, T, D] to the state of the first layer, [B, T, D]."""
        state: Tensor = self.attend[0](language + self.positions, words)
        return state

    def project(self, vision: Tensor) -> tuple[Tensor, ...]:
        """Pixels [I, N, D] to keys [I, H, d, N] and values [I, H, N, d] of layer 1, 2, ..."""
        pieces = self.vision(vision).chunk(2 * len(self.mutual), dim=2)
        return tuple(
            split_heads(piece, self.heads) if i % 2 else self._keys(piece)
            for i, piece in enumerate(pieces)
        )

    def _keys(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2)
        return rows.reshape(-1, self.heads, rows.shape[1] // self.heads, rows.shape[2])

    def forward(
        self,
        language: Tensor,
        state: Tensor,
        words: Tensor,
        vision: tuple[Tensor, ...],
        image_index: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """F_mul [B, T, N] of the last layer and the attention over words [B, T, N] of every one.

        vision: what ``project`` gave for pictures; image_index [B] names each expression's.
        """
        attention = []
        for i, mutual in enumerate(self.mutual):
            keys, values = self.language[i](state + language).chunk(2, dim=2)
            product, told = mutual(
                split_heads(keys, self.heads),
                split_heads(values, self.heads),
                words,
                pick(vision[2 * i], image_index),
                pick(vision[2 * i + 1], image_index),
            )
            attention.append(told)
            if i < len(self.between):
                state, language = self.between[i](product, state, language)
                state = self.attend[i + 1](state, words)
        return product, attention
