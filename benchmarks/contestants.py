"""Who takes part in a benchmark: a plan of a bundle, or the PyTorch model it was exported from.

All of them get pixels and tokens from the same preprocessing and the bundle's own tokenizer, so
that what differs is the model's two parts alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import BundleError, CheckpointError
from ..runtime.bundle import Bundle
from ..runtime.manifest import Manifest
from ..runtime.segmenter import Segmenter
from ..runtime.tokenizer import ExpressionTokenizer, Tokens

if TYPE_CHECKING:
    from ..models.checkpoint import Loaded

TORCH = "torch"
SEEDED = "none: seeded, untrained weights"


class Runner(Protocol):
    """A model that is ready to run; batch of one."""

    bundle: Bundle

    def tokenize(self, expression: str) -> Tokens:
        """ids and words of an expression."""

    def text(self, tokens: Tokens) -> Any:
        """The text part's products, computed anew."""

    def recall(self, tokens: Tokens) -> Any:
        """The same, kept from the first time that these tokens were asked for."""

    def image(self, pixels: npt.NDArray[np.uint8]) -> Any:
        """What ``mask`` takes of pixels [h, w, 3]: the image part's features, if there is one."""

    def mask(self, features: Any, tokens: Tokens, products: Any) -> npt.NDArray[np.float32]:
        """Logits [h, w] of what ``image`` and ``text`` gave."""


class PlanRunner:
    """A plan, as ``refedge.load`` runs it."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter
        self.bundle = segmenter.bundle

    def tokenize(self, expression: str) -> Tokens:
        """ids and words of an expression."""
        return self.segmenter.tokenize(expression)

    def text(self, tokens: Tokens) -> Any:
        """The text graph, without the cache."""
        return self.segmenter.run_text(tokens.ids[None], tokens.words[None])

    def recall(self, tokens: Tokens) -> Any:
        """The text graph's outputs through the segmenter's own cache."""
        return self.segmenter.text(tokens)[0]

    def image(self, pixels: npt.NDArray[np.uint8]) -> Any:
        """The image graph, if there is one."""
        return self.segmenter.image(pixels[None])

    def mask(self, features: Any, tokens: Tokens, products: Any) -> npt.NDArray[np.float32]:
        """The mask graph."""
        logits: npt.NDArray[np.float32] = self.segmenter.logits(features, [products])[0]
        return logits


class TorchRunner:
    """PyTorch in inference mode: eager in float32 on the CPU, unless something else is asked for.

    half:   under autocast to float16.
    wrap:   makes another function of a part's module; what that gives is copied, since CUDA graphs
            of torch.compile write their next outputs over it.
    """

    def __init__(
        self,
        loaded: Loaded,
        bundle: Bundle,
        *,
        device: str = "cpu",
        half: bool = False,
        wrap: Callable[[Any], Any] | None = None,
    ) -> None:
        import torch

        self.bundle = bundle
        self._torch, self._device, self._half, self._copied = torch, device, half, bool(wrap)
        self.parts = {part.name: part for part in loaded.model.eval().to(device).parts()}
        made = wrap or (lambda module: module)
        self._run = {name: made(part.module) for name, part in self.parts.items()}
        spec = bundle.manifest.tokenizer
        self._tokenizer = ExpressionTokenizer(bundle.file(spec.file).read_bytes(), spec)
        self._kept: dict[bytes, Any] = {}

    def tokenize(self, expression: str) -> Tokens:
        """ids and words of an expression, by the bundle's tokenizer."""
        return self._tokenizer.encode(expression)

    def text(self, tokens: Tokens) -> Any:
        """What depends on the expression alone."""
        return self.run("text", self.given(tokens))

    def recall(self, tokens: Tokens) -> Any:
        """The same, kept by the ids, as a segmenter keeps them."""
        key = tokens.ids.tobytes()
        if key not in self._kept:
            self._kept[key] = self.text(tokens)
        return self._kept[key]

    def image(self, pixels: npt.NDArray[np.uint8]) -> Any:
        """What depends on the picture alone; the pixels where nothing does."""
        known = {"pixels": self._torch.tensor(pixels[None]).to(self._device)}
        return self.run("image", known) if "image" in self.parts else known

    def mask(self, features: Any, tokens: Tokens, products: Any) -> npt.NDArray[np.float32]:
        """The rest of the model."""
        found = self.run("mask", self.given(tokens) | products | features)["logits"][0]
        logits: npt.NDArray[np.float32] = found.float().cpu().numpy()
        return logits

    def given(self, tokens: Tokens) -> dict[str, Any]:
        """What parts take of an expression about one picture, on the device."""
        arrays = {"ids": tokens.ids[None], "words": tokens.words[None]}
        arrays["image_index"] = np.zeros(1, np.int32)
        made = self._torch.from_numpy
        return {name: made(array).to(self._device) for name, array in arrays.items()}

    def run(self, name: str, known: dict[str, Any]) -> dict[str, Any]:
        """A part's outputs by name."""
        part, torch = self.parts[name], self._torch
        half = torch.autocast(self._device, torch.float16, enabled=self._half)
        with torch.inference_mode(), half:
            found = self._run[name](*(known[port.name] for port in part.inputs))
        outputs = found if isinstance(found, (tuple, list)) else (found,)
        if self._copied:
            outputs = tuple(output.clone() for output in outputs)
        return dict(zip((port.name for port in part.outputs), outputs, strict=True))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Give torch so many threads per operator, and afterwards what it had."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Original:
    """The PyTorch model that a bundle was exported from.

    name:       what ``refedge export`` was given.
    file_bytes: its weights on disk; 0 for a bare configuration, whose weights are seeded.
    """

    name: str
    loaded: Loaded
    file_bytes: int


def open_original(manifest: Manifest, name: str | None = None) -> Original:
    """The model that a bundle was exported from, at the bundle's size.

    name: a checkpoint, a folder or a configuration; None to find it by the bundle's provenance.
    Raises BundleError ``bench-model`` where provenance does not lead to a model that is here, and
    CheckpointError ``bench-checkpoint`` where the named model is another one.
    """
    from ..data.refshapes.expressions import words
    from ..models.checkpoint import WEIGHTS, locate, open_model

    name = name or _find(manifest)
    loaded = open_model(name, words(), size=manifest.preprocess.height)
    _require_same(manifest, name, loaded)
    stored = locate(name) / WEIGHTS if loaded.card.sha256 and ":" not in name else None
    return Original(name, loaded, stored.stat().st_size if stored else 0)


def _find(manifest: Manifest) -> str:
    """A shipped checkpoint of the same hash, or the configuration of seeded weights."""
    from ..models.checkpoint import CARD, SHIPPED, plain, shipped
    from ..models.families import families, family

    wanted = _checkpoint(manifest)
    for name in shipped():
        if json.loads((SHIPPED / name / CARD).read_bytes())["sha256"] == wanted:
            return name
    if wanted == "" and manifest.model in families():
        for name, config in family(manifest.model).configs.items():
            if plain(config) | {"size": manifest.preprocess.height} == manifest.config:
                return f"{manifest.model}:{name}"
    raise BundleError(
        "bench-model",
        "the PyTorch model that this bundle was exported from is not known",
        why="its manifest names "
        + (f"the checkpoint {wanted[:16]}…, which is not shipped" if wanted else "no checkpoint"),
        fix="give --model what was given to `refedge export`, or time without torch: --no-torch",
    )


def _require_same(manifest: Manifest, name: str, loaded: Loaded) -> None:
    from ..models.checkpoint import plain

    wanted, found = _checkpoint(manifest), loaded.card.sha256
    reasons = []
    if manifest.model != loaded.card.model:
        reasons.append(f"the bundle is of a {manifest.model}, this is a {loaded.card.model}")
    if wanted != found:
        here, there = found[:16] or "seeded", (wanted or "")[:16] or "seeded"
        reasons.append(f"its weights are {here}, the bundle's {there}")
    config = plain(loaded.model.config)
    if config != manifest.config:
        keys = sorted(k for k in config if config[k] != manifest.config.get(k))
        reasons.append(f"they differ in {', '.join(keys)}")
    if reasons:
        raise CheckpointError(
            "bench-checkpoint",
            f"{name!r} is not what the bundle was exported from",
            why="; ".join(reasons),
            fix="give --model what was given to `refedge export`, or time without torch: "
            "--no-torch",
        )


def _checkpoint(manifest: Manifest) -> str | None:
    """SHA-256 of the checkpoint; empty for seeded weights; None where the bundle does not say."""
    said = manifest.provenance.get("checkpoint")
    if not isinstance(said, str):
        return None
    return "" if said.startswith("none") else said
