"""CLIP's residual network with a dense attention pool, as CRIS uses it.

Radford et al., ICML 2021: a stem of three convolutions, strides as average pools, attention instead
of a mean at the end. Wang et al., "CRIS: CLIP-driven referring image segmentation", CVPR 2022, keep
every place of that attention, drop its query of the mean and add a shortcut (``connect``). Names
are those of ``visual`` in OpenAI's archives; ``connect`` alone is not in there. Maps [B, C, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ClipResNet:
    """Size of a residual network; the defaults are RN101's.

    blocks: bottlenecks of the four stages. width: channels of the stem.
    """

    blocks: tuple[int, int, int, int] = (3, 4, 23, 3)
    width: int = 64

    @property
    def heads(self) -> int:
        """Heads of the attention pool, 64 channels each."""
        return max(1, self.width // 2)


class Bottleneck(nn.Module):
    """1x1, 3x3, an average pool for the stride, 1x1; the shortcut is pooled as well."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.stride = stride
        self.downsample: nn.Sequential | None = None
        if stride > 1 or width_in != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self._pool(F.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(self._pool(x))))

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


class AttentionPool(nn.Module):
    """Self-attention over the places of a map, projected, plus a projected shortcut.

    The first row of the positions belongs to the mean that is not asked for here.
    """

    def __init__(self, grid: int, width: int, heads: int, width_out: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, width_out)
        self.connect = nn.Sequential(
            nn.Conv2d(width, width_out, 1, bias=False), nn.BatchNorm2d(width_out)
        )
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        places, side = x.shape[2] * x.shape[3], x.shape[2]
        shortcut = self.connect(x)
        tokens = x.flatten(2).transpose(1, 2) + self.positional_embedding[1:]
        q, k, v = (
            project(tokens).reshape(-1, places, self.heads, tokens.shape[2] // self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (q * q.shape[3] ** -0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1)
        mixed = (torch.softmax(scores, dim=-1) @ v.transpose(1, 2)).transpose(1, 2)
        pooled = self.c_proj(mixed.reshape(-1, places, tokens.shape[2]))
        return F.relu(pooled.transpose(1, 2).reshape(-1, pooled.shape[2], side, side) + shortcut)


def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (Bottleneck(4 * width, width, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(width_in, width, stride), *rest)


class ModifiedResNet(nn.Module):
    """Normalised pixels to the maps of strides 8, 16 and 32, the last attended and projected."""

    def __init__(self, config: ClipResNet, size: int, width_out: int) -> None:
        super().__init__()
        width = config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, config.blocks[0], 1)
        self.layer2 = _stage(4 * width, 2 * width, config.blocks[1], 2)
        self.layer3 = _stage(8 * width, 4 * width, config.blocks[2], 2)
        self.layer4 = _stage(16 * width, 8 * width, config.blocks[3], 2)
        self.attnpool = AttentionPool(size // 32, 32 * width, config.heads, width_out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.layer1(F.avg_pool2d(x, 2))
        eighth = self.layer2(x)
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.attnpool(self.layer4(sixteenth))
