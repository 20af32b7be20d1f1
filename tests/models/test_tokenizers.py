from __future__ import annotations

from refedge.data.refshapes.dataset import RefShapes
from refedge.data.refshapes.expressions import words
from refedge.models.slvit import PAPER, TINY
from refedge.models.tokenizers import bert_stand_in, word_level


def test_word_level_ids_are_positions() -> None:
    tokenizer = word_level(("red", "circle", "red"))
    assert tokenizer.get_vocab() == {"[PAD]": 0, "[UNK]": 1, "red": 2, "circle": 3}
    assert tokenizer.encode("Réd, circle!").ids == [2, 1, 3, 1]


def test_refshapes_fits_the_tiny_vocabulary() -> None:
    tokenizer = word_level(words())
    assert tokenizer.get_vocab_size() <= TINY.text.vocabulary
    texts = [e.text for s in RefShapes("val", difficulty="full", scenes=50) for e in s.expressions]
    longest = max(len(tokenizer.encode(t).ids) for t in texts)
    assert all(1 not in tokenizer.encode(t).ids for t in texts)
    assert longest <= TINY.words


def test_the_stand_in_has_berts_ids() -> None:
    tokenizer = bert_stand_in(words())
    assert tokenizer.get_vocab_size() == PAPER.text.vocabulary == 30522
    assert [tokenizer.token_to_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [
        0, 100, 101, 102, 103,
    ]  # fmt: skip
    ids = tokenizer.encode("The leftmost zebra").ids
    assert (ids[0], ids[-1]) == (101, 102)
    assert 100 not in ids  # letters are pieces, so every ASCII word can be spelled
    assert len(ids) == 2 + 2 + 5


def test_the_stand_in_is_the_same_every_time() -> None:
    assert bert_stand_in(words()).to_str() == bert_stand_in(words()).to_str()
