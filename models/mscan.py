"""MSCAN, the convolutional backbone of SegNeXt, with a hook for a text branch in its attention.

Guo et al., "SegNeXt: rethinking convolutional attention design", NeurIPS 2022. Module names follow
the public checkpoints. All maps are [B, C, H, W].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MapLinear(nn.Linear):
    """A linear layer over the channels of a [B, C, H, W] map; its weight is a matrix."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class MapConv1d(nn.Conv1d):
    """The same with a weight of shape [C_out, C_in, 1], as SLViT and LAVT store it."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, :, None], self.bias)


class TokenConv1d(MapConv1d):
    """The same over rows of tokens [..., C_in]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, :, 0], self.bias)


class Stem(nn.Module):
    """Two stride-2 convolutions: pixels to stage 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, 2, 1),
            nn.BatchNorm2d(width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, 2, 1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out


class PatchEmbed(nn.Module):
    """A stride-2 convolution: one stage to the next."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width_in, width_out, 3, 2, 1)
        self.norm = nn.BatchNorm2d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(x))
        return out


class _DepthwiseConv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, 1, 1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dwconv(x)
        return out


class Mlp(nn.Module):
    """1x1 up, depthwise 3x3, GELU, 1x1 down."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, ratio * width, 1)
        self.dwconv = _DepthwiseConv(ratio * width)
        self.fc2 = nn.Conv2d(ratio * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.dwconv(self.fc1(x))))
        return out


class StripConvs(nn.Module):
    """The multi-scale depthwise convolutions of MSCA: 5x5, then strips of 7, 11 and 21."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(width, width, 5, padding=2, groups=width)
        for i, n in enumerate((7, 11, 21)):
            across = nn.Conv2d(width, width, (1, n), padding=(0, n // 2), groups=width)
            down = nn.Conv2d(width, width, (n, 1), padding=(n // 2, 0), groups=width)
            setattr(self, f"conv{i}_1", across)
            setattr(self, f"conv{i}_2", down)

    def strips(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The 5x5 map and the sum of it and its strip convolutions."""
        base: Tensor = self.conv0(u)
        total = base
        for i in range(3):
            total = total + getattr(self, f"conv{i}_2")(getattr(self, f"conv{i}_1")(base))
        return base, total


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a [B, C, H, W] map; keys are ``weight`` and ``bias``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
