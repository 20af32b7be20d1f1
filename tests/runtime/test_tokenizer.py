from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refedge.errors import BundleError, InputError, RefedgeWarning
from refedge.runtime.manifest import TokenizerSpec
from refedge.runtime.tokenizer import ExpressionTokenizer

WORDS = ("the", "red", "circle", "left", "of")
SPEC = TokenizerSpec("tokenizer.json", words=6, pad=0, unknown=1, closed=True, stand_in=False)


def raw(words: tuple[str, ...] = WORDS) -> bytes:
    """A word-level tokenizer.json written by hand, as the format documents it."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {w: i for i, w in enumerate(words, start=2)}
    record = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    return json.dumps(record).encode()


@pytest.fixture
def tokenizer() -> ExpressionTokenizer:
    return ExpressionTokenizer(raw(), SPEC)


def test_ids_and_words(tokenizer: ExpressionTokenizer) -> None:
    tokens = tokenizer.encode("The RED  circle")
    assert tokens.ids.dtype == np.int32
    assert tokens.ids.tolist() == [2, 3, 4, 0, 0, 0]
    assert tokens.words.tolist() == [True, True, True, False, False, False]


def test_exactly_full(tokenizer: ExpressionTokenizer) -> None:
    assert tokenizer.encode("red red red red red red").words.all()


def test_longer_ones_are_cut_with_a_warning(tokenizer: ExpressionTokenizer) -> None:
    with pytest.warns(RefedgeWarning, match="cut from 7 to 6 tokens"):
        tokens = tokenizer.encode("the red circle left of the circle")
    assert tokens.ids.tolist() == [2, 3, 4, 5, 6, 2]


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\u200b"[:0]])
def test_empty_expressions(tokenizer: ExpressionTokenizer, text: str) -> None:
    with pytest.raises(InputError) as caught:
        tokenizer.encode(text)
    assert caught.value.code == "expression-empty"


def test_something_else_than_text(tokenizer: ExpressionTokenizer) -> None:
    with pytest.raises(InputError):
        tokenizer.encode(None)  # type: ignore[arg-type]


def test_unknown_words_of_a_closed_vocabulary(tokenizer: ExpressionTokenizer) -> None:
    with pytest.raises(InputError) as caught:
        tokenizer.encode("the rde zebra")
    assert caught.value.code == "expression-unknown-words"
    assert "'rde', 'zebra'" in caught.value.what
    assert "red" in caught.value.fix


def test_unknown_words_of_an_open_vocabulary_warn() -> None:
    from dataclasses import replace

    tokenizer = ExpressionTokenizer(raw(), replace(SPEC, closed=False))
    with pytest.warns(RefedgeWarning, match="lacks 'zebra'"):
        assert tokenizer.encode("the zebra").ids.tolist() == [2, 1, 0, 0, 0, 0]


def test_far_too_long(tokenizer: ExpressionTokenizer) -> None:
    with pytest.raises(InputError) as caught:
        tokenizer.encode("red " * 5000)
    assert caught.value.code == "expression-too-long"


@pytest.mark.parametrize("damaged", [b"", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_damaged_files(damaged: bytes) -> None:
    with pytest.raises(BundleError) as caught:
        ExpressionTokenizer(damaged, SPEC)
    assert caught.value.code == "bundle-tokenizer"


@given(st.text(max_size=80))
@pytest.mark.filterwarnings("ignore::refedge.errors.RefedgeWarning")
def test_any_text_is_encoded_or_refused(text: str) -> None:
    tokenizer = ExpressionTokenizer(raw(), SPEC)
    try:
        tokens = tokenizer.encode(text)
    except InputError as error:
        assert error.code in ("expression-empty", "expression-unknown-words")
    else:
        assert tokens.words.any()
        assert set(tokens.ids.tolist()) <= set(range(7))
