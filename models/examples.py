"""Inputs to trace, seed and compare models with: smooth noise and random words, by seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def expressions(batch: int, length: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    """ids [batch, length] int32, 0 where padded, and words [batch, length] bool; 3 words at least.

    An expression is cut at its length, so that words are true from the left.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, length + 1, (batch, 1), generator=generator)
    words = torch.arange(length)[None] < lengths
    ids = torch.randint(2, vocabulary, (batch, length), generator=generator)
    return (ids * words).to(torch.int32), words


def photos(count: int, size: int, seed: int) -> Tensor:
    """[count, size, size, 3] uint8, colours that change every 16 pixels, interpolated."""
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (count, 3, size // 16, size // 16)
    coarse = torch.randint(0, 256, shape, generator=generator).float()
    pixels = F.interpolate(coarse, size=(size, size), mode="bilinear").round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()
