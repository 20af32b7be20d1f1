"""The light Hamburger decoder: matrix factorisation instead of attention.

Geng et al., "Is attention better than matrix decomposition?", ICLR 2021; the variant of SegNeXt
(Guo et al., NeurIPS 2022), with module names as in its public checkpoints. One thing differs on
purpose: the initial bases are a fixed, seeded buffer. The public code draws them anew at every
forward, also in evaluation, so that no two runs agree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6


class GroupNorm(nn.GroupNorm):
    """Group normalisation as one InstanceNormalization between two reshapes of known size."""

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        groups = x.reshape(-1, self.num_groups, channels // self.num_groups * height * width)
        normalised = F.instance_norm(groups, eps=self.eps).reshape(-1, channels, height, width)
        return normalised * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class ConvGN(nn.Module):
    """1x1 convolution without bias, group normalisation, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.gn = GroupNorm(groups, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gn(self.conv(x)))


class PlainConv(nn.Module):
    """A 1x1 convolution, one level deeper so that its key is ``.conv.weight``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class NMF(nn.Module):
    """Non-negative matrix factorisation by multiplicative updates, X = B C.

    x: [B, D, N] non-negative; bases B [B, D, R]; coefficients C^T [B, N, R]. Gradients flow through
    the last coefficient update only (the one-step gradient of the Hamburger paper).
    """

    def __init__(self, width: int, rank: int, train_steps: int, eval_steps: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(width * 1000 + rank)
        bases = F.normalize(torch.rand(1, width, rank, generator=generator), dim=1)
        self.register_buffer("bases", bases, persistent=False)
        self.train_steps = train_steps
        self.eval_steps = eval_steps

    bases: Tensor

    def forward(self, x: Tensor) -> Tensor:
        bases = self.bases
        coefficients = torch.softmax(x.transpose(1, 2) @ bases, dim=-1)
        if self.training:
            with torch.no_grad():
                bases, coefficients = self._iterate(x, bases, coefficients, self.train_steps)
        else:
            bases, coefficients = self._iterate(x, bases, coefficients, self.eval_steps)
        return bases @ self._update_coefficients(x, bases, coefficients).transpose(1, 2)

    def _iterate(
        self, x: Tensor, bases: Tensor, coefficients: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        for _ in range(steps):
            coefficients = self._update_coefficients(x, bases, coefficients)
            gram = coefficients.transpose(1, 2) @ coefficients
            bases = bases * (x @ coefficients) / (bases @ gram + EPSILON)
        return bases, coefficients

    def _update_coefficients(self, x: Tensor, bases: Tensor, coefficients: Tensor) -> Tensor:
        gram = bases.transpose(1, 2) @ bases
        return coefficients * (x.transpose(1, 2) @ bases) / (coefficients @ gram + EPSILON)


class Hamburger(nn.Module):
    """Bread, ham, bread: 1x1 convolution, NMF on the ReLU, 1x1 convolution, residual."""

    def __init__(self, width: int, rank: int, train_steps: int, eval_steps: int) -> None:
        super().__init__()
        self.ham_in = PlainConv(width)
        self.ham = NMF(width, rank, train_steps, eval_steps)
        self.ham_out = PlainConv(width)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        e = F.relu(self.ham_in(x)).flatten(2)
        if self.training:  # the ratios of the factorisation need float32
            with torch.autocast(x.device.type, enabled=False):
                rebuilt = self.ham(e.float())
        else:
            rebuilt = self.ham(e)
        return F.relu(x + self.ham_out(rebuilt.reshape(x.shape[0], -1, height, width).to(x.dtype)))


class LightHamHead(nn.Module):
    """Four maps to class logits at the resolution of the first.

    maps: [B, C_i, H/2^(i+1), W/2^(i+1)], finest first, C_i as in ``widths``.
    returns [B, 2, H/4, W/4]: background and foreground.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        width: int,
        out_width: int,
        rank: int,
        groups: int,
        steps: tuple[int, int],
    ) -> None:
        super().__init__()
        self.squeeze = ConvGN(sum(widths), width, groups)
        self.hamburger = Hamburger(width, rank, *steps)
        self.align = ConvGN(width, out_width, groups)
        self.conv1 = nn.Conv2d(out_width, 2, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        finest = maps[0]
        same_size = [finest] + [
            F.interpolate(m, scale_factor=2**i, mode="bilinear", align_corners=False)
            for i, m in enumerate(maps[1:], start=1)
        ]
        x = self.squeeze(torch.cat(same_size[::-1], dim=1))
        out: Tensor = self.conv1(self.align(self.hamburger(x)))
        return out
