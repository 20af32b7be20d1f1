"""``refedge convert``: public weight files to a checkpoint folder, and what it says of itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...errors import CheckpointError
from ..checkpoint import configuration_named, save_checkpoint
from ..families import family
from ..parts import Network
from ..seeded import seed_weights
from ..tokenizers import kind_of, made_up, tokenizer_in
from .layouts import Filling, files_of, place, read_layout

Files = Sequence[tuple[str, Path]]


def convert(
    files: Files,
    folder: Path,
    *,
    model: str,
    config: Any = None,
    words: Sequence[str] | None = None,
    spare_words: Sequence[str] = (),
    tokenizer: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write a checkpoint of a model with the parts that the files give; the rest is seeded.

    files:     layout and path of each file; no two may fill the same part.
    model:     ``slvit``, or with its configuration ``slvit:paper``.
    config:    a configuration in place of a named one.
    words:     vocabulary for word vectors; without, the first words of their file.
    spare_words: for a stand-in where no file brings the vocabulary.
    tokenizer: folder with the vocabulary, where no file brings it.
    returns:   the card's record of what came from where.
    """
    name, _, configuration = model.partition(":")
    if config is None:
        config = configuration_named(name, configuration or "paper")
    network = family(name).build(config)
    fillings = []
    for layout, path in files:
        say(f"reading {path}")
        fillings.append((layout, path, read_layout(layout, path, network, words)))
    _refuse_overlap(network, fillings)
    seeded = _seeded(network, [f for _, _, f in fillings])
    if seeded:
        say(f"seeding {sum(seeded.values())} parameters that no file gives")
        seed_weights(network, seed)
    for _, path, filling in fillings:
        place(network, filling, path)
    record: dict[str, Any] = {
        "converted": [
            {"layout": layout, "files": files_of(layout, path)} | _share(network, filling)
            for layout, path, filling in fillings
        ],
        "seeded": seeded,
    }
    chosen, kind = _tokenizer(network, [f for _, _, f in fillings], tokenizer, spare_words)
    save_checkpoint(folder, name, network.eval(), chosen, training=record, tokens=kind, half=False)
    return record


def _share(network: Network, filling: Filling) -> dict[str, Any]:
    filled = [k for k in network.state_dict() if re.fullmatch(filling.covers, k)]
    modules = sorted({k.split(".")[0] for k in filled})
    return {"tensors": len(filled), "modules": modules} | filling.notes


def _seeded(network: Network, fillings: Sequence[Filling]) -> dict[str, int]:
    """Parameters that no file gives, by the first name of their module."""
    counts: Counter[str] = Counter()
    for name, parameter in network.named_parameters():
        if not any(re.fullmatch(f.covers, name) for f in fillings):
            counts[name.split(".")[0]] += parameter.numel()
    return dict(counts)


def _refuse_overlap(network: Network, fillings: Sequence[tuple[str, Path, Filling]]) -> None:
    taken: dict[str, Path] = {}
    for _, path, filling in fillings:
        for name in network.state_dict():
            if re.fullmatch(filling.covers, name) and taken.setdefault(name, path) is not path:
                raise CheckpointError(
                    "convert-overlap",
                    f"{taken[name]} and {path} both give {name}",
                    why="every part of a model comes from one file",
                    fix="leave one of them out",
                )


def _tokenizer(
    network: Network, fillings: Sequence[Filling], folder: Path | None, spare: Sequence[str]
) -> tuple[Tokenizer, str]:
    """The tokenizer of the files, or of the folder, or a stand-in; and its name in the card."""
    size = network.config.vocabulary
    found = [f.tokenizer for f in fillings] if folder is None else [tokenizer_in(folder)]
    tokenizer = next((t for t in found if t is not None), None)
    if tokenizer is None and folder is None:
        return made_up(network.tokens, spare, size)
    largest = -1 if tokenizer is None else max(tokenizer.get_vocab().values())
    if tokenizer is None or largest >= size:
        raise CheckpointError(
            "convert-vocabulary",
            f"{folder or 'the vocabulary of these files'} is none for {type(network).__name__}",
            why=f"the model knows {size} ids, the vocabulary has {largest + 1}",
            fix="give a folder with vocab.txt, or vocab.json and merges.txt, of these weights",
        )
    return tokenizer, kind_of(tokenizer)
