"""Folders as Hugging Face saves models: ``config.json`` beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .refused import damaged, other_layout
from .weights import State, missing, read_weights

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


def read_folder(folder: Path, expected: dict[str, Any], usual: dict[str, Any]) -> State:
    """The weights, once ``config.json`` says what the model expects.

    expected: dotted field to value, such as ``text_config.hidden_size``.
    usual:    what a field means that the file does not mention.
    """
    weights = weights_of(folder)
    config = _config(folder / "config.json")
    odd = []
    for name, value in expected.items():
        found = _field(config, name, usual.get(name, value))
        if found != value:
            odd.append(f"{name} is {found!r:.40}, the model has {value!r}")
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


def _field(config: dict[str, Any], name: str, usual: Any) -> Any:
    found: Any = config
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            return usual
        found = found[part]
    return found
