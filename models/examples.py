"""Inputs to trace, seed and compare models with: smooth noise and random words, by seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import IMAGES, Network, pictures

Tensors = dict[str, Tensor]


def host_inputs(model: Network, batch: int, seed: int) -> Tensors:
    """What the host gives for so many expressions, by name; pictures fewer if the model allows.

    pixels [P, S, S, 3] uint8, ids [B, T] int32, words [B, T] bool, image_index [B] int32.
    """
    c = model.config
    shared = any(port.shape[0] == IMAGES for part in model.parts() for port in part.inputs)
    ids, words = expressions(batch, c.words, c.vocabulary, seed)
    return {
        "pixels": photos(pictures(batch) if shared else batch, c.size, seed),
        "ids": ids,
        "words": words,
        "image_index": torch.arange(batch, dtype=torch.int32) // (2 if shared else 1),
    }


@torch.no_grad()
def steps(model: Network, host: Tensors) -> dict[str, tuple[Tensors, Tensors]]:
    """What each part takes and gives, by name, when they run one after the other."""
    known, found = dict(host), {}
    for part in model.parts():
        taken = {port.name: known[port.name] for port in part.inputs}
        outputs = part.module(*taken.values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given = dict(zip((port.name for port in part.outputs), outputs, strict=True))
        known |= given
        found[part.name] = (taken, given)
    return found


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
