"""Pixels attend to words: the text branch of SLViT, whose attention LAVT introduced.

Yang et al., "LAVT: language-aware vision transformer", CVPR 2022; Ouyang et al., IJCAI 2023. One
head as wide as the map, few keys, instance normalisation over the pixels on both sides, so that
only what differs between pixels passes. Everything that depends on the expression alone (keys and
values) is made by ``project_text``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .mscan import MapConv1d, MapLinear, TokenConv1d
from .text import MASKED


class VisionLanguageAttention(nn.Module):
    """Pixels attend to words, one head as wide as the map, instance-normalised on both sides."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.project_q = nn.Sequential(MapConv1d(width, width), nn.Identity())
        self.project_k = nn.Sequential(TokenConv1d(text_width, width))
        self.project_v = nn.Sequential(TokenConv1d(text_width, width))
        self.W = nn.Sequential(MapConv1d(width, width), nn.Identity())
        self.norm = nn.InstanceNorm2d(width)
        self.scale = width**-0.5

    def project_text(self, text: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Word vectors [B, T, E] to scaled keys and to values, both [B, T, C], zero at padding."""
        valid = words[:, :, None].to(text.dtype)
        keys = self.project_k(text) * (valid * self.scale)
        return keys, self.project_v(text) * valid

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The attended map [B, C, H, W] and the attention weights [B, T, H * W]."""
        height, width = x.shape[2:]
        query = self.norm(self.project_q(x))
        scores = keys @ query.flatten(2)
        weights = torch.softmax(torch.where(words[:, :, None], scores, MASKED), dim=1)
        attended = (values @ weights).reshape(-1, x.shape[1], height, width)
        return self.norm(self.W(attended)), weights


class GatedCross(nn.Module):
    """The text branch of a block: attention to words, then a tanh gate on itself."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.vis_lang_att = VisionLanguageAttention(width, text_width)
        self.res_gate = nn.Sequential(
            MapLinear(width, width, bias=False),
            nn.ReLU(),
            MapLinear(width, width, bias=False),
            nn.Tanh(),
        )

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        attended, weights = self.vis_lang_att(x, keys, values, words)
        return self.res_gate(attended) * attended, weights
