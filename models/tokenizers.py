"""Tokenizers as ``tokenizers.Tokenizer`` objects, one kind per text encoder.

The vocabularies of BERT and CLIP are downloads, and refedge works without any. Where a model needs
one, a stand-in of the same size and with the same special tokens is made from a list of words; it
is stamped in the bundle, so that nobody takes it for the real one.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel, WordPiece

STAND_IN = "stand-in"


def word_level(words: Iterable[str]) -> Tokenizer:
    """One id per lower-case word, in order, after ``[PAD]`` = 0 and ``[UNK]`` = 1."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def bert_stand_in(words: Iterable[str], size: int = 30522) -> Tokenizer:
    """WordPiece with BERT's special ids, the given words, and all ASCII pieces; filled to size.

    Special tokens lie where bert-base-uncased has them: [PAD] 0, [UNK] 100, [CLS] 101, [SEP] 102,
    [MASK] 103.
    """
    vocabulary = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    pieces = [*letters, *(f"##{c}" for c in letters), *words]
    free = (i for i in range(1, size) if i not in vocabulary.values())
    for piece in dict.fromkeys(pieces):
        vocabulary[piece] = next(free)
    for i in free:
        vocabulary[f"[unused{i}]"] = i
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 102), ("[CLS]", 101))
    return tokenizer
