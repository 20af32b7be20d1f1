"""Weight files in the layouts that are public, written by torch itself, a few numbers each."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from refedge.models.slvit import SLViT, SLViTConfig
from torch import Tensor, nn

State = dict[str, Tensor]


def official_shapes(model: SLViT) -> dict[str, tuple[int, ...]]:
    """Every key and shape of the official checkpoint of this size, dead weights included."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    return shapes | _dead_shapes(model.config)


def _dead_shapes(config: SLViTConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True), start=1):
        for block in range(depth):
            stem = f"backbone.block{stage}.{block}.attn.spatial_gating_unit.fusion.project_v.0"
            shapes[f"{stem}.weight"] = (width, width, 1)
            shapes[f"{stem}.bias"] = (width,)
    shapes["classifier.hamburger.ham.f_l1.0.weight"] = (config.head_width, config.text.width, 1)
    shapes["classifier.hamburger.ham.f_l1.0.bias"] = (config.head_width,)
    return shapes


def random_like(state: State, seed: int = 0) -> State:
    """Other numbers in the same names, shapes and dtypes; variances are positive."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            numbers = torch.randn(tensor.shape, generator=generator) * 0.1
            made[name] = numbers.abs() + 0.5 if name.endswith("running_var") else numbers
        else:
            made[name] = torch.full_like(tensor, 7)
    return made


def training_checkpoint(path: Path, *, legacy: bool = False, **groups: State) -> Path:
    """As the training code of LAVT and SLViT saves it: weights, optimizer, schedule, arguments."""
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([{"params": [parameter], "weight_decay": 0.0}], lr=3e-5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda x: (1 - x / 10) ** 0.9)
    parameter.sum().backward()
    optimizer.step()
    schedule.step()
    content: dict[str, Any] = {
        **groups,
        "optimizer": optimizer.state_dict(),
        "epoch": 12,
        "args": argparse.Namespace(model="lavt", lr=3e-5, amsgrad=True, swin_type="base", mha=""),
        "lr_scheduler": schedule.state_dict(),
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


class _Attention(nn.Module):
    """nn.MultiheadAttention as far as CLIP uses it, in a form that TorchScript takes."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.randn(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        projected = torch.nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        split = projected.reshape(rows, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5
        if self.causal:
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        mixed = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(rows, length, width)
        out: Tensor = self.out_proj(mixed)
        return out


class _QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.attn = _Attention(width, heads, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", _QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class _Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.resblocks = nn.Sequential(*(_Block(width, heads, causal) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.resblocks(x)
        return out


class _Vision(nn.Module):
    def __init__(
        self, width: int, layers: int, heads: int, patch: int, grid: int, embed: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = _Transformer(width, layers, heads, False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        first = self.class_embedding + torch.zeros_like(x[:, :1])
        x = self.ln_pre(torch.cat((first, x), 1) + self.positional_embedding)
        out: Tensor = self.ln_post(self.transformer(x)) @ self.proj
        return out


class TinyCLIP(nn.Module):
    """Modules and names of OpenAI's CLIP with a visual transformer."""

    def __init__(
        self,
        *,
        embed: int = 8,
        vision: tuple[int, int, int, int, int] = (12, 2, 3, 4, 3),
        text: tuple[int, int, int] = (8, 2, 2),
        vocabulary: int = 20,
        positions: int = 9,
    ) -> None:
        """vision: width, layers, heads, patch, grid; text: width, layers, heads."""
        super().__init__()
        self.side, self.context = vision[3] * vision[4], positions
        self.visual = _Vision(*vision, embed)
        self.transformer = _Transformer(*text, True)
        self.token_embedding = nn.Embedding(vocabulary, text[0])
        self.positional_embedding = nn.Parameter(torch.randn(positions, text[0]))
        self.ln_final = nn.LayerNorm(text[0])
        self.text_projection = nn.Parameter(torch.randn(text[0], embed))
        self.logit_scale = nn.Parameter(torch.tensor(2.66))
        numbers = {"input_resolution": self.side, "context_length": positions}
        for name, number in (numbers | {"vocab_size": vocabulary}).items():
            self.register_buffer(name, torch.tensor(number))

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] and [B, T] to places [B, 1 + N, embed] and words [B, T, width]."""
        x = self.token_embedding(ids) + self.positional_embedding
        return self.visual(pixels), self.ln_final(self.transformer(x))


def clip_archive(path: Path, model: TinyCLIP, *, traced: bool = False) -> State:
    """As OpenAI publishes CLIP: TorchScript, matrices in float16. Gives the weights in float32."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embedding" not in name:
            parameter.data = parameter.data.half()
    state = {k: v.float() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    if traced:
        model = copy.deepcopy(model).float()
        inputs = (torch.zeros(1, 3, model.side, model.side), torch.zeros(1, model.context).long())
        scripted = torch.jit.trace(model.eval(), inputs)
    else:
        scripted = torch.jit.script(model.eval())
    torch.jit.save(scripted, path)
    return state
