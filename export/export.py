"""``refedge export``: a checkpoint to a bundle, with its parity measured on the way."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Collection
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx

from ..models.checkpoint import Loaded, plain
from ..models.parts import Framing, Part, Port
from ..models.tokenizers import STAND_IN, rules
from ..runtime.manifest import (
    DialectSpec,
    Manifest,
    PartSpec,
    PostprocessSpec,
    PreprocessSpec,
    TensorSpec,
    TokenizerSpec,
)
from .bundle import BundleWriter
from .dialects import mark
from .from_torch import to_onnx
from .heads import fold_heads
from .lint import require_clean
from .ort import for_ort
from .parity import measure
from .weights import split_weights
from .words import Fold, fold_words

PROFILE = (1, 1, 16)
REWRITES = ("norm", "heads", "squeeze", "ort")
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy", "tokenizers")


def export(
    loaded: Loaded,
    target: Path,
    *,
    say: Callable[[str], None] = print,
    rewrites: Collection[str] = REWRITES,
    compared: bool = True,
) -> Manifest:
    """Trace every part, check it, measure parity, and write ``target`` (a ``.refedge`` folder).

    rewrites: which of ``REWRITES``, described in ``../docs/folding.md``, may be applied where they
    are estimated to pay; with fewer, graphs to compare with.
    compared: measure parity; without it the manifest has none, where another machine has measured
    it and time is short.

    Raises ExportError for a graph that breaks a rule or a parity bar; nothing is left behind.
    """
    parts = loaded.model.parts()
    with BundleWriter(target) as writer:
        canonical: dict[str, str] = {}
        ort: dict[str, str] = {}
        weights: list[str] = []
        models = {}
        for part in parts:
            say(f"tracing {part.name}")
            models[part.name] = to_onnx(part, squeeze="squeeze" in rewrites)
        folds = fold_heads(models) if "heads" in rewrites else []
        folds += fold_words(models) if "norm" in rewrites else []
        specs = tuple(_spec(part, models[part.name]) for part in parts)
        for part in parts:
            model = models.pop(part.name)
            require_clean(model)
            name, content = split_weights(model)
            writer.add(f"graphs/{name}", content)
            weights.append(f"graphs/{name}")
            canonical[part.name] = _add_graph(writer, model, part.name)
            dialect = mark(model, "ort", "fp32")
            if "ort" in rewrites:
                for_ort(dialect)
            ort[part.name] = _add_graph(writer, dialect, f"{part.name}.ort.fp32")
        parity: dict[str, Any] = {}
        if compared:
            say("measuring parity")
            parity = measure(
                loaded.model,
                specs,
                {name: writer.folder / file for name, file in canonical.items()},
                {"ort fp32": {name: writer.folder / file for name, file in ort.items()}},
                moved={port for f in folds for port in f.moved},
            )
        writer.add("tokenizer.json", loaded.tokenizer.to_str(pretty=True).encode())
        dialects = (
            DialectSpec("canonical", "fp32", canonical, tuple(weights)),
            DialectSpec("ort", "fp32", ort, tuple(weights)),
        )
        return writer.commit(_manifest(loaded, specs, dialects, parity, folds))


def _add_graph(writer: BundleWriter, model: onnx.ModelProto, stem: str) -> str:
    name = f"graphs/{stem}.onnx"
    writer.add(name, model.SerializeToString(deterministic=True))
    return name


def _manifest(
    loaded: Loaded,
    specs: tuple[PartSpec, ...],
    dialects: tuple[DialectSpec, ...],
    parity: dict[str, Any],
    folds: list[Fold],
) -> Manifest:
    config, framing = loaded.model.config, loaded.model.framing
    rule = rules(loaded.tokenizer)
    stand_in = loaded.card.tokenizer == STAND_IN
    return Manifest(
        model=loaded.card.model,
        config=plain(config),
        preprocess=PreprocessSpec(
            config.size, config.size, framing.resize, framing.filter, framing.fill
        ),
        tokenizer=TokenizerSpec(
            "tokenizer.json",
            words=config.words,
            pad=rule.pad,
            unknown=rule.unknown,
            closed=rule.closed,
            stand_in=stand_in,
            truncation=rule.truncation,
        ),
        postprocess=PostprocessSpec(math.log(framing.threshold / (1.0 - framing.threshold))),
        protocol=_protocol(loaded, framing),
        parts=specs,
        canonical=dialects[0],
        high=loaded.model.high,
        plans={},
        dialects=dialects[1:],
        files={},
        provenance={
            "checkpoint": loaded.card.sha256 or "none: seeded, untrained weights",
            "trained": bool(loaded.card.training) and not loaded.card.training.get("seeded"),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in ("refedge", *_PACKAGES)},
        },
        parity=parity,
        folding=tuple(map(asdict, folds)),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # refedge itself, run from a checkout that was not installed
        return "unknown"


def _protocol(loaded: Loaded, framing: Framing) -> str:
    """How its family is scored; models of RefShapes as RefShapes is."""
    if "recipe" in loaded.card.training:
        return "refshapes"
    return "cris-native" if framing.resize == "letterbox" else "lavt480"


def _spec(part: Part, model: onnx.ModelProto) -> PartSpec:
    """Names and types as the model has them, shapes as the graph does: folding may change one."""
    shapes = {v.name: v.type.tensor_type.shape for v in (*model.graph.input, *model.graph.output)}

    def tensor(port: Port) -> TensorSpec:
        found = tuple(d.dim_param or d.dim_value for d in shapes[port.name].dim)
        return TensorSpec(port.name, port.dtype, found)

    inputs, outputs = (tuple(map(tensor, ports)) for ports in (part.inputs, part.outputs))
    return PartSpec(part.name, inputs, outputs, PROFILE)
