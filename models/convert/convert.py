"""``refedge convert``: public weight files to a checkpoint that says what came from where."""

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
from ..tokenizers import STAND_IN, kind_of, made_up, tokenizer_in
from .layouts import Filling, files_of, home, place, read_layout


def convert(
    files: Sequence[tuple[str, Path]],
    folder: Path,
    *,
    model: str | None = None,
    config: Any = None,
    words: Sequence[str] | None = None,
    spare_words: Sequence[str] = (),
    tokenizer: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write a checkpoint of a model with the parts that the files give; the rest is seeded.

    files:       layout and path of each file; no two may fill the same part.
    model:       ``slvit``, or with its configuration ``slvit:paper``; None for the first layout's.
    config:      a configuration in place of a named one.
    words:       vocabulary for word vectors; None for the first words of their file.
    spare_words: for a stand-in where no file brings the vocabulary.
    tokenizer:   folder with the vocabulary, where no file brings it.
    returns:     the card's record of what came from where.
    """
    _check_target(folder)
    name, _, configuration = (model or home(files[0][0])).partition(":")
    if config is None:
        config = configuration_named(name, configuration or "paper")
    network = family(name).build(config)
    fillings: list[Filling] = []
    for layout, path in files:
        say(f"reading {path}")
        fillings.append(read_layout(layout, path, network, words))
        place(network, fillings[-1], path)
    _check_overlap(network, [path for _, path in files], fillings)
    chosen, kind = _tokenizer(network, fillings, tokenizer, spare_words)
    if kind == STAND_IN:
        say("no vocabulary was given: expressions get a stand-in, made up and stamped as such")
    seeded = _seeded(network, fillings)
    if seeded:
        say(f"seeding {sum(seeded.values()):,} parameters that no file gives")
        seed_weights(network, seed)
        for (_, path), filling in zip(files, fillings, strict=True):
            place(network, filling, path)
    record: dict[str, Any] = {
        "converted": [
            {"layout": layout, "files": files_of(layout, path)} | _share(network, filling)
            for (layout, path), filling in zip(files, fillings, strict=True)
        ],
        "seeded": seeded,
    }
    try:
        save_checkpoint(
            folder, name, network.eval(), chosen, training=record, tokens=kind, half=False
        )
    except OSError as error:
        raise _unwritable(folder, error.strerror or str(error)) from error
    return record


def _share(network: Network, filling: Filling) -> dict[str, Any]:
    """What a file filled: how many tensors, in which modules."""
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


def _check_overlap(network: Network, paths: Sequence[Path], fillings: Sequence[Filling]) -> None:
    for name in network.state_dict():
        giving = [p for p, f in zip(paths, fillings, strict=True) if re.fullmatch(f.covers, name)]
        if len(giving) > 1:
            raise CheckpointError(
                "convert-overlap",
                f"{giving[0]} and {giving[1]} both give {name}",
                why="every part of a model comes from one file",
                fix="leave one of them out",
            )


def _check_target(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise _unwritable(folder, "something is there already")


def _unwritable(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "output-unwritable",
        f"no checkpoint can be written to {folder}",
        why=why,
        fix="choose a new folder where you may write",
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
