"""Pixels attend to words: the text branch of SLViT, whose attention LAVT introduced.

Yang et al., "LAVT: language-aware vision transformer", CVPR 2022; Ouyang et al., IJCAI 2023. One
head as wide as the map, few keys, instance normalisation over the pixels on both sides, so that
only what differs between pixels passes. Everything that depends on the expression alone (keys and
values) is made by ``project_text``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .mscan import MapConv1d, MapLinear, TokenConv1d
from .text import MASKED


class VisionLanguageAttention(nn.Module):
    """Pixels attend to words, one head as wide as the map, instance-normalised on both sides.

    names: of the projections to query, key and value in the public layout.
    """

    names: ClassVar[tuple[str, str, str]] = ("project_q", "project_k", "project_v")

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        query, key, value = self.names
        self.add_module(query, nn.Sequential(MapConv1d(width, width), nn.Identity()))
        self.add_module(key, nn.Sequential(TokenConv1d(text_width, width)))
        self.add_module(value, nn.Sequential(TokenConv1d(text_width, width)))
        self.W = nn.Sequential(MapConv1d(width, width), nn.Identity())
        self.norm = nn.InstanceNorm2d(width)
        self.scale = width**-0.5

    def project_text(self, text: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Word vectors [B, T, E] to scaled keys and to values, both [B, T, C], zero at padding."""
        _, key, value = self.names
        valid = words[:, :, None].to(text.dtype)
        keys = getattr(self, key)(text) * (valid * self.scale)
        return keys, getattr(self, value)(text) * valid

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The attended map [B, C, H, W] and the attention weights [B, T, H * W]."""
        height, width = x.shape[2:]
        query = self.norm(getattr(self, self.names[0])(x))
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
