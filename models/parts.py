"""What a model must say of itself to be exported: its parts, their tensors, example inputs.

A model is cut where something can be computed once: ``text`` per expression, ``image`` per picture
(late fusion), ``mask`` for what is left. Each part is a plain ``nn.Module`` whose forward takes and
returns the tensors that its ports name, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

BATCH = "batch"


@dataclass(frozen=True)
class Port:
    """A named tensor: dtype as NumPy spells it; shape of integers and the symbol ``batch``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Part:
    """One graph of a model.

    inputs come from the host (``pixels``, ``ids``, ``words``) or, by name, from an earlier part.
    example makes inputs of a batch size and a seed, in the order of ``inputs``.
    """

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    example: Callable[[int, int], tuple[Tensor, ...]]
