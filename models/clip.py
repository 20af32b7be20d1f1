"""CLIP's towers, through transformers, in a form that exports to few nodes.

Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021.
Module names are those of ``transformers.CLIPModel`` (``clip_resnet.py`` has the towers that
transformers lacks). QuickGELU stays ``x * sigmoid(1.702 x)``.

Embeddings and layers are called one by one, so that the exported graph has no shape arithmetic, and
positions belong to one size of picture: ``resize_positions`` brings a published table to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from .text import MASKED

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = (123, 117, 104)  # MEAN in bytes, the border of a letterboxed picture


@dataclass(frozen=True)
class ClipText:
    """Size of a text tower; the defaults are those of ViT-B/16 and RN101."""

    vocabulary: int = 49408
    width: int = 512
    layers: int = 12
    heads: int = 8
    positions: int = 77


@dataclass(frozen=True)
class ClipVision:
    """Size of a visual transformer; the defaults are ViT-B/16's.

    patch: pixels per side of a token.
    stem:  ``patch``: one convolution as large as a patch, as published; ``conv``: strided 3x3
           convolutions (Xiao et al., NeurIPS 2021), which learn much faster from scratch.
    """

    patch: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    stem: str = "patch"

    def __post_init__(self) -> None:
        if self.stem not in ("patch", "conv") or self.patch not in (4, 8, 16, 32):
            raise ValueError(f"a stem {self.stem!r} of patches of {self.patch} is not known")


def text_settings(config: ClipText) -> dict[str, int]:
    """A text tower's size under transformers' names."""
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.positions,
        "bos_token_id": config.vocabulary - 2,
        "eos_token_id": config.vocabulary - 1,
    }


def vision_settings(config: ClipVision, size: int) -> dict[str, int]:
    """The same of a visual transformer for pictures of one size."""
    return {
        "image_size": size,
        "patch_size": config.patch,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
    }


def text_tower(config: ClipText) -> CLIPTextModel:
    """A randomly initialised text tower."""
    return CLIPTextModel(
        CLIPTextConfig(**text_settings(config), pad_token_id=0, attn_implementation="eager")
    )


def vision_tower(config: ClipVision, size: int) -> CLIPVisionModel:
    """A randomly initialised visual transformer for pictures of one size."""
    tower = CLIPVisionModel(
        CLIPVisionConfig(**vision_settings(config, size), attn_implementation="eager")
    )
    if config.stem == "conv":
        tower.embeddings.patch_embedding = conv_stem(config)
    return tower


def conv_stem(config: ClipVision) -> nn.Sequential:
    """Strided 3x3 convolutions that double the width, from pixels to tokens."""
    steps = config.patch.bit_length() - 1
    widths = [3, *(config.width >> (steps - 1 - i) for i in range(steps))]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def embed_words(tower: CLIPTextModel, ids: Tensor) -> Tensor:
    """ids [B, T] to token embeddings [B, T, width], without positions."""
    embedded: Tensor = tower.embeddings.token_embedding(ids)
    return embedded


def encode_words(tower: CLIPTextModel, embedded: Tensor, words: Tensor) -> Tensor:
    """Contextual word vectors, causal, behind the last norm.

    embedded: [B, T, width] of ``embed_words``.
    words:    [B, T] bool, false for padding, which is all at the end.
    returns:  [B, T, width]; rows of padding hold values nobody may use.
    """
    length = embedded.shape[1]
    x = embedded + tower.embeddings.position_embedding.weight[:length]
    past = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    bias = torch.where(past & words[:, None, None, :], 0.0, MASKED)
    found: Tensor = tower.final_layer_norm(encode_layers(tower.encoder.layers, x, bias)[-1])
    return found


def encode_patches(tower: CLIPVisionModel, x: Tensor) -> Tensor:
    """Normalised pixels [B, 3, S, S] to patches [B, N, width] behind the last norm."""
    *_, x = encode_layers(tower.encoder.layers, embed_patches(tower, x))
    found: Tensor = tower.post_layernorm(x[:, 1:])
    return found


def embed_patches(tower: CLIPVisionModel, x: Tensor) -> Tensor:
    """Normalised pixels to [B, 1 + N, width]: the class token and the patches, normalised."""
    parts = tower.embeddings
    patches = parts.patch_embedding(x).flatten(2).transpose(1, 2)
    # a row of zeros in front, then a table whose first row holds the class token
    first = F.pad(parts.class_embedding[None], (0, 0, 0, patches.shape[1]))
    x = F.pad(patches, (0, 0, 1, 0)) + (parts.position_embedding.weight + first)
    embedded: Tensor = tower.pre_layrnorm(x)
    return embedded


def encode_layers(layers: nn.ModuleList, x: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """What each of the encoder's layers gives, [B, N, width]."""
    states = []
    for layer in layers:
        x = layer(x, attention_mask=bias)
        states.append(x)
    return states


def last_word(words: Tensor, features: Tensor) -> Tensor:
    """The feature at the last valid word, [B, width]: a sentence's state (in CLIP, the end token).

    words: [B, T] bool, the padding all at the end. A product with a one-hot row, so exact.
    """
    counts = words.to(features.dtype).sum(1, keepdim=True)
    numbers = torch.arange(1, words.shape[1] + 1, device=words.device, dtype=features.dtype)
    chosen = (numbers == counts).to(features.dtype)
    return (chosen[:, None] @ features).squeeze(1)


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Positions [1 + n^2, C], the first of no place, to [1 + grid^2, C], bicubically."""
    side = int((len(table) - 1) ** 0.5)
    if side == grid:
        return table
    places = table[1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    places = F.interpolate(places, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((table[:1], places.flatten(2).squeeze(0).T.to(table.dtype)))
