"""Pictures on their way into a network: bytes to numbers, a row for every expression about one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels, in units of 0 to 1
STD = (0.229, 0.224, 0.225)


def normalise_pixels(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] float32.

    Cast first, then transpose: TensorRT takes uint8 at a network's input only, and only a cast may
    read it. ``mean`` and ``std`` are in units of 0 to 1.
    """
    x = pixels.to(torch.float32).permute(0, 3, 1, 2)
    return x * (1 / (255 * std)).view(1, 3, 1, 1) - (mean / std).view(1, 3, 1, 1)


def unit_pixels(pixels: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] float32 of 0 to 1; cast first, as TensorRT wants it."""
    return pixels.to(torch.float32).permute(0, 3, 1, 2) * (1 / 255)


def pick(x: Tensor, image_index: Tensor | None) -> Tensor:
    """Rows of pictures to rows of expressions; as they are where there is one for each."""
    return x if image_index is None else x.index_select(0, image_index)


def pick_all(xs: Iterable[Tensor], image_index: Tensor | None) -> tuple[Tensor, ...]:
    """The same for several tensors."""
    return tuple(pick(x, image_index) for x in xs)
