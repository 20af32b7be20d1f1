"""The dilated ResNet of DeepLab v2, with the module names of torchvision's segmentation backbones.

He et al., "Deep residual learning for image recognition", CVPR 2016; Chen et al., "DeepLab", TPAMI
2018. The last two stages keep stride 8 and dilate their 3x3 convolutions by 2 and 4 instead, in
every block (torchvision leaves the first block of a stage at the dilation of the stage before).
Strides are on the 3x3 convolutions, as in torchvision. All maps are [B, C, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4
STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)


@dataclass(frozen=True)
class DeepLabConfig:
    """Size of a dilated ResNet; the defaults are ResNet-101.

    stem:   channels of the first convolution.
    kernel: its side.
    widths: inner channels of the bottlenecks of the four stages.
    depths: their blocks.
    expansion: channels of a stage's map per inner channel.
    """

    stem: int = 64
    kernel: int = 7
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    depths: tuple[int, int, int, int] = (3, 4, 23, 3)
    expansion: int = EXPANSION

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0 or min(self.depths) < 1:
            raise ValueError(f"kernel {self.kernel} is even, or a stage of {self.depths} is empty")

    @property
    def channels(self) -> tuple[int, int, int, int, int]:
        """Channels of F1 to F5."""
        a, b, c, d = (self.expansion * w for w in self.widths)
        return self.stem, a, b, c, d


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, each behind a batch norm, on a residual path."""

    def __init__(
        self, channels_in: int, width: int, channels_out: int, stride: int, dilation: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class DeepLab(nn.Module):
    """Normalised pixels [B, 3, S, S] to F1 .. F5: the pooled stem and the four stages.

    F1 and F2 have stride 4, F3 to F5 stride 8; S is a multiple of 8.
    """

    def __init__(self, config: DeepLabConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.stem, config.kernel, 2, config.kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(config.stem)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages = []
        for i in range(4):
            channels_in, channels_out = config.channels[i : i + 2]
            width, dilation = config.widths[i], DILATIONS[i]
            first = Bottleneck(channels_in, width, channels_out, STRIDES[i], dilation)
            rest = [
                Bottleneck(channels_out, width, channels_out, 1, dilation)
                for _ in range(config.depths[i] - 1)
            ]
            stages.append(nn.Sequential(first, *rest))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = [self.maxpool(F.relu(self.bn1(self.conv1(x))))]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(stage(maps[-1]))
        return tuple(maps)
