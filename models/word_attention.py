"""Pixels attend to words: the text branch of SLViT, whose attention LAVT introduced.

Yang et al., "LAVT: language-aware vision transformer", CVPR 2022; Ouyang et al., IJCAI 2023. One
head as wide as the map, few keys, instance normalisation over the pixels on both sides, so that
only what differs between pixels passes. Everything that depends on the expression alone (keys and
values) is made by ``project_text``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mscan import pointwise, tokenwise
from .text import MASKED


class VisionLanguageAttention(nn.Module):
    """Pixels attend to words, one head as wide as the map, instance-normalised on both sides."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.project_q = nn.Sequential(nn.Conv1d(width, width, 1), nn.Identity())
        self.project_k = nn.Sequential(nn.Conv1d(text_width, width, 1))
        self.project_v = nn.Sequential(nn.Conv1d(text_width, width, 1))
        self.W = nn.Sequential(nn.Conv1d(width, width, 1), nn.Identity())
        self.norm = nn.InstanceNorm2d(width)
        self.scale = width**-0.5

    def project_text(self, text: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Word vectors [B, T, E] to scaled keys and to values, both [B, T, C], zero at padding."""
        valid = words[:, :, None].to(text.dtype)
        keys = tokenwise(text, self.project_k[0]) * (valid * self.scale)
        return keys, tokenwise(text, self.project_v[0]) * valid

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The attended map [B, C, H, W] and the attention weights [B, T, H * W]."""
        height, width = x.shape[2:]
        query = self.norm(pointwise(x, self.project_q[0]))
        scores = keys @ query.flatten(2)
        weights = torch.softmax(torch.where(words[:, :, None], scores, MASKED), dim=1)
        attended = (values @ weights).reshape(-1, x.shape[1], height, width)
        return self.norm(pointwise(attended, self.W[0])), weights


class GatedCross(nn.Module):
    """The text branch of a block: attention to words, then a tanh gate on itself."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.vis_lang_att = VisionLanguageAttention(width, text_width)
        self.res_gate = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.Tanh(),
        )

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        attended, weights = self.vis_lang_att(x, keys, values, words)
        hidden = F.relu(pointwise(attended, self.res_gate[0]))
        gate = torch.tanh(pointwise(hidden, self.res_gate[2]))
        return gate * attended, weights
