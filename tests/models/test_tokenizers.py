from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import pytest
import regex
from refedge.data.refshapes.dataset import RefShapes
from refedge.data.refshapes.expressions import words
from refedge.errors import CheckpointError, RefedgeWarning
from refedge.models.slvit import PAPER, TINY
from refedge.models.tokenizers import (
    bert_stand_in,
    clip_bpe,
    clip_stand_in,
    rules,
    space_split,
    word_level,
    wordpiece,
)
from refedge.runtime.manifest import TokenizerSpec
from refedge.runtime.tokenizer import ExpressionTokenizer
from tokenizers import Tokenizer
from transformers import BertTokenizer, CLIPTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
START, END = "<|startoftext|>", "<|endoftext|>"
SCRIPTS = (
    *("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"),
    *(".,!?'\"-#&()[]|<>", "€£¥§°±×÷", "“”‘’…—–", "½²٣४Ⅷ", "𝔘𝕦𝖚ﬁﬂ"),
    *("áàâäãåæçéèêëíîïñóöøœßúüýÿ", "ÁÀÂÄÉÈÊËÍÎÏÑÓÖØÚÜİ", "e\u0301a\u0308n\u0303"),
    *("αβγδεζηθΣς", "абвгдежЖЩ", "红色圆圈左边", "あいうアイウ", "한국어"),
    *("אבגד", "ابتث", "हिन्दी", "ไทย"),
    *("😀🔴🟦👍🏽👨\u200d👩\u200d👧🇩🇪", "\u00a0\u2003\u3000\u200b\u200d\ufeff"),
    *("\t\n\r", "\x00\x07\x1b\ufffd"),
)  # fmt: skip


def strings(count: int, seed: int) -> list[str]:
    """Random text: words and rubbish of many scripts, punctuation, emoji, some of it very long."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.choice((1, 2, 3, 5, 8, 13, 60 if rng.random() < 0.05 else 8))):
            if rng.random() < 0.5:
                parts.append(rng.choice(WORDS))
            else:
                script = rng.choice(SCRIPTS)
                parts.append("".join(rng.choices(script, k=rng.randint(1, 12))))
            parts.append(rng.choice((" ", " ", " ", "  ", "", "\n", "'s ", "n't ")))
        texts.append("".join(parts))
    texts[:4] = ["x" * 101, "x" * 100, " ".join(SPECIAL), f"a{START}b {END} c"]
    return texts


def generated_words(seed: int, count: int) -> tuple[str, ...]:
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    return tuple("".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(count))


WORDS = (*words(), *generated_words(0, 300))


def write_vocab(path: Path, seed: int) -> Path:
    """A vocab.txt with BERT's special tokens, single characters, words and word ends."""
    rng = random.Random(seed)
    letters = [c for script in SCRIPTS for c in script.lower() if c.isprintable() and c != " "]
    kept = rng.sample(sorted(set(letters)), k=120)
    pieces = [w[i:j] for w in WORDS for i, j in [sorted(rng.sample(range(len(w) + 1), 2))]]
    lines = [
        *("[PAD]", *(f"[unused{i}]" for i in range(9)), *SPECIAL[1:], *kept),
        *(f"##{c}" for c in kept if rng.random() < 0.8),
        *(w for w in WORDS if rng.random() < 0.5),
        *(p if rng.random() < 0.5 else f"##{p}" for p in pieces),
    ]
    path.write_text("\n".join(dict.fromkeys(lines)) + "\n", "utf-8")
    return path


@cache
def bytes_of_clip() -> tuple[str, ...]:
    """GPT-2's printable names of the 256 bytes, by byte value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return tuple(chr(b if b in printable else next(others)) for b in range(256))


def write_bpe(folder: Path, seed: int) -> tuple[Path, Path]:
    """vocab.json and merges.txt: bytes, bytes that end words, then random merges of these."""
    rng = random.Random(seed)
    names = sorted(bytes_of_clip())
    vocabulary = [*names, *(f"{n}</w>" for n in names)]
    merges: dict[tuple[str, str], None] = {}
    for text in (*WORDS, *strings(60, seed + 1)):
        for word in text.lower().split():
            parts = [bytes_of_clip()[b] for b in word.encode()][:12]
            parts[-1] += "</w>"
            while len(parts) > 1 and rng.random() < 0.9:
                i = rng.randrange(len(parts) - 1)
                merges[parts[i], parts[i + 1]] = None
                parts[i : i + 2] = ["".join(parts[i : i + 2])]
                vocabulary.append(parts[i])
    pieces = list(dict.fromkeys([*vocabulary, START, END]))
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "vocab.json", folder / "merges.txt"


def clip_by_hand(text: str, vocab: Path, merges: Path) -> list[int]:
    """Byte-pair encoding as its paper says it, in plain Python."""
    ids = json.loads(vocab.read_text())
    lines = merges.read_text("utf-8").split("\n")[1:-1]
    ranks = {tuple(line.split(" ")): i for i, line in enumerate(lines)}
    pattern = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
    )
    found = [ids[START]]
    for word in pattern.findall(text.lower()):
        parts = [bytes_of_clip()[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            rank, i = min(
                (ranks.get((a, b), 1 << 30), i)
                for i, (a, b) in enumerate(zip(parts, parts[1:]))  # noqa: B905, RUF007
            )
            if rank == 1 << 30:
                break
            parts[i : i + 2] = ["".join(parts[i : i + 2])]
        found += [ids[p] for p in parts]
    return [*found, ids[END]]


def differing(ours: Tokenizer, texts: list[str], theirs: list[list[int]]) -> list[str]:
    return [
        t for t, o, i in zip(texts, ours.encode_batch(texts), theirs, strict=True) if o.ids != i
    ]


@pytest.mark.parametrize("seed", [1, 2])
def test_wordpiece_is_transformers(seed: int, tmp_path: Path) -> None:
    """5,000 strings for each of two vocabularies."""
    vocab = write_vocab(tmp_path / "vocab.txt", seed)
    texts = strings(5000, seed)
    theirs = BertTokenizer(vocab=str(vocab))
    ours = wordpiece(vocab)
    assert differing(ours, texts, theirs(texts)["input_ids"]) == []
    tokens = [t for e in ours.encode_batch(texts) for t in e.tokens]
    share = tokens.count("[UNK]") / len(tokens)
    assert 0.02 < share < 0.6  # some words can be spelled, some cannot


def test_wordpiece_is_the_first_python_of_bert(tmp_path: Path) -> None:
    """LAVT and SLViT were trained with the slow tokenizer; no Rust is shared with it.

    They differ in one letter: Python lowers a Greek sigma at the end of a word to another one.
    """
    vocab = write_vocab(tmp_path / "vocab.txt", 3)
    slow = BertTokenizerLegacy(str(vocab))
    texts = [t.replace("Σ", "σ") for t in strings(1000, 3)]
    assert differing(wordpiece(vocab), texts, [slow.encode(t) for t in texts]) == []


@pytest.mark.parametrize("seed", [1, 2])
def test_clip_is_transformers(seed: int, tmp_path: Path) -> None:
    vocab, merges = write_bpe(tmp_path, seed)
    texts = strings(5000, seed)
    theirs = CLIPTokenizer(vocab=str(vocab), merges=str(merges))
    ours = clip_bpe(vocab, merges)
    assert differing(ours, texts, theirs(texts)["input_ids"]) == []
    lengths = [len(e.ids) for e in ours.encode_batch(texts)]
    assert sum(lengths) < 0.8 * sum(len(t.encode()) for t in texts)  # merges do something


def test_clip_is_byte_pair_encoding(tmp_path: Path) -> None:
    vocab, merges = write_bpe(tmp_path, 3)
    letters = "abcdefgh'st0123 .,!"
    rng = random.Random(3)
    texts = ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(300)]
    texts += [" ".join(rng.choices(WORDS, k=6)) for _ in range(300)]
    by_hand = [clip_by_hand(t, vocab, merges) for t in texts]
    assert differing(clip_bpe(vocab, merges), texts, by_hand) == []


def spec(tokenizer: Tokenizer, length: int) -> TokenizerSpec:
    rule = rules(tokenizer)
    return TokenizerSpec(
        "tokenizer.json", length, rule.pad, rule.unknown, rule.closed, True, rule.truncation
    )


def encode(tokenizer: Tokenizer, text: str, length: int) -> tuple[list[int], list[bool]]:
    runtime = ExpressionTokenizer(tokenizer.to_str().encode(), spec(tokenizer, length))
    tokens = runtime.encode(text)
    return tokens.ids.tolist(), tokens.words.tolist()


def test_cris_keeps_the_end() -> None:
    """CRIS's tokenize(): the tokens are cut to the length, then the last one is set to the end."""
    tokenizer = clip_stand_in(words())
    whole = tokenizer.encode("the big red circle left of the small blue square").ids
    with pytest.warns(RefedgeWarning, match="cut from 12 to 7"):
        ids, valid = encode(tokenizer, "the big red circle left of the small blue square", 7)
    assert ids == [*whole[:6], 49407]
    assert all(valid)
    ids, valid = encode(tokenizer, "red circle", 7)
    assert ids == [49406, *whole[3:5], 49407, 0, 0, 0]
    assert valid == [True] * 4 + [False] * 3
    exactly, valid = encode(tokenizer, "the big red circle left", 7)
    assert exactly == [*whole[:6], 49407]
    assert all(valid)


def test_lavt_cuts() -> None:
    """LAVT's dataset: input_ids[:20], also where that drops [SEP]."""
    tokenizer = bert_stand_in(words())
    whole = tokenizer.encode("the big red circle left of the blue square").ids
    with pytest.warns(RefedgeWarning, match="cut from 11 to 6"):
        ids, valid = encode(tokenizer, "the big red circle left of the blue square", 6)
    assert ids == whole[:6]
    assert 102 not in ids
    assert all(valid)
    ids, _ = encode(tokenizer, "red circle", 6)
    assert ids == [101, whole[3], whole[4], 102, 0, 0]


def test_nothing_but_special_tokens_is_empty() -> None:
    from refedge.errors import InputError

    with pytest.raises(InputError) as caught:
        encode(bert_stand_in(words()), "\u200b\ufeff", 6)
    assert caught.value.code == "expression-empty"


def test_the_rules_of_each_kind() -> None:
    assert rules(word_level(words())).closed
    assert not rules(word_level(map(str, range(1000)))).closed
    for tokenizer, truncation in (
        (word_level(words()), "cut"),
        (space_split(words()), "cut"),
        (bert_stand_in(words()), "cut"),
        (clip_stand_in(words()), "keep-last"),
    ):
        rule = rules(tokenizer)
        assert rule.truncation == truncation
        assert rule.pad == 0
        known = tokenizer.id_to_token(rule.unknown) if rule.unknown >= 0 else None
        assert known == ("[UNK]" if truncation == "cut" else None)
    assert not rules(bert_stand_in(words())).closed


def test_word_level_ids_are_positions() -> None:
    tokenizer = word_level(("red", "circle", "red"))
    assert tokenizer.get_vocab() == {"[PAD]": 0, "[UNK]": 1, "red": 2, "circle": 3}
    assert tokenizer.encode("Réd, circle!").ids == [2, 1, 3, 1]


def test_glove_models_split_at_spaces() -> None:
    tokenizer = space_split(("red", "circle", "café", "left-most"))
    assert tokenizer.encode("  RED\tCAFÉ  left-most circle ").ids == [2, 4, 5, 3]
    assert tokenizer.encode("red, cafe").ids == [1, 1]  # as the papers' code, which cleans before


def test_refshapes_fits_the_tiny_vocabulary() -> None:
    tokenizer = word_level(words())
    assert tokenizer.get_vocab_size() <= TINY.text.vocabulary
    texts = [e.text for s in RefShapes("val", difficulty="full", scenes=50) for e in s.expressions]
    longest = max(len(tokenizer.encode(t).ids) for t in texts)
    assert all(1 not in tokenizer.encode(t).ids for t in texts)
    assert longest <= TINY.words
    assert [e.ids for e in space_split(words()).encode_batch(texts)] == [
        e.ids for e in tokenizer.encode_batch(texts)
    ]


def test_the_stand_in_has_berts_ids() -> None:
    tokenizer = bert_stand_in(words())
    assert tokenizer.get_vocab_size() == PAPER.text.vocabulary == 30522
    assert [tokenizer.token_to_id(t) for t in SPECIAL] == [0, 100, 101, 102, 103]
    ids = tokenizer.encode("The leftmost zebra").ids
    assert (ids[0], ids[-1]) == (101, 102)
    assert 100 not in ids  # letters are pieces, so every ASCII word can be spelled
    assert len(ids) == 2 + 2 + 5


def test_the_stand_in_has_clips_ids() -> None:
    tokenizer = clip_stand_in(words())
    assert tokenizer.get_vocab_size() == 49408
    assert [tokenizer.token_to_id(t) for t in ("!", START, END)] == [0, 49406, 49407]
    assert tokenizer.id_to_token(255) == max(bytes_of_clip())
    assert tokenizer.id_to_token(256) == "!</w>"
    assert all(len(tokenizer.encode(w).ids) == 3 for w in words())  # one piece, start and end
    assert len(tokenizer.encode("The zebra").ids) == 2 + 1 + 5


def test_the_stand_in_is_the_same_every_time() -> None:
    assert bert_stand_in(words()).to_str() == bert_stand_in(words()).to_str()
    assert clip_stand_in(words()).to_str() == clip_stand_in(words()).to_str()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[PAD]\n[UNK]\n[CLS]\n[MASK]\n",
        b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\nred\n",
        b"[PAD]\n[UNK]\n\n[CLS]\n[SEP]\n[MASK]\n",
    ],
)
def test_damaged_vocabularies(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        wordpiece(tmp_path / "vocab.txt")
    assert caught.value.code == "tokenizer-damaged"


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [
        ("", ""),
        ("[1, 2]", ""),
        ('{"a": 0}', ""),
        ('{"a": "0", "<|startoftext|>": 1, "<|endoftext|>": 2}', ""),
        ('{"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}', "a b\n"),
        ('{"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}', "a\n"),
    ],
)
def test_damaged_byte_pairs(vocab: str, merges: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(CheckpointError) as caught:
        clip_bpe(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert caught.value.code == "tokenizer-damaged"


def test_a_missing_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        wordpiece(tmp_path / "vocab.txt")
    assert caught.value.code == "tokenizer-damaged"
