"""The quantizer in integers, with NumPy: what every encoding of every dialect has to compute.

    q    = clip(round half to even(x / s) + z, low, high)
    acc  = sum (q_x - z_x) (q_w - z_w)          in 64 bits, exact
    real = acc * s_x * s_w + bias
    q_y  = the same quantizer on real, with s_y

Zero-points only shift the integers: (q - z) is the same number in every encoding, which is why
there is one quantizer. Nothing here is taken from the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Encoding:
    """Zero-points of activations and weights; int8 where 0, uint8 where 128."""

    name: str
    activation: int
    weight: int

    @property
    def activations(self) -> type[np.integer]:
        return np.uint8 if self.activation else np.int8

    @property
    def weights(self) -> type[np.integer]:
        return np.uint8 if self.weight else np.int8


SIGNED = Encoding("signed", 0, 0)
UNSIGNED = Encoding("unsigned", 128, 0)
UNSIGNED_WEIGHTS = Encoding("unsigned weights", 128, 128)
ENCODINGS = (SIGNED, UNSIGNED, UNSIGNED_WEIGHTS)


def quantize(x: np.ndarray, scale: np.ndarray | float, zero: int, low: int = -128) -> np.ndarray:
    """Integers of a float32 array; ``low`` is -128 for activations and -127 for weights."""
    steps = np.rint(np.asarray(x, np.float32) / np.asarray(scale, np.float32))
    return np.clip(steps, low, 127).astype(np.int64) + zero


def conv(
    x: np.ndarray,
    w: np.ndarray,
    zeros: tuple[int, int],
    *,
    pad: int = 0,
    stride: int = 1,
    group: int = 1,
) -> np.ndarray:
    """[N, C, H, W] x [O, C / group, k, k] integers to exact sums [N, O, H', W']."""
    x = np.pad(x - zeros[0], ((0, 0), (0, 0), (pad, pad), (pad, pad)))  # padding is the real zero
    w = w - zeros[1]
    kernel = w.shape[2:]
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(2, 3))
    windows = windows[:, :, ::stride, ::stride]
    parts = []
    for part, kernels in zip(
        np.split(windows, group, axis=1), np.split(w, group, axis=0), strict=True
    ):
        parts.append(np.einsum("nchwij,ocij->nohw", part, kernels))
    return np.concatenate(parts, axis=1)


def matmul(a: np.ndarray, b: np.ndarray, zeros: tuple[int, int]) -> np.ndarray:
    """Exact sums of products over the last axis of ``a`` and the last but one of ``b``."""
    return (a - zeros[0]) @ (b - zeros[1])


def requantize(
    sums: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray | float,
    to: float,
    zero: int,
) -> np.ndarray:
    """Integers of the next tensor; ``scale`` is s_x * s_w, broadcastable to the sums."""
    real = sums.astype(np.float64) * np.asarray(scale, np.float64) + np.asarray(bias, np.float64)
    return np.clip(np.rint(real / to), -128, 127).astype(np.int64) + zero
