"""Batches of RefShapes as tensors; batch ``i`` of a recipe is a function of ``i`` alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..data.refshapes.dataset import RefShapes, Sample
from ..data.refshapes.expressions import words
from ..data.refshapes.scene import COLOURS, PATTERNS, SHAPES, SIZES
from ..models.tokenizers import word_level
from .recipe import MIXTURE, Recipe

ATTRIBUTES = (SHAPES, COLOURS, PATTERNS, SIZES)


@dataclass(frozen=True)
class Batch:
    """B expressions about P pictures.

    pixels: [P, S, S, 3] uint8; ids: [B, T] int32; words: [B, T] bool; masks: [B, S, S] bool.
    index:  [B] int64, each expression's picture.
    labels: [P, 4, S, S] uint8: shape, colour, pattern, size of what is seen, 0 for background.
    """

    pixels: Tensor
    ids: Tensor
    words: Tensor
    index: Tensor
    masks: Tensor
    labels: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a model's forward takes."""
        return self.pixels, self.ids, self.words, self.index


def tokenizer() -> Tokenizer:
    """The word-level tokenizer over RefShapes' vocabulary."""
    return word_level(words())


def token_rows(texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """ids [B, T] int32 and words [B, T] bool, cut and padded to the length."""
    ids = torch.zeros(len(texts), length, dtype=torch.int32)
    encode = tokenizer()
    for row, text in zip(ids, texts, strict=True):
        tokens = encode.encode(text).ids[:length]
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    return ids, ids != 0


def meanings() -> Tensor:
    """[V, 4] int64: which shape, colour, pattern, size a token names, from 1; 0 for none."""
    vocabulary = tokenizer().get_vocab()
    table = torch.zeros(len(vocabulary), len(ATTRIBUTES), dtype=torch.long)
    for column, names in enumerate(ATTRIBUTES):
        for value, name in enumerate(names, start=1):
            if name in vocabulary:
                table[vocabulary[name], column] = value
    return table


def collate(samples: list[Sample], length: int) -> Batch:
    """Every expression of every sample, in order."""
    pairs = [(sample, e) for sample in samples for e in sample.expressions]
    ids, valid = token_rows([e.text for _, e in pairs], length)
    counts = torch.tensor([len(s.expressions) for s in samples])
    return Batch(
        pixels=torch.stack([torch.from_numpy(s.image) for s in samples]),
        ids=ids,
        words=valid,
        index=torch.arange(len(samples)).repeat_interleave(counts),
        masks=torch.stack([torch.from_numpy(s.mask(e)) for s, e in pairs]),
        labels=torch.stack([_labels(s) for s in samples]),
    )


def _labels(sample: Sample) -> Tensor:
    table = np.zeros((4, 256), np.uint8)
    for i, thing in enumerate(sample.scene.things, start=1):
        values = (thing.shape, thing.colour, thing.pattern, thing.size)
        for row, (names, value) in enumerate(zip(ATTRIBUTES, values, strict=True)):
            table[row, i] = names.index(value) + 1
    return torch.from_numpy(table[:, sample.things])


def make(step: int, recipe: Recipe, size: int, length: int) -> Batch:
    """The batch of a step."""
    samples = []
    for i in range(step * recipe.scenes, (step + 1) * recipe.scenes):
        families = MIXTURE[i % len(MIXTURE)]
        split = RefShapes("train", difficulty=recipe.difficulty, size=size, families=families)
        samples.append(split[(i + recipe.seed * 7919) % len(split)])
    return collate(samples, length)


def stream(
    recipe: Recipe, size: int, length: int, *, start: int = 0, workers: int = 0
) -> Iterator[Batch]:
    """The batches from a step on, made ahead of time by worker processes if there are any."""
    if workers == 0:
        for step in range(start, recipe.steps):
            yield make(step, recipe, size, length)
        return
    # spawned, not forked: a fork copies the locks of torch's threads as they happen to be
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        ahead: deque[Future[Batch]] = deque()
        for step in range(start, recipe.steps):
            ahead.append(pool.submit(make, step, recipe, size, length))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
