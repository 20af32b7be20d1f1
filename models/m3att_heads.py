"""What M3Att makes of its last product of words and pixels: the mask, and the words again.

Reconstruction of the language (LFR) and the decoder are described in Liu et al., TIP 2023; the
convolutions of the decoder are those of VLT's public code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .darknet import SLOPE, ConvNorm
from .recurrent import masked_mean
from .transformer import sine_row


class MaskHead(nn.Module):
    """Maps of words [B, T, side, side] to logits [B, size, size].

    skip: channels of a fused map beside F_mul, None without. A convolution of two maps put
          together is the sum of two convolutions; ``beside`` makes the second, once per picture.
    """

    def __init__(
        self, words: int, width: int, doublings: int, side: int, size: int, skip: int | None
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(words, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.skip = None
        if skip is not None:
            self.skip = nn.Sequential(
                nn.Conv2d(skip, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            )
        self.refine = nn.Sequential(ConvNorm(width, width, 3), ConvNorm(width, width, 3))
        self.grow = nn.ModuleList(ConvNorm(width, width, 3) for _ in range(doublings))
        self.logit = nn.Conv2d(width, 1, 3, padding=1)
        self.side = side
        self.scale = size // (side * 2**doublings)

    def beside(self, fused: Tensor) -> tuple[Tensor, ...]:
        """The fused map's share of the first convolution; nothing in a head without skip."""
        return () if self.skip is None else (self.skip(fused),)

    def forward(self, product: Tensor, beside: tuple[Tensor, ...]) -> Tensor:
        """F_mul [B, T, side^2] and what ``beside`` gave to logits."""
        x = self.norm(self.first(product.reshape(-1, product.shape[1], self.side, self.side)))
        for share in beside:
            x = x + share
        x = self.refine(F.leaky_relu(x, SLOPE))
        for layer in self.grow:
            x = layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.logit(x)
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=float(self.scale), mode="bilinear")
        logits: Tensor = x.squeeze(1)
        return logits


class Reconstruction(nn.Module):
    """Training only (LFR): F_mul must still hold what the expression said.

    product [B, T, N], language [B, T, D] and words [B, T] bool to the mean squared error between
    what three layers make of the product and the language, which gets no gradient. One more row,
    the mean over the words, stands for the sentence.
    """

    def __init__(self, words: int, pixels: int, width: int) -> None:
        super().__init__()
        self.take = nn.Linear(pixels, width)
        self.hidden = nn.Linear(width, width)
        self.give = nn.Linear(width, width)
        self.register_buffer("positions", sine_row(words + 1, width), persistent=False)

    positions: Tensor

    def forward(self, product: Tensor, language: Tensor, words: Tensor) -> Tensor:
        wanted = _with_sentence(language.detach(), words)
        x = F.relu(self.take(_with_sentence(product, words)) + self.positions)
        found = self.give(F.relu(self.hidden(x)))
        valid = F.pad(words, (1, 0), value=True)
        error: Tensor = (found - wanted).square().mean(2) * valid
        return error.sum() / valid.sum()


def _with_sentence(x: Tensor, words: Tensor) -> Tensor:
    return torch.cat((masked_mean(x, words)[:, None], x), dim=1)
