"""Public weight layouts and how they map to refedge's modules.

refedge's SLViT uses the official module names, so the official state dict maps key by key; what is
left over are weights that the official code stores and never uses. ``official_shapes`` writes the
layout down whole, which is how a test checks our modules against the published parameter count
(48.97 M without BERT, 2.48 M of them dead).
"""

from __future__ import annotations

import re

from torch import Tensor

from .slvit import SLViT, SLViTConfig

_DEAD = re.compile(
    r"backbone\.block\d\.\d+\.attn\.spatial_gating_unit\.fusion\.project_v\.0\.(weight|bias)"
    r"|classifier\.hamburger\.ham\.f_l1\.0\.(weight|bias)"
)
_BUFFERS = re.compile(r"text_encoder\.embeddings\.position_ids|classifier\.hamburger\.ham\.bases")


def is_dead(key: str) -> bool:
    """Whether the official code stores this weight but never uses it."""
    return _DEAD.fullmatch(key) is not None


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official SLViT state dict as refedge's: the dead weights and index buffers dropped."""
    return {k: v for k, v in state.items() if not is_dead(k) and not _BUFFERS.fullmatch(k)}


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
