"""Folders as Hugging Face saves models: ``config.json`` beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .refused import damaged, other_layout
from .weights import State, missing, read_weights

Settings = tuple[Any, Any, tuple[str, ...]]
FILES = ("model.safetensors", "pytorch_model.bin")


def weights_of(folder: Path) -> Path:
    """The file with the weights, safetensors where both are there."""
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    held = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    raise other_layout(
        folder,
        f"it holds {', '.join(held[:8])}" if held else "it is no folder with files",
        f"give the folder that holds config.json and {' or '.join(FILES)}",
    )


def read_folder(folder: Path, settings: Mapping[str, Settings]) -> State:
    """The weights, once ``config.json`` says what the model expects.

    settings: section of the file (empty for the whole) to the model's own configuration, one with
              transformers' defaults, which the file leaves out, and the fields to compare.
    """
    weights = weights_of(folder)
    config = _config(folder / "config.json")
    odd = []
    for section, (own, usual, fields) in settings.items():
        found = config.get(section, {}) if section else config
        for name in fields:
            value = found.get(name, getattr(usual, name)) if isinstance(found, dict) else None
            if value != getattr(own, name):
                odd.append(f"{name} is {value!r:.40}, the model has {getattr(own, name)!r}")
    if odd:
        raise other_layout(
            folder, "; ".join(odd), "take the weights of that size, or another configuration"
        )
    return read_weights(weights, "state_dict")["state_dict"]


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise missing(path, error) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(found, dict):
        raise damaged(path, f"it is a {type(found).__name__}, not a table of settings")
    return found
