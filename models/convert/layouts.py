"""What each public file gives a model: tensors under the model's names, checked by name.

A layout knows the format of its file, the names in it, and which part of a model it fills; that
part is looked up by its class, so that a layout serves every model that has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer
from torch import nn
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPVisionConfig

from ...errors import CheckpointError
from ..checkpoint import fit
from ..clip import resize_positions
from ..cm_masksd import Clip
from ..darknet import Darknet
from ..deeplab import DeepLab
from ..lavt import LAVT
from ..parts import Network
from ..recurrent import WordVectors
from ..slvit import Encoder, SLViT
from ..swin import Swin
from ..tokenizers import space_split, tokenizer_in
from . import names
from .darknet import read_darknet
from .glove import read_glove
from .hugging_face import read_folder, weights_of
from .weights import State, digest, read_weights

M = TypeVar("M", bound=nn.Module)
_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps"),
)

_POSITIONS = ("position_embedding.weight", "attnpool.positional_embedding")


@dataclass(frozen=True)
class Filling:
    """What one file gives.

    state:     tensors under the model's names.
    covers:    pattern of the model's names that must come from this file, all of them.
    tokenizer: if the file brings its vocabulary.
    notes:     what a card should say beside the file's name and hash.
    """

    state: State
    covers: str
    tokenizer: Tokenizer | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def read_layout(layout: str, path: Path, model: Network, words: Sequence[str] | None) -> Filling:
    """A file of a layout, for a model; words are the vocabulary for word vectors."""
    if layout == "glove":
        return _glove(path, model, words)
    readers: dict[str, Callable[[Path, Network], Filling]] = {
        "bert": _bert,
        "clip": _clip,
        "darknet": _darknet,
        "deeplab": _deeplab,
        "lavt": _lavt,
        "mscan": _mscan,
        "slvit": _slvit,
        "swin": _swin,
    }
    if layout not in readers:
        raise CheckpointError(
            "convert-layout",
            f"there is no layout called {layout!r}",
            why=f"known are {', '.join(sorted([*readers, 'glove']))}",
            fix="choose one of these; docs/weights.md says which file is which",
        )
    return readers[layout](path, model)


def home(layout: str) -> str:
    """The model that a layout's file is for when nobody says."""
    homes = {
        "clip": "cm_masksd",
        "darknet": "lts",
        "deeplab": "step",
        "lavt": "lavt",
        "mscan": "slvit",
        "slvit": "slvit",
        "swin": "lavt",
    }
    if layout not in homes:
        raise CheckpointError(
            "convert-model",
            f"a file of the layout {layout!r} does not say which model it is for",
            why="more than one model has a place for it",
            fix="name one with --model, such as --model slvit",
        )
    return homes[layout]


def place(model: Network, filling: Filling, path: Path) -> None:
    """Put a file's tensors into a model; every name that does not fit is named."""
    own = model.state_dict()
    covered = {name for name in own if re.fullmatch(filling.covers, name)}
    stray = [name for name in filling.state if name in own and name not in covered]
    if stray:
        raise _mismatch(model, path, f"{len(stray)} unexpected: {', '.join(stray[:5])}")
    try:
        fit(model, {k: v for k, v in own.items() if k not in covered} | filling.state)
    except CheckpointError as error:
        raise _mismatch(model, path, error.why) from error


def _mismatch(model: Network, path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "checkpoint-mismatch",
        f"{path} does not fit {type(model).__name__}",
        why=why,
        fix="give the file of this layout, size and configuration",
    )


def files_of(layout: str, path: Path) -> dict[str, str]:
    """The files that a layout reads at a path, and their SHA-256."""
    file = weights_of(path) if path.is_dir() else path
    return {file.name: digest(file)}


def _part(model: Network, kind: type[M], layout: str) -> tuple[str, M]:
    """Prefix and module of the part of a class; a model that has none is refused."""
    for name, module in model.named_modules():
        if isinstance(module, kind):
            return name + "." if name else "", module
    raise CheckpointError(
        "convert-part",
        f"{type(model).__name__} has no place for a file of the layout {layout}",
        why=f"no {kind.__name__} is in it",
        fix="name a model or a configuration that has one",
    )


def _slvit(path: Path, model: Network) -> Filling:
    _part(model, SLViT, "slvit")
    return Filling(names.slvit(read_weights(path, "model")["model"]), ".*")


def _lavt(path: Path, model: Network) -> Filling:
    _part(model, LAVT, "lavt")
    groups = read_weights(path, "model", "bert_model")
    return Filling(names.lavt(groups["model"], groups.get("bert_model")), ".*")


def _mscan(path: Path, model: Network) -> Filling:
    prefix, _ = _part(model, Encoder, "mscan")
    state = names.mscan(read_weights(path, "state_dict")["state_dict"])
    return Filling(names.under(prefix, state), rf"{prefix}(?!.*\.fusion\.).*")


def _swin(path: Path, model: Network) -> Filling:
    prefix, _ = _part(model, Swin, "swin")
    state = names.swin(read_weights(path, "model")["model"])
    return Filling(
        names.under(prefix, state), rf"{prefix}(patch_embed|.*\.(blocks|downsample))\..*"
    )


def _darknet(path: Path, model: Network) -> Filling:
    prefix, module = _part(model, Darknet, "darknet")
    return Filling(names.under(prefix, read_darknet(path, module)), f"{prefix}.*")


def _deeplab(path: Path, model: Network) -> Filling:
    prefix, _ = _part(model, DeepLab, "deeplab")
    return Filling(
        names.under(prefix, names.deeplab(read_weights(path, "model")["model"])), f"{prefix}.*"
    )


def _glove(path: Path, model: Network, words: Sequence[str] | None) -> Filling:
    prefix, module = _part(model, WordVectors, "glove")
    found = read_glove(path, module.num_embeddings, module.embedding_dim, words)
    return Filling(
        {f"{prefix}weight": found.table},
        f"{prefix}.*",
        space_split(found.words),
        {"words": len(found.words), "absent": list(found.absent)},
    )


def _bert(path: Path, model: Network) -> Filling:
    """A folder of Hugging Face; ``bert-base-uncased`` and its kin."""
    prefix, module = _part(model, BertModel, "bert")
    fields = ("vocab_size", "max_position_embeddings", "type_vocab_size", "intermediate_size")
    state = read_folder(path, {"": (module.config, BertConfig(), (*_SIZES, *fields))})
    return Filling(names.under(prefix, names.bert(state)), f"{prefix}.*", tokenizer_in(path))


def _clip(path: Path, model: Network) -> Filling:
    """OpenAI's archive, or a folder of Hugging Face."""
    prefix, module = _part(model, Clip, "clip")
    if path.is_dir():
        text = (module.text_model.config, CLIPTextConfig(), (*_SIZES, "vocab_size"))
        settings = {"text_config": text}
        if hasattr(module, "vision_model"):
            vision = (module.vision_model.config, CLIPVisionConfig(), (*_SIZES, "patch_size"))
            settings["vision_config"] = vision
        state = read_folder(path, settings)
    else:
        state = read_weights(path, "state_dict")["state_dict"]
    state = _fit_positions(names.clip(state), module.state_dict())
    covers = rf"{prefix}(?!visual\.attnpool\.connect\.).*"
    return Filling(names.under(prefix, state), covers, tokenizer_in(path))


def _fit_positions(state: State, own: State) -> State:
    """Places of a picture are interpolated to the model's grid; words keep their first places."""
    fitted = dict(state)
    for name, tensor in state.items():
        if not name.endswith(_POSITIONS) or name not in own:
            continue
        count, grid = len(own[name]), math.isqrt(max(0, len(own[name]) - 1))
        if name.startswith("text_model."):
            fitted[name] = tensor[:count]
        elif grid**2 == count - 1 > 0 and math.isqrt(len(tensor) - 1) ** 2 == len(tensor) - 1 > 0:
            fitted[name] = resize_positions(tensor, grid)
    return fitted
