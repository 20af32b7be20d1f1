"""The face of the runtime: load a bundle, segment what an expression means.

    segmenter = refedge.load("slvit.refedge")
    mask = segmenter.segment("street.jpg", "the dog left of the bike")

The same code runs on every backend; a backend only runs graphs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import InputError
from .backends.choose import choose_backend
from .backends.protocol import Arrays, Backend
from .bundle import Bundle, open_bundle
from .cache import ArrayCache
from .manifest import Manifest
from .masks import Mask, Timings, to_mask
from .preprocess import Photo, open_photo, to_pixels
from .tokenizer import ExpressionTokenizer, Tokens

_TEXT_CACHE = 64 << 20  # bytes


def load(
    path: str | Path,
    *,
    plan: str = "fp32",
    backend: str = "auto",
    text: str | None = None,
    threads: int | None = None,
    dialect: str | None = None,
) -> Segmenter:
    """Open a bundle, verify it, and make one of its plans ready to run.

    plan:    precision plan: ``fp32`` or one of ``manifest.plans``.
    backend: ``auto``, ``onnxruntime``, ``onnxruntime:cuda``, ``onnxruntime:tensorrt``, ``tensorrt``
             (``docs/runtime.md``).
    text:    a backend for the text part alone: ``onnxruntime`` leaves the GPU to the others.
    threads: per operator, on the CPU; None for the backend's own choice.
    dialect: run this dialect of the plan; None for the backend's best on this processor.
    Raises BundleError for a missing or damaged bundle, BackendError for a runtime that is missing,
    EngineError for engines that are missing, damaged or another machine's.
    """
    if threads is not None and threads < 1:
        raise InputError(
            "threads-range",
            f"{threads} threads were asked for",
            why="at least 1 works",
            fix="give 1 or more",
        )
    bundle = open_bundle(path)

    def chosen(name: str) -> Backend:
        return choose_backend(name, bundle, plan, threads=threads, dialect=dialect)

    return Segmenter(bundle, plan, chosen(backend), None if text is None else chosen(text))


class Segmenter:
    """One plan of one bundle on one backend; the text part may have another.

    Not for use from several threads at once: each takes a segmenter of its own, and those of one
    bundle share the weights on a GPU.
    """

    def __init__(
        self, bundle: Bundle, plan: str, backend: Backend, text: Backend | None = None
    ) -> None:
        self.bundle, self.plan, self.backend = bundle, plan, backend
        manifest = bundle.manifest
        self.dialect = bundle.dialect(backend.dialects(plan), plan)
        self._parts = {}
        for part in manifest.parts:
            runs = text if text is not None and part.name == "text" else backend
            graphs = bundle.dialect(runs.dialects(plan), plan).graphs
            self._parts[part.name] = runs.load(bundle.file(graphs[part.name]), part)
        tokenizer_file = bundle.file(manifest.tokenizer.file)
        self._tokenizer = ExpressionTokenizer(tokenizer_file.read_bytes(), manifest.tokenizer)
        self._texts = ArrayCache(_TEXT_CACHE)
        self._largest = self._parts["mask"].largest

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    def segment(self, image: Photo, expression: str) -> Mask:
        """The mask of one expression in one picture."""
        return self.scene(image).segment([expression])[0]

    def scene(self, image: Photo) -> Scene:
        """A picture that several expressions will be asked of; what it costs is paid once."""
        started = time.perf_counter()
        photo = open_photo(image)
        pixels = to_pixels(photo, self.manifest.preprocess)
        preprocess_ms = _since(started)
        started = time.perf_counter()
        features = self.image(pixels[None])
        return Scene(self, photo, features, preprocess_ms, _since(started))

    def tokenize(self, expression: str) -> Tokens:
        """ids and words of an expression, as the model's own tokenizer makes them."""
        return self._tokenizer.encode(expression)

    def text(self, tokens: Tokens) -> tuple[Arrays, bool]:
        """The text part's outputs (batch of one), and whether they came from the cache."""
        key = tokens.ids.tobytes()
        held = self._texts.get(key)
        if held is not None:
            return held, True
        products = self.run_text(tokens.ids[None], tokens.words[None])
        self._texts.put(key, products)
        return products, False

    def run_text(self, ids: npt.NDArray[np.int32], words: npt.NDArray[np.bool_]) -> Arrays:
        """Run the text part, without the cache: ids and words [B, T] to what ``logits`` takes."""
        return {**self._parts["text"].run({"ids": ids, "words": words}), "words": words}

    def image(self, pixels: npt.NDArray[np.uint8]) -> Arrays:
        """What ``logits`` takes of pictures [P, h, w, 3]; P at most the profile's largest batch.

        The image part's outputs, or the pixels themselves in a model without one.
        """
        part = self._parts.get("image")
        return {"pixels": pixels} if part is None else part.run({"pixels": pixels})

    def logits(
        self, images: Arrays, texts: Sequence[Arrays], index: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """Logits [B, h, w] for the outputs of ``image`` and B outputs of ``text``.

        index: each text's picture; None where all are about the first.
        """
        where = np.zeros(len(texts), np.int32) if index is None else np.asarray(index, np.int32)
        rows = []
        for start in range(0, len(texts), self._largest):
            chunk = texts[start : start + self._largest]
            picked = where[start : start + self._largest]
            inputs: dict[str, npt.NDArray[np.generic]] = (
                {**images, "image_index": picked}
                if "image" in self._parts
                else {"pixels": images["pixels"][picked]}
            )
            inputs |= {
                t.name: np.concatenate([text[t.name] for text in chunk])
                for t in self.manifest.part("mask").inputs
                if t.name not in inputs
            }
            rows.append(self._parts["mask"].run(inputs)["logits"])
        return np.concatenate(rows).astype(np.float32, copy=False)


class Scene:
    """One picture, prepared; the image part's features are kept."""

    def __init__(
        self,
        segmenter: Segmenter,
        image: Image.Image,
        features: Arrays,
        preprocess_ms: float,
        image_ms: float,
    ) -> None:
        self.image = image
        self._segmenter = segmenter
        self._features = features
        self._preprocess_ms = preprocess_ms
        self._image_ms = image_ms

    def segment(self, expressions: Sequence[str]) -> list[Mask]:
        """One mask per expression, in one batch; shared stages are divided among the masks."""
        if isinstance(expressions, str):
            expressions = [expressions]
        if not expressions:
            return []
        segmenter, count = self._segmenter, len(expressions)
        started = time.perf_counter()
        tokens = [segmenter.tokenize(e) for e in expressions]
        tokenize_ms = _since(started)
        texts, text_ms, cached = [], [], []
        for token in tokens:
            started = time.perf_counter()
            products, hit = segmenter.text(token)
            text_ms.append(_since(started))
            texts.append(products)
            cached.append(hit)
        started = time.perf_counter()
        logits = segmenter.logits(self._features, texts)
        mask_ms = _since(started)
        manifest = segmenter.manifest
        frame = manifest.preprocess.frame(self.image.size)
        masks = []
        for i, expression in enumerate(expressions):
            started = time.perf_counter()
            array, score = to_mask(logits[i], self.image.size, manifest.postprocess, frame)
            timings = Timings(
                preprocess=self._preprocess_ms / count,
                tokenize=tokenize_ms / count,
                text=text_ms[i],
                image=self._image_ms / count,
                mask=mask_ms / count,
                postprocess=_since(started),
                text_cached=cached[i],
            )
            masks.append(Mask(expression, array, score, logits[i], self.image, timings))
        return masks


def _since(started: float) -> float:
    """Milliseconds since a ``perf_counter`` reading."""
    return (time.perf_counter() - started) * 1e3
