"""refedge: referring image segmentation from PyTorch to the edge, with its accuracy proven."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Mask", "RefedgeError", "Scene", "Segmenter", "__version__", "load"]

if TYPE_CHECKING:
    from .errors import RefedgeError
    from .runtime.masks import Mask
    from .runtime.segmenter import Scene, Segmenter, load

_HOMES = {
    "RefedgeError": "errors",
    "Mask": "runtime.masks",
    "Scene": "runtime.segmenter",
    "Segmenter": "runtime.segmenter",
    "load": "runtime.segmenter",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that ``import refedge`` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
