"""What the fused operators compute, in NumPy and float64: the definition that all faces meet.

Shapes: B expressions, N pixels, T words, H heads, C channels. ``words`` [B, T] is true for words;
padded ones take no part. ``../docs/folding.md`` has the algebra of the folded operands.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Array = npt.NDArray[Any]
EPSILON = 1e-5


def softmax(scores: Doubles, axis: int) -> Doubles:
    """Exponentials over their sum; scores may be minus infinity, not all of a row."""
    powers = np.exp(scores - scores.max(axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis, keepdims=True), np.float64)


def _masked(scores: Doubles, words: Array) -> Doubles:
    """Minus infinity at padded words; without any word, all of them count alike."""
    empty = ~words.any(axis=tuple(range(1, words.ndim)), keepdims=True)
    return np.where(words | empty, np.where(empty, 0.0, scores), -np.inf)


def cross_attention(x: Array, keys: Array, values: Array, words: Array, offset: Array) -> Doubles:
    """Pixels attend to words, heads folded into keys and values.

    x [B, N, C]; keys [B, C, H, T] with the query's projection and the scale applied; values
    [B, H, T, D] with the output's projection applied; offset [B, H, T], the query's bias times the
    keys, zeros without one. Returns [B, N, D]: the sum over the heads.
    """
    wide, k, v = (np.asarray(a, np.float64) for a in (x, keys, values))
    scores = np.einsum("bnc,bcht->bnht", wide, k) + np.asarray(offset, np.float64)[:, None]
    weights = softmax(_masked(scores, words[:, None, None]), 3)
    return np.asarray(np.einsum("bnht,bhtd->bnd", weights, v))


def norm_attention(
    query: Array,
    keys: Array,
    values: Array,
    words: Array,
    first: Array,
    second: Array,
    epsilon: float = EPSILON,
) -> tuple[Doubles, Doubles]:
    """Attention to words, instance norm, tanh gate: the text branch of SLViT, unfolded.

    query [B, C, N], normalised; keys [B, T, C], scaled; values [B, C, T], projected; first and
    second [C, C], the gate's maps. Returns the gated map [B, C, N] and how relevant each pixel is
    [B, N], the largest weight of a word.
    """
    scores = np.asarray(keys, np.float64) @ np.asarray(query, np.float64)
    weights = softmax(_masked(scores, words[:, :, None]), 1)
    found = np.asarray(values, np.float64) @ weights
    found = (found - found.mean(2, keepdims=True)) / np.sqrt(found.var(2, keepdims=True) + epsilon)
    opened = np.asarray(second, np.float64) @ np.maximum(np.asarray(first, np.float64) @ found, 0.0)
    return np.tanh(opened) * found, weights.max(1)


def mutual_attention(
    keys: Array, values: Array, words: Array, seen_keys: Array, seen_values: Array
) -> tuple[Doubles, Doubles]:
    """One score matrix, softmax over pixels and over words, the product of what both attend to.

    keys [B, H, T, d], scaled, and values [B, H, T, d] of the words; seen_keys [B, H, d, N] and
    seen_values [B, H, N, d] of the pixels. Returns the product [B, T, N], zero at padded words, and
    the weights of the words [B, T, N], the mean over the heads.
    """
    k, v, sk, sv = (np.asarray(a, np.float64) for a in (keys, values, seen_keys, seen_values))
    scores, valid = k @ sk, words[:, None, :, None]
    seen = softmax(scores, 3) @ sv
    told = softmax(_masked(scores, valid), 2)
    pairs = np.where(valid, seen @ v.transpose(0, 1, 3, 2), 0.0)
    share = (v.shape[1] * v.shape[3]) ** -0.5
    product = np.einsum("bhst,bhtn->bsn", pairs * share, told)
    return product, told.mean(1)
