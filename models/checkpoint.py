"""A trained model on disk: ``model.safetensors``, ``tokenizer.json`` and ``card.json``.

The card says which architecture and configuration the weights belong to, their SHA-256, what they
were trained on and what they scored; its schema is ``Card``. Weights are read from safetensors
only, never from a pickle, and only after the hash was checked.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load, save
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..errors import CheckpointError
from .slvit import CONFIGS, SLViT, SLViTConfig

CARD = "card.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
SHIPPED = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True)
class Card:
    """What a checkpoint is; ``training`` and ``scores`` are free-form records for people."""

    model: str
    config: SLViTConfig
    sha256: str
    tokenizer: str
    training: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    schema: int = 1


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with its tokenizer and card; ``sha256`` is None if untrained."""

    model: SLViT
    tokenizer: Tokenizer
    card: Card


def shipped() -> list[str]:
    """Names of the checkpoints that come with refedge."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{CARD}"))


def locate(name_or_path: str) -> Path:
    """The folder of a shipped checkpoint, or of one's own."""
    for folder in (SHIPPED / name_or_path, Path(name_or_path)):
        if (folder / CARD).is_file():
            return folder
    raise CheckpointError(
        "checkpoint-missing",
        f"there is no checkpoint called {name_or_path!r}",
        why=f"shipped are {', '.join(shipped()) or 'none'}; a folder needs a {CARD}",
        fix="name a shipped checkpoint or a folder that `refedge train` has written",
    )


def load_checkpoint(name_or_path: str) -> Loaded:
    """Read, verify and build; the weights must fit the card's configuration exactly."""
    folder = locate(name_or_path)
    try:
        card = msgspec.json.decode((folder / CARD).read_bytes(), type=Card)
        raw = (folder / WEIGHTS).read_bytes()
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise _unreadable(folder, error) from error
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise _unreadable(folder, error) from error
    digest = hashlib.sha256(raw).hexdigest()
    if digest != card.sha256:
        raise CheckpointError(
            "checkpoint-hash",
            f"{folder / WEIGHTS} is not the file its card describes",
            why=f"its sha256 is {digest[:16]}…, the card says {card.sha256[:16]}…",
            fix="fetch the checkpoint again, or train it anew",
        )
    if card.model != "slvit":
        raise CheckpointError(
            "checkpoint-model",
            f"{folder} holds a {card.model!r}",
            why="this version of refedge knows slvit",
            fix="use a checkpoint of that model",
        )
    model = SLViT(card.config)
    fit(model, load(raw))
    return Loaded(model.eval(), tokenizer, card)


def fit(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict whose names and shapes must be the model's, naming every one that is not."""
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(state))
    unexpected = sorted(set(state) - set(wanted))
    misshaped = [
        f"{k} {tuple(state[k].shape)} for {tuple(wanted[k].shape)}"
        for k in sorted(set(wanted) & set(state))
        if state[k].shape != wanted[k].shape
    ]
    if missing or unexpected or misshaped:
        found = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        parts = [f"{len(k)} {what}: {', '.join(k[:5])}" for what, k in found if k]
        raise CheckpointError(
            "checkpoint-mismatch",
            f"these weights do not fit {type(model).__name__}",
            why="; ".join(parts),
            fix="use the checkpoint with the model and configuration it was made for",
        )
    model.load_state_dict({k: v.to(wanted[k].dtype) for k, v in state.items()})


def compact(model: nn.Module) -> dict[str, Tensor]:
    """The state dict for disk: matrices and kernels in float16, vectors and statistics as they are."""
    state = model.state_dict()
    return {
        name: (t.half() if t.ndim > 1 and t.is_floating_point() else t).contiguous()
        for name, t in state.items()
    }


def save_checkpoint(
    folder: Path, model: SLViT, tokenizer: Tokenizer, *, training: dict[str, Any]
) -> Path:
    """Write a checkpoint folder; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = save(compact(model))
    card = Card("slvit", model.config, hashlib.sha256(raw).hexdigest(), TOKENIZER, training)
    write_atomically(folder / WEIGHTS, raw)
    write_atomically(folder / TOKENIZER, tokenizer.to_str(pretty=True).encode())
    write_card(folder, card)
    return folder


def write_card(folder: Path, card: Card) -> None:
    """Write the card, indented, for people to read."""
    write_atomically(folder / CARD, msgspec.json.format(msgspec.json.encode(card), indent=1) + b"\n")


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the path and rename over it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def configuration(name: str, *, size: int | None = None) -> SLViTConfig:
    """A named configuration, at another size if one is given."""
    import dataclasses

    if name not in CONFIGS:
        raise CheckpointError(
            "config-unknown",
            f"SLViT has no configuration called {name!r}",
            why=f"its configurations are {', '.join(CONFIGS)}",
            fix="choose one of these",
        )
    return dataclasses.replace(CONFIGS[name], **({"size": size} if size else {}))


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "checkpoint-unreadable",
        f"the checkpoint in {folder} cannot be read",
        why=str(error).splitlines()[0] if str(error) else type(error).__name__,
        fix="fetch the checkpoint again, or train it anew",
    )


def seeded_everything(seed: int) -> None:
    """Seed torch's generator; nothing else in refedge draws at random."""
    torch.manual_seed(seed)
