"""Pixel-word attention, the fusion of LAVT (Yang et al., CVPR 2022), over rows of pixels.

One head as wide as the map, few keys, instance normalisation over the pixels on both sides. The
output projection is applied to the values, which are few, rather than to what pixels collect:
weights sum to one over the words, so both give the same, and the instance normalisation behind it
takes the projection's bias away (its key is kept for the public layout).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mscan import TokenConv1d
from .text import MASKED


def instance_norm(rows: Tensor) -> Tensor:
    """[B, N, C] to [B, C, N], each channel with mean 0 and variance 1 over the N pixels."""
    return F.instance_norm(rows.transpose(1, 2))


class ImageLanguageAttention(nn.Module):
    """Pixels attend to words; module names are the public checkpoints'."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.f_query = nn.Sequential(TokenConv1d(width, width))
        self.f_key = nn.Sequential(TokenConv1d(text_width, width))
        self.f_value = nn.Sequential(TokenConv1d(text_width, width))
        self.W = nn.Sequential(TokenConv1d(width, width))
        self.scale = width**-0.5

    def project_text(self, text: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Word vectors [B, T, E] to scaled keys [B, T, C] and projected values [B, C, T]."""
        valid = words[:, :, None].to(text.dtype)
        keys = self.f_key(text) * (valid * self.scale)
        return keys, self.W(self.f_value(text) * valid).transpose(1, 2)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pixels [B, N, C] to what they found, the same shape, and the weights [B, T, N]."""
        scores = keys @ instance_norm(self.f_query(x))
        weights = torch.softmax(torch.where(words[:, :, None], scores, MASKED), dim=1)
        found = F.instance_norm(values @ weights).transpose(1, 2)
        return found, weights


class PWAM(nn.Module):
    """What a pixel shows, times what it found among the words."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.vis_project = nn.Sequential(TokenConv1d(width, width), nn.GELU())
        self.image_lang_att = ImageLanguageAttention(width, text_width)
        self.project_mm = nn.Sequential(TokenConv1d(width, width), nn.GELU())

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[B, N, C] to the same, and the weights of the words [B, T, N]."""
        found, weights = self.image_lang_att(x, keys, values, words)
        return self.project_mm(self.vis_project(x) * found), weights
