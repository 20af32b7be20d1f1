"""Swin, the backbone of windows that shift: self-attention inside windows, shifted in every second
block (Liu et al., ICCV 2021).

The dense-prediction variant, with the module names of the public checkpoints: a grid that is no
multiple of the window is padded with zeros, which are attended to like the official code does, and
every stage has an output norm. The size is fixed when a network is built, so cutting into windows,
shift and padding are one gather with constant indices. Where one window covers a grid it is the
grid and does not shift (the dense code pads and shifts; no published size gets there).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .text import MASKED


@dataclass(frozen=True)
class SwinConfig:
    """Sizes of a Swin; the defaults are Swin-B with windows of 12 x 12.

    width: channels of stage 0; every further stage has twice as many.
    ratio: hidden channels of the MLPs over their width.
    """

    width: int = 128
    depths: tuple[int, int, int, int] = (2, 2, 18, 2)
    heads: tuple[int, int, int, int] = (4, 8, 16, 32)
    window: int = 12
    ratio: int = 4
    drop_path: float = 0.3

    def __post_init__(self) -> None:
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"{width} channels cannot be shared by {heads} heads")
        if self.window < 1 or min(self.depths) < 1:
            raise ValueError(f"windows of {self.window}, depths {self.depths}: at least 1 each")

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels of the four stages."""
        return (self.width, 2 * self.width, 4 * self.width, 8 * self.width)


class Windows(nn.Module):
    """How tokens of a square grid are dealt to windows: constants only.

    take:    [n * L] the token at each place of the windows, ``grid ** 2`` for padding.
    back:    [grid^2] the place of each token.
    offsets: [L * L] for each pair of places, the row of the table of relative positions.
    same:    [n, 1, L, L] whether two places were neighbours before the shift; None without shift.
    """

    def __init__(self, grid: int, window: int, shift: int) -> None:
        super().__init__()
        side = min(grid, window)
        shift = shift if side < grid else 0
        across = -(-grid // side)
        padded = across * side
        self.count, self.length = across**2, side**2
        self.padding = padded > grid

        def deal(cells: Tensor) -> Tensor:
            return cells.reshape(across, side, across, side).transpose(1, 2).flatten()

        cells = deal(torch.arange(padded**2).view(padded, padded).roll((-shift, -shift), (0, 1)))
        rows, columns = cells // padded, cells % padded
        inside = (rows < grid) & (columns < grid)
        take = torch.where(inside, rows * grid + columns, grid**2)
        back = cells.argsort().view(padded, padded)[:grid, :grid].flatten()
        places = torch.arange(side)
        steps = places[:, None] - places + window - 1
        offsets = steps[:, None, :, None] * (2 * window - 1) + steps[None, :, None, :]
        self.register_buffer("take", take.int(), persistent=False)
        self.register_buffer("back", back.int(), persistent=False)
        self.register_buffer("offsets", offsets.flatten().int(), persistent=False)
        self.register_buffer("same", None)
        if shift:
            line = torch.arange(padded)
            bands = (line >= padded - side).int() + (line >= padded - shift).int()
            regions = deal(3 * bands[:, None] + bands).view(self.count, 1, self.length)
            same = regions[:, :, :, None] == regions[:, :, None, :]
            self.register_buffer("same", same, persistent=False)

    take: Tensor
    back: Tensor
    offsets: Tensor
    same: Tensor | None


def look_near(window: int, heads: int) -> Tensor:
    """Position biases [(2 window - 1)^2, heads] with which every head starts out looking nearby.

    Each head prefers one spot on a ring around its pixel, so that together they are much like a
    convolution (d'Ascoli et al., ConViT, ICML 2021); from biases of zero every pixel sees the mean
    of its window at first.
    """
    line = torch.arange(1.0 - window, window)
    down, right = torch.meshgrid(line, line, indexing="ij")
    angles = torch.arange(heads) * (2.0 * torch.pi / heads)
    radius = 1.5 if heads > 1 else 0.0
    far = (down[..., None] - radius * angles.sin()) ** 2
    far = far + (right[..., None] - radius * angles.cos()) ** 2
    return -0.5 * far.flatten(0, 1)


class WindowAttention(nn.Module):
    """Self-attention inside windows with a learned bias for every relative position."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.heads = heads
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        with torch.no_grad():
            self.relative_position_bias_table.add_(look_near(window, heads))

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """[B, grid^2, C] to the same.

        Padding is a token of zeros, so its query, key and value are the biases: projected once.
        """
        width, count, length = x.shape[2], windows.count, windows.length
        if windows.padding:
            qkv = self.qkv(F.pad(x, (0, 0, 0, 1))).index_select(1, windows.take)
        else:
            qkv = self.qkv(x.index_select(1, windows.take))
        qkv = qkv.reshape(-1, count, length, 3 * self.heads, width // self.heads)
        q, k, v = qkv.transpose(2, 3).chunk(3, dim=2)
        bias = self.relative_position_bias_table.index_select(0, windows.offsets)
        scores = (q * (width // self.heads) ** -0.5) @ k.transpose(-1, -2)
        scores = scores + bias.view(length, length, self.heads).permute(2, 0, 1)
        if windows.same is not None:
            scores = torch.where(windows.same, scores, MASKED)
        out = (torch.softmax(scores, dim=-1) @ v).transpose(2, 3)
        tokens = out.reshape(-1, count * length, width).index_select(1, windows.back)
        mixed: Tensor = self.proj(tokens)
        return mixed


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Window attention and MLP, each behind a layer norm on a residual path."""

    def __init__(self, width: int, heads: int, window: int, ratio: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, ratio)
        self.drop = drop

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        x = x + self._thin(self.attn(self.norm1(x), windows))
        return x + self._thin(self.mlp(self.norm2(x)))

    def _thin(self, x: Tensor) -> Tensor:
        """Stochastic depth, in training only (Huang et al., ECCV 2016)."""
        if not self.training or self.drop == 0.0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop
        return x * keep / (1.0 - self.drop)


class PatchMerging(nn.Module):
    """[B, grid^2, C] to [B, (grid / 2)^2, 2 C]: four neighbours side by side, norm, linear."""

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        half, width = self.grid // 2, x.shape[2]
        # row within the pair varies fastest, as in the public weights
        pairs = x.reshape(-1, half, 2, half, 2, width).permute(0, 1, 3, 4, 2, 5)
        merged: Tensor = self.reduction(self.norm(pairs.reshape(-1, half**2, 4 * width)))
        return merged


class PatchEmbed(nn.Module):
    """Normalised pixels [B, 3, S, S] to tokens [B, (S / 4)^2, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.proj(x).flatten(2).transpose(1, 2))
        return tokens


class Stage(nn.Module):
    """Blocks, shifted and not in turn; ``downsample`` leads to the next stage."""

    def __init__(self, config: SwinConfig, index: int, grid: int, rates: list[float]) -> None:
        super().__init__()
        width, heads = config.widths[index], config.heads[index]
        self.blocks = nn.ModuleList(
            Block(width, heads, config.window, config.ratio, rate) for rate in rates
        )
        self.downsample = PatchMerging(width, grid) if index < 3 else None
        self.windows = nn.ModuleList(
            Windows(grid, config.window, shift) for shift in (0, config.window // 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for j, block in enumerate(self.blocks):
            x = block(x, self.windows[j % 2])
        return x


class Swin(nn.Module):
    """The backbone for squares of one size, a multiple of 32.

    Run whole, or ``embed``, ``stage``, ``downsample``, ``stage``, ... with something in between.
    Tokens are [B, grid^2, C], row-major.
    """

    def __init__(self, config: SwinConfig, size: int) -> None:
        super().__init__()
        if size % 32:
            raise ValueError(f"{size} pixels are no multiple of 32")
        self.config = config
        self.grids = tuple(size // 4 // 2**i for i in range(4))
        last = max(1, sum(config.depths) - 1)
        rates = [config.drop_path * i / last for i in range(last + 1)]
        self.patch_embed = PatchEmbed(config.width)
        self.layers = nn.ModuleList()
        for i, (depth, grid) in enumerate(zip(config.depths, self.grids, strict=True)):
            self.layers.append(Stage(config, i, grid, [rates.pop(0) for _ in range(depth)]))
            setattr(self, f"norm{i}", nn.LayerNorm(config.widths[i]))

    def embed(self, x: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] to the tokens of stage 0."""
        tokens: Tensor = self.patch_embed(x)
        return tokens

    def stage(self, i: int, tokens: Tensor) -> Tensor:
        """The blocks of stage 0 to 3."""
        out: Tensor = self.layers[i](tokens)
        return out

    def downsample(self, i: int, tokens: Tensor) -> Tensor:
        """Tokens of stage 0 to 2 after its blocks to those that the next stage takes."""
        out: Tensor = self.layers[i].get_submodule("downsample")(tokens)
        return out

    def output(self, i: int, tokens: Tensor) -> Tensor:
        """Tokens of a stage, normalised, as a map [B, C_i, grid_i, grid_i]."""
        normalised: Tensor = getattr(self, f"norm{i}")(tokens)
        return self.to_map(i, normalised)

    def to_map(self, i: int, tokens: Tensor) -> Tensor:
        """Tokens of a stage as a map [B, C_i, grid_i, grid_i]."""
        return tokens.transpose(1, 2).reshape(-1, tokens.shape[2], self.grids[i], self.grids[i])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Normalised pixels [B, 3, S, S] to four maps [B, width 2^i, S / 2^(i+2), S / 2^(i+2)]."""
        tokens, maps = self.embed(x), []
        for i in range(4):
            tokens = self.stage(i, tokens)
            maps.append(self.output(i, tokens))
            if i < 3:
                tokens = self.downsample(i, tokens)
        return tuple(maps)
