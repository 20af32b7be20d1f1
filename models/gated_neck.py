"""The neck that lets a sentence gate the coarsest map before three maps become one.

Ding et al., "Vision-language transformer and query generation for referring segmentation", ICCV
2021 and TPAMI 2023, whose public code M3Att descends from; the same pattern is in MCN and CRIS.
Without the gate the neck depends on the picture alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .darknet import SLOPE, ConvNorm, Residual
from .text import MASKED


class Sentence(nn.Module):
    """Word vectors to one of the sentence: a gated sum, weighed per channel.

    x [B, T, E] and words [B, T] bool to [B, E].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(width, width)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        scores = torch.where(words[:, :, None], torch.tanh(self.weigh(x)), MASKED)
        return (torch.softmax(scores, dim=1) * x).sum(1)


class GatedNeck(nn.Module):
    """Maps at strides 8, 16 and 32 to one of ``width`` channels at stride 8 or 16.

    ``laterals`` depends on the picture alone, ``gate`` on the expression alone.
    """

    def __init__(
        self, widths: tuple[int, ...], inner: int, width: int, stride: int, sentence: int | None
    ) -> None:
        super().__init__()
        low, middle, top = widths
        self.low = ConvNorm(low, low, 1)
        self.middle = ConvNorm(middle, middle, 1)
        self.top = Residual(top)
        self.norm = nn.BatchNorm2d(top)
        self.join_middle = ConvNorm(top + middle, inner, 1)
        self.join_low = ConvNorm(inner + low, inner, 1)
        self.out = ConvNorm(2 * inner, width, 1)
        self.sentence = self.project = None
        if sentence is not None:
            self.sentence, self.project = Sentence(sentence), ConvNorm(sentence, top, 1)
        self.stride = stride

    def gate(self, tokens: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        """Word vectors [B, T, E] to the gate [B, C, 1, 1]; nothing in a neck without one."""
        if self.sentence is None or self.project is None:
            return ()
        return (self.project(self.sentence(tokens, words)[:, :, None, None]),)

    def laterals(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The three maps projected, coarsest first, the finest at the neck's stride."""
        low, middle, top = maps
        low = F.avg_pool2d(low, 2) if self.stride == 16 else low
        return self.top(top), self.middle(middle), self.low(low)

    def forward(self, laterals: tuple[Tensor, ...], gate: tuple[Tensor, ...]) -> Tensor:
        """Laterals and gate to the fused map [B, width, h, w]."""
        top, middle, low = laterals
        for vector in gate:
            top = top * vector
        top = F.leaky_relu(self.norm(top), SLOPE)
        middle = self.join_middle(torch.cat((_double(top), middle), dim=1))
        if self.stride == 8:
            middle = _double(middle)
        low = self.join_low(torch.cat((middle, low), dim=1))
        fused: Tensor = self.out(torch.cat((low, middle), dim=1))
        return fused


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
