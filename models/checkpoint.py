"""A trained model on disk: ``model.safetensors``, ``tokenizer.json`` and ``card.json``.

The card says which architecture and configuration the weights belong to, their SHA-256, what they
were trained on and what they scored; its schema is ``Card``. Weights are read from safetensors
only, never from a pickle, and only after the hash was checked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load, save
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..errors import CheckpointError
from .families import Family, configurations, families, family
from .layouts import from_official
from .own import open_own
from .parts import Network
from .seeded import seed_weights
from .tokenizers import made_up, tokenizer_in

CARD = "card.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
OWN = "own"
SHIPPED = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True)
class Card:
    """What a checkpoint is; ``training`` and ``scores`` are free-form records for people."""

    model: str
    config: dict[str, Any]
    sha256: str
    tokenizer: str
    training: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    schema: int = 1


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with its tokenizer and card (``sha256`` empty if untrained)."""

    model: Network
    tokenizer: Tokenizer
    card: Card


def shipped() -> list[str]:
    """Names of the checkpoints that come with refedge."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{CARD}"))


def locate(name_or_path: str) -> Path:
    """The folder of a shipped checkpoint (a family's name alone is its tiny one), or one's own."""
    for folder in (SHIPPED / name_or_path, Path(name_or_path), SHIPPED / f"{name_or_path}-tiny"):
        if (folder / CARD).is_file():
            return folder
    raise CheckpointError(
        "checkpoint-missing",
        f"there is no checkpoint called {name_or_path!r}",
        why=f"shipped are {', '.join(shipped()) or 'none'}; a folder needs a {CARD}",
        fix="name a shipped checkpoint or a folder that `refedge train` has written",
    )


def load_card(folder: Path) -> Card:
    """The card alone, without the weights."""
    try:
        return msgspec.json.decode(_read(folder / CARD), type=Card)
    except (msgspec.DecodeError, ValueError) as error:
        raise _unreadable(folder / CARD, error) from error


def plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON holds it."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))
    return found


def load_checkpoint(name_or_path: str) -> Loaded:
    """Read, verify and build; the weights must fit the card's configuration exactly."""
    folder = locate(name_or_path)
    card = load_card(folder)
    kind = family(card.model)
    try:
        config = msgspec.convert(card.config, kind.config_type)
    except msgspec.ValidationError as error:
        raise _unreadable(folder / CARD, error) from error
    raw = _read(folder / WEIGHTS)
    digest = hashlib.sha256(raw).hexdigest()
    if digest != card.sha256:
        raise CheckpointError(
            "checkpoint-hash",
            f"{folder / WEIGHTS} is not the file its card describes",
            why=f"its sha256 is {digest[:16]}…, the card says {card.sha256[:16]}…",
            fix="fetch the checkpoint again, or train it anew",
        )
    model = kind.build(config)
    fit(model, _parse(folder / WEIGHTS, raw))
    return Loaded(model.eval(), _tokenizer(folder / TOKENIZER), card)


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(_read(path).decode())
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for what it cannot parse
        raise _unreadable(path, error) from error


def fit(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict whose names and shapes must be the model's; every other is named."""
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
    """The state dict for disk: matrices and kernels in float16, vectors as they are."""
    state = model.state_dict()
    return {
        name: (t.half() if t.ndim > 1 and t.is_floating_point() else t).contiguous()
        for name, t in state.items()
    }


def save_checkpoint(
    folder: Path,
    name: str,
    model: Network,
    tokenizer: Tokenizer,
    *,
    training: dict[str, Any],
    tokens: str = "word-level",
    half: bool = True,
) -> Path:
    """Write a checkpoint folder; each file appears whole or not at all.

    name:   of the family that the model is of.
    tokens: what the card calls the tokenizer.
    half:   matrices in float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = save(compact(model) if half else dict(model.state_dict()))
    config = plain(model.config)
    card = Card(name, config, hashlib.sha256(raw).hexdigest(), tokens, training)
    write_atomically(folder / WEIGHTS, raw)
    write_atomically(folder / TOKENIZER, tokenizer.to_str(pretty=True).encode())
    write_card(folder, card)
    return folder


def write_card(folder: Path, card: Card) -> None:
    """Write the card, indented, for people to read."""
    write_atomically(
        folder / CARD, msgspec.json.format(msgspec.json.encode(card), indent=1) + b"\n"
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the path, then rename over it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    os.replace(beside, path)


def open_model(
    name: str,
    words: Sequence[str],
    *,
    size: int | None = None,
    weights: Path | None = None,
    seed: int = 0,
) -> Loaded:
    """A checkpoint by name or folder, a configuration such as ``slvit:paper``, or one's own.

    One's own is ``FILE.py:FUNCTION``, see ``models/own.py``; ``clipseg:FOLDER`` is a CLIPSeg that
    transformers has saved, with its ``vocab.json`` and ``merges.txt``.

    words:   vocabulary for the tokenizer of a bare configuration.
    size:    pixels per side; None for the configuration's own.
    weights: safetensors in the official layout for a bare configuration; without, seeded weights.
    """
    kind, _, configuration = name.rpartition(":")
    own = not kind or kind == "clipseg" or kind.endswith(".py")
    if own and weights is not None:
        raise CheckpointError(
            "config-unknown",
            f"{name!r} has weights of its own",
            why="--weights go with a bare configuration",
            fix=f"name one of {', '.join(configurations())}",
        )
    if kind.endswith(".py"):
        model, tokenizer, digest = open_own(name)
        return Loaded(model, tokenizer, Card(OWN, plain(model.config), digest, OWN))
    if kind == "clipseg":
        return _clipseg(Path(configuration), size, words)
    if not kind:
        return _at_size(load_checkpoint(name), size)
    config = configuration_named(kind, configuration, size)
    model = family(kind).build(config).eval()
    digest = ""
    if weights is not None:
        raw = _read(weights)
        digest = hashlib.sha256(raw).hexdigest()
        fit(model, from_official(_parse(weights, raw)))
    else:
        seed_weights(model, seed)
    tokenizer, tokens = made_up(model.tokens, words, config.vocabulary)
    return Loaded(model, tokenizer, Card(kind, plain(config), digest, tokens))


def _clipseg(folder: Path, size: int | None, words: Sequence[str]) -> Loaded:
    """CLIPSeg from a folder; without a vocabulary in it, a stand-in."""
    from .clipseg import from_folder

    model = from_folder(folder) if size is None else from_folder(folder, size)
    tokenizer, kind = tokenizer_in(folder), "clip"
    if tokenizer is None:
        tokenizer, kind = made_up("clip", words, model.config.vocabulary)
    digest = hashlib.sha256(_read(folder / WEIGHTS)).hexdigest()
    source = {"from": "transformers, save_pretrained"}
    return Loaded(model, tokenizer, Card("clipseg", plain(model.config), digest, kind, source))


def configuration_named(kind: str, name: str, size: int | None = None) -> Any:
    """A named configuration of a family, at another size if one is given."""
    if kind not in families() or name not in family(kind).configs:
        raise CheckpointError(
            "config-unknown",
            f"there is no configuration {kind}:{name}",
            why=f"known are {', '.join(configurations())}",
            fix="choose one of these",
        )
    return _resized(family(kind), family(kind).configs[name], size)


def _resized(kind: Family, config: Any, size: int | None) -> Any:
    try:
        return config if size is None else replace(config, size=size)
    except ValueError as error:
        raise CheckpointError(
            "config-size",
            f"{kind.build.__name__} cannot be built for {size} pixels",
            why=str(error),
            fix="choose a multiple of 32 of at least 96",
        ) from error


def _at_size(loaded: Loaded, size: int | None) -> Loaded:
    if size is None or size == loaded.model.config.size:
        return loaded
    kind = family(loaded.card.model)
    model = kind.build(_resized(kind, loaded.model.config, size))
    fit(model, loaded.model.state_dict())
    card = replace(loaded.card, config=plain(model.config))
    return replace(loaded, model=model.eval(), card=card)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _parse(path: Path, raw: bytes) -> dict[str, Tensor]:
    try:
        return load(raw)
    except SafetensorError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "checkpoint-unreadable",
        f"{path} cannot be read as a checkpoint",
        why=str(error).splitlines()[0] if str(error) else type(error).__name__,
        fix="fetch it again, or train it anew",
    )
