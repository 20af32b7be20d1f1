"""Darknet's ``.weights``: a header, then bare numbers in the order of the network's definition.

The header is three int32 (major, minor, revision) and how many pictures the network has seen, int64
since version 0.2. Each convolution stores the bias, scale, mean and variance of its norm, then its
kernel. Nothing names them, so the count must be that of a file that is known: Darknet-53 alone
(``darknet53.conv.74``), with its classifier, or YOLOv3, whose heads follow.
"""

from __future__ import annotations

import copy
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..darknet import Darknet, load_weights
from .refused import damaged, other_layout
from .weights import State, missing

_CLASSES = 1000  # of the classifier


def read_darknet(path: Path, network: Darknet) -> State:
    """The weights for a network, under its names."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise missing(path, error) from error
    major, minor, revision = struct.unpack("<3i", raw[:12]) if len(raw) >= 20 else (-1, -1, -1)
    if min(major, minor, revision) < 0 or max(major, minor) > 1000:
        raise damaged(path, "it does not begin with Darknet's version numbers")
    body = raw[20 if 10 * major + minor >= 2 else 16 :]
    if len(body) % 4:
        raise damaged(path, f"{len(body)} bytes are no whole number of float32")
    values = np.frombuffer(body, "<f4").astype(np.float32)
    network = copy.deepcopy(network)
    rest = len(values) - load_weights(network, values)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    widths = _widths(network)
    if not _known(rest, *widths) or not all(map(_sound, state.items())):
        raise other_layout(
            path,
            f"{rest} numbers are left behind {len(values) - rest} of a Darknet of {widths[-1]} "
            "channels, or a variance among these is negative",
            "give darknet53.conv.74, darknet53.weights or yolov3.weights",
        )
    return state


def _widths(network: Darknet) -> tuple[int, int, int]:
    """Channels of the maps of strides 8, 16 and 32."""
    low, middle, top = (list(s.parameters())[-1].numel() for s in network.stages[2:])
    return low, middle, top


def _known(rest: int, low: int, middle: int, top: int) -> bool:
    """Whether so many numbers follow in a file that is known: YOLOv3 has any number of classes."""
    last = low + middle + top + 3  # weights and biases of one output of each of the last layers
    outputs, left = divmod(rest - yolo_heads(low, middle, top), last)
    yolo = left == 0 and outputs % 3 == 0 and outputs // 3 > 5
    return rest in (0, top * _CLASSES + _CLASSES) or yolo


def yolo_heads(low: int, middle: int, top: int) -> int:
    """Numbers in YOLOv3's heads before their last layers, for maps of so many channels."""

    def conv(before: int, after: int, kernel: int) -> int:
        return before * after * kernel**2 + 4 * after

    def head(before: int, width: int) -> int:
        down, up = conv(width, width // 2, 1), conv(width // 2, width, 3)
        return conv(before, width // 2, 1) + 2 * down + 3 * up

    joined = conv(top // 2, middle // 2, 1) + conv(middle // 2, low // 2, 1)
    return head(top, top) + head(middle + middle // 2, middle) + head(low + low // 2, low) + joined


def _sound(item: tuple[str, Tensor]) -> bool:
    name, tensor = item
    finite = bool(torch.isfinite(tensor).all())
    return finite and not (name.endswith("running_var") and bool((tensor < 0).any()))
