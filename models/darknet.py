"""Darknet-53, the backbone of YOLOv3 (Redmon and Farhadi, arXiv 1804.02767).

Convolutions come in the order of the public ``.weights`` files, see ``load_weights``.
All maps are [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError

WIDTHS = (32, 64, 128, 256, 512, 1024)
BLOCKS = (1, 2, 8, 8, 4)
SLOPE = 0.1  # of every leaky ReLU
FILE_ORDER = ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var", "conv.weight")


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, leaky ReLU; padding keeps the size at stride 1."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, rate: int = 1
    ) -> None:
        super().__init__()
        padding = rate * (kernel // 2)
        self.conv = nn.Conv2d(
            channels_in, channels_out, kernel, stride, padding, dilation=rate, bias=False
        )
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.bn(self.conv(x)), SLOPE)


class Residual(nn.Module):
    """1x1 to half the channels, 3x3 back, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = ConvNorm(width, width // 2, 1)
        self.expand = ConvNorm(width // 2, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.expand(self.squeeze(x))
        return out


class Darknet(nn.Module):
    """Darknet-53 without its classifier; other sizes by widths (stem, five stages) and blocks.

    x [B, 3, H, W] of 0 to 1, H and W multiples of 32, to the maps of stages 3 to 5: strides 8, 16
    and 32, widths[3:] channels.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS, blocks: tuple[int, ...] = BLOCKS) -> None:
        super().__init__()
        if len(widths) != 6 or len(blocks) != 5:
            raise ValueError(f"6 widths and 5 numbers of blocks, not {widths} and {blocks}")
        self.stem = ConvNorm(3, widths[0], 3)
        self.stages = nn.ModuleList(
            nn.Sequential(ConvNorm(before, width, 3, 2), *(Residual(width) for _ in range(count)))
            for before, width, count in zip(widths[:-1], widths[1:], blocks, strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[2], maps[3], maps[4]

    def layers(self) -> Iterator[ConvNorm]:
        """The convolutions in the order of a ``.weights`` file."""
        return (m for m in self.modules() if isinstance(m, ConvNorm))


@torch.no_grad()
def load_weights(network: Darknet, values: npt.NDArray[np.float32]) -> int:
    """Fill a network from a Darknet file's numbers, its header taken off.

    values:  [n] float32; for each convolution the norm's bias, scale, mean, variance, then the
             kernel [C_out, C_in, k, k]. More may follow (YOLOv3's heads).
    returns: how many numbers were read. Raises CheckpointError where there are too few.
    """
    position = 0
    for layer in network.layers():
        state = layer.state_dict()
        for name in FILE_ORDER:
            tensor = state[name]
            chunk = values[position : position + tensor.numel()]
            if len(chunk) < tensor.numel():
                raise CheckpointError(
                    "checkpoint-mismatch",
                    f"the file holds {len(values)} numbers, too few for this network",
                    why="it belongs to a smaller network, or it was cut short",
                    fix="give the numbers of darknet53.conv.74 or yolov3.weights, without header",
                )
            tensor.copy_(torch.from_numpy(chunk).view_as(tensor))
            position += tensor.numel()
    return position
