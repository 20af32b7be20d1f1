"""The models that refedge knows by name, each in the file of its name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..errors import CheckpointError
from .parts import Network

_CLASSES = {
    "slvit": "SLViT",
    "lts": "LTS",
    "m3att": "M3Att",
    "cm_masksd": "CMMaskSD",
    "step": "STEP",
    "lavt": "LAVT",
}


@dataclass(frozen=True)
class Family:
    """A model class and its named configurations, ``paper`` and ``tiny`` among them."""

    name: str
    build: type[Network]
    configs: dict[str, Any]

    @property
    def config_type(self) -> type[Any]:
        """The dataclass of its configurations."""
        return type(self.configs["tiny"])


def families() -> list[str]:
    """Names of all models."""
    return list(_CLASSES)


def configurations() -> list[str]:
    """All named configurations, such as ``slvit:paper``."""
    return [f"{name}:{config}" for name in _CLASSES for config in family(name).configs]


def family(name: str) -> Family:
    """The model of that name; its file is imported now."""
    if name not in _CLASSES:
        raise CheckpointError(
            "checkpoint-model",
            f"there is no model called {name!r}",
            why=f"this version of refedge knows {', '.join(_CLASSES)}",
            fix="name one of these",
        )
    module = import_module(f".{name}", __package__)
    return Family(name, getattr(module, _CLASSES[name]), module.CONFIGS)
