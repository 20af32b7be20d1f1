"""Public weight layouts and how they map to refedge's modules.

refedge's SLViT uses the official module names, so the official state dict maps key by key; what is
left over are weights that the official code stores and never uses: 2.48 M of 48.97 M, BERT apart.
"""

from __future__ import annotations

import re

from torch import Tensor

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
