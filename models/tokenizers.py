"""Tokenizers as ``tokenizers.Tokenizer`` objects, one kind per text encoder.

``wordpiece`` and ``clip_bpe`` read the public vocabularies and give the ids that transformers
gives. Those files are downloads, and refedge works without any: where a model needs one, a stand-in
of the same size and with the same special tokens is made from a list of words; it is stamped in the
bundle, so that nobody takes it for the real one.

An expression that is too long is treated as the papers' code does it: LAVT and its family cut the
ids, also a closing [SEP]; CRIS and its family keep the closing end token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel, WordPiece

from ..errors import CheckpointError

STAND_IN = "stand-in"
CLOSED = 1000  # a word-level vocabulary smaller than this is all that its model has ever seen

_PAD, _UNK = "[PAD]", "[UNK]"
_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_START, _END = "<|startoftext|>", "<|endoftext|>"
# Radford et al., ICML 2021: contractions, runs of letters, single digits, runs of anything else
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclass(frozen=True)
class Rules:
    """What a tokenizer does beside its own file.

    pad, unknown: ids; unknown is -1 where every text can be spelled.
    closed:       unknown words are to be refused.
    truncation:   ``cut``, or ``keep-last`` (the end token stays).
    """

    pad: int
    unknown: int
    closed: bool
    truncation: Literal["cut", "keep-last"]


def rules(tokenizer: Tokenizer) -> Rules:
    """The rules of a tokenizer of this module, or of one's own with the same special tokens."""
    vocabulary = tokenizer.get_vocab()
    if _END in vocabulary:
        return Rules(pad=0, unknown=-1, closed=False, truncation="keep-last")
    unknown = vocabulary.get(_UNK, -1)
    closed = unknown >= 0 and "[CLS]" not in vocabulary and len(vocabulary) < CLOSED
    return Rules(vocabulary.get(_PAD, 0), unknown, closed, truncation="cut")


def word_level(words: Iterable[str]) -> Tokenizer:
    """One id per lower-case word, in order, after ``[PAD]`` = 0 and ``[UNK]`` = 1.

    Accents are dropped and punctuation stands alone.
    """
    tokenizer = Tokenizer(WordLevel(_numbered(words), unk_token=_UNK))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def space_split(words: Iterable[str]) -> Tokenizer:
    """The same for models with GloVe vectors: lower case, split at white space, nothing else."""
    tokenizer = Tokenizer(WordLevel(_numbered(words), unk_token=_UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def wordpiece(vocab: Path) -> Tokenizer:
    """BERT's, uncased, from its ``vocab.txt``: one piece per line, the line number is the id."""
    lines = _read(vocab).removesuffix("\n").split("\n")
    pieces = {piece: i for i, piece in enumerate(lines)}
    absent = [t for t in _BERT if t not in pieces]
    if absent or len(pieces) < len(lines) or "" in pieces:
        why = f"{', '.join(absent)} is not in it" if absent else "a line is empty or there twice"
        raise _damaged(vocab, why)
    return _bert(pieces)


def bert_stand_in(words: Iterable[str], size: int = 30522) -> Tokenizer:
    """WordPiece with BERT's special ids, the given words, and all ASCII pieces; filled to size.

    Special tokens lie where bert-base-uncased has them: [PAD] 0, [UNK] 100, [CLS] 101, [SEP] 102,
    [MASK] 103.
    """
    vocabulary = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    pieces = [*letters, *(f"##{c}" for c in letters), *words]
    free = iter(sorted(set(range(size)) - set(vocabulary.values())))
    for piece in dict.fromkeys(pieces):
        vocabulary[piece] = next(free)
    for i in free:
        vocabulary[f"[unused{i}]"] = i
    return _bert(vocabulary)


def clip_bpe(vocab: Path, merges: Path) -> Tokenizer:
    """CLIP's, from Hugging Face's ``vocab.json`` and ``merges.txt``."""
    try:
        ids = json.loads(_read(vocab))
        whole = isinstance(ids, dict) and all(type(i) is int for i in ids.values())
    except (ValueError, RecursionError):
        whole = False
    if not whole or _START not in ids or _END not in ids:
        raise _damaged(vocab, f"it is no table of ids with {_START} and {_END}")
    lines = _read(merges).split("\n")
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    odd = [p for p in pairs if len(p) != 2 or not {p[0], p[1], "".join(p)} <= ids.keys()]
    if odd:
        raise _damaged(merges, f"{' '.join(odd[0])!r} is no pair of pieces of {vocab.name}")
    return _clip(ids, [(a, b) for a, b in pairs])


def clip_stand_in(words: Iterable[str], size: int = 49408) -> Tokenizer:
    """CLIP's byte pairs with merges that make one piece of each of the words; filled to size.

    Bytes and special tokens have CLIP's ids: ``!`` 0, the last two ``<|startoftext|>`` and
    ``<|endoftext|>``.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # CLIP's order: printable, then the rest
    vocabulary = {c: i for i, c in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    ranks: dict[tuple[str, str], int] = {}
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for word in words:
        for piece, _ in alphabet.pre_tokenize_str(word.lower()):
            parts = _merge([*piece[:-1], f"{piece[-1]}</w>"], ranks)
            for first, second in pairwise(_prefixes(parts)):
                ranks[first, second[len(first) :]] = len(ranks)
                vocabulary.setdefault(second, len(vocabulary))
    for i in range(len(vocabulary), size - 2):
        vocabulary[f"<|unused{i}|>"] = i
    vocabulary |= {_START: size - 2, _END: size - 1}
    return _clip(vocabulary, list(ranks))


def made_up(kind: str, words: Iterable[str], size: int) -> tuple[Tokenizer, str]:
    """A tokenizer for a model whose vocabulary is not at hand, and what a card calls it.

    kind: ``wordpiece``, ``clip`` or ``word-level``; so few ids that they are closed are words.
    """
    if kind == "word-level" or size < CLOSED:
        return word_level(words), "word-level"
    stand_in = clip_stand_in if kind == "clip" else bert_stand_in
    return stand_in(words, size), STAND_IN


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """That of a folder with ``vocab.txt``, or with ``vocab.json`` and ``merges.txt``."""
    if (folder / "vocab.txt").is_file():
        return wordpiece(folder / "vocab.txt")
    if (folder / "vocab.json").is_file():
        return clip_bpe(folder / "vocab.json", folder / "merges.txt")
    return None


def kind_of(tokenizer: Tokenizer) -> str:
    """``wordpiece``, ``clip`` or ``word-level``."""
    vocabulary = tokenizer.get_vocab()
    return "clip" if _END in vocabulary else "wordpiece" if "[CLS]" in vocabulary else "word-level"


def _numbered(words: Iterable[str]) -> dict[str, int]:
    vocabulary = {_PAD: 0, _UNK: 1}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    return vocabulary


def _bert(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=_UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    tokenizer.add_special_tokens(list(_BERT))
    return tokenizer


def _clip(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    model = BPE(vocabulary, merges, unk_token=_END, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (_END, vocabulary[_END]),
        (_START, vocabulary[_START]),
        trim_offsets=False,
        add_prefix_space=False,
    )
    tokenizer.add_special_tokens([_START, _END])
    return tokenizer


def _merge(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: the merge of the lowest rank, everywhere, until none applies."""
    while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        merged: list[str] = []
        for part in parts:
            if merged and (merged[-1], part) == best:
                merged[-1] += part
            else:
                merged.append(part)
        parts = merged
    return parts


def _prefixes(parts: list[str]) -> list[str]:
    return ["".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "tokenizer-damaged",
        f"{path} is no tokenizer's file",
        why=why,
        fix="fetch it again from where the model's weights come from",
    )
