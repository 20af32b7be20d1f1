"""An expression to the ``ids`` and ``words`` a model takes."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ..errors import BundleError, InputError, RefedgeWarning
from .manifest import TokenizerSpec

_LONGEST = 10_000  # characters; far beyond any expression, short enough to tokenize at once


@dataclass(frozen=True)
class Tokens:
    """One encoded expression: ids [T] int32, words [T] bool (false for padding)."""

    ids: npt.NDArray[np.int32]
    words: npt.NDArray[np.bool_]


class ExpressionTokenizer:
    """A ``tokenizer.json`` with the model's own rules for length and unknown words."""

    def __init__(self, raw: bytes, spec: TokenizerSpec) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(raw.decode())
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(
                "bundle-tokenizer",
                "the bundle's tokenizer cannot be read",
                why=str(error),
                fix="export the model again",
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._spec = spec

    def encode(self, expression: str) -> Tokens:
        """Encode, cut to the model's length with a warning, and pad."""
        if not isinstance(expression, str) or not expression.strip():
            raise InputError(
                "expression-empty",
                f"the expression {expression!r} says nothing",
                why="a mask is made for a phrase such as 'the red circle'",
                fix="describe what to look for",
            )
        if len(expression) > _LONGEST:
            raise InputError(
                "expression-too-long",
                f"the expression has {len(expression)} characters",
                why=f"more than {_LONGEST} is not an expression; the model reads "
                f"{self._spec.words} tokens",
                fix="give a phrase",
            )
        encoding = self._tokenizer.encode(expression)
        self._check_unknown(expression, encoding.ids, encoding.offsets)
        ids = encoding.ids
        if all(encoding.special_tokens_mask):
            raise InputError(
                "expression-empty",
                f"no word is left of the expression {expression!r}",
                why="the tokenizer dropped every character of it",
                fix="describe what to look for in words",
            )
        if len(ids) > self._spec.words:
            warnings.warn(
                f"the expression was cut from {len(ids)} to {self._spec.words} tokens: "
                f"{expression[:60]!r}",
                RefedgeWarning,
                stacklevel=3,
            )
            last = ids[-1]
            ids = ids[: self._spec.words]
            if self._spec.truncation == "keep-last":
                ids[-1] = last
        padded = np.full(self._spec.words, self._spec.pad, np.int32)
        padded[: len(ids)] = ids
        return Tokens(padded, np.arange(self._spec.words) < len(ids))

    def _check_unknown(
        self, expression: str, ids: list[int], offsets: list[tuple[int, int]]
    ) -> None:
        unknown = [
            expression[a:b]
            for i, (a, b) in zip(ids, offsets, strict=True)
            if i == self._spec.unknown
        ]
        if not unknown:
            return
        unknown = list(dict.fromkeys(unknown))[:8]
        if not self._spec.closed:
            warnings.warn(
                f"the vocabulary lacks {', '.join(map(repr, unknown))}",
                RefedgeWarning,
                stacklevel=4,
            )
            return
        known = sorted(w for w in self._tokenizer.get_vocab() if w[:1].isalpha())
        near = {n for w in unknown for n in difflib.get_close_matches(w.lower(), known, 2, 0.6)}
        raise InputError(
            "expression-unknown-words",
            f"the model has never seen {', '.join(map(repr, unknown))}",
            why=f"its vocabulary is closed: {len(known)} words",
            fix=f"did you mean {', '.join(sorted(near))}?"
            if near
            else f"use its words, such as {', '.join(known[:12])}",
        )
