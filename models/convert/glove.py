"""GloVe's text files: a word and its numbers on each line, the frequent words first.

Pennington et al., EMNLP 2014. A word may hold spaces and need not be UTF-8; ``glove.840B.300d``
has both, and some words twice, of which the first counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import CheckpointError
from .refused import damaged, other_layout
from .weights import missing

_LONGEST = 1 << 20  # bytes of a line


@dataclass(frozen=True)
class WordTable:
    """Words in the order of their ids, from 2 on, and the vectors of all ids.

    table:  [rows, width] float32; zero for padding, for the unknown, and for ``absent`` words.
    absent: words that the file lacks.
    """

    words: tuple[str, ...]
    table: Tensor
    absent: tuple[str, ...]


def read_glove(path: Path, rows: int, width: int, words: Iterable[str] | None) -> WordTable:
    """Vectors of width for a vocabulary of at most ``rows - 2`` words.

    words: the vocabulary; None for the first words of the file that are in lower case.
    """
    chosen = None if words is None else tuple(dict.fromkeys(words))
    if chosen is not None and len(chosen) > rows - 2:
        raise _vocabulary(path, f"{len(chosen)} words do not fit {rows} rows", "give fewer words")
    found: dict[str, npt.NDArray[np.float32]] = {}
    wanted = None if chosen is None else {w.encode() for w in chosen}
    for number, word, numbers in _lines(path, width):
        if wanted is None:
            text = word.decode(errors="replace")
            taken = text == text.lower() and text.isprintable() and not {" ", "\ufffd"} & set(text)
        else:
            taken = word in wanted
            text = word.decode() if taken else ""
        if taken and text not in found:
            found[text] = _vector(path, number, numbers)
            if len(found) == (rows - 2 if wanted is None else len(wanted)):
                break
    if not found:
        raise _vocabulary(path, "it has none of these words", "give words as the file spells them")
    final = tuple(found) if chosen is None else chosen
    table = torch.zeros(rows, width)
    for i, text in enumerate(final, start=2):
        if text in found:
            table[i] = torch.from_numpy(found[text])
    return WordTable(final, table, tuple(w for w in final if w not in found))


def _lines(path: Path, width: int) -> Iterator[tuple[int, bytes, list[bytes]]]:
    """Line number, word, and the last ``width`` fields of every line."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise missing(path, error) from error
    with file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
            if not line.endswith(b"\n"):
                raise damaged(path, f"line {number} does not end: the file was cut short")
            fields = line.split()
            if len(fields) <= width or (number == 1 and len(fields) != width + 1):
                raise other_layout(
                    path,
                    f"line {number} has {len(fields) - 1} numbers, not {width}",
                    "give GloVe vectors of that width",
                )
            yield number, b" ".join(fields[:-width]), fields[-width:]


def _vector(path: Path, number: int, fields: list[bytes]) -> npt.NDArray[np.float32]:
    try:
        vector = np.array([float(field) for field in fields], np.float32)
    except ValueError as error:
        raise damaged(path, f"line {number}: {error}"[:200]) from error
    if not np.isfinite(vector).all():
        raise damaged(path, f"line {number} holds numbers that are not finite")
    return vector


def _vocabulary(path: Path, why: str, fix: str) -> CheckpointError:
    return CheckpointError(
        "weights-vocabulary", f"{path} cannot fill the vocabulary", why=why, fix=fix
    )
