"""``refedge models``: what each configuration is, without building its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .checkpoint import SHIPPED, load_card, plain, shipped
from .families import families, family
from .parts import AttentionShape, Part


@dataclass(frozen=True)
class Summary:
    """One configuration.

    parameters:  of all that the exported graphs use, in numbers.
    macs:        multiply-accumulates of each part for one picture and one expression.
    checkpoints: the shipped ones of this configuration.
    """

    name: str
    size: int
    words: int
    parameters: int
    macs: dict[str, int]
    cross_attention: tuple[AttentionShape, ...]
    checkpoints: tuple[str, ...]


def summaries() -> list[Summary]:
    """All named configurations, on torch's meta device: shapes alone, nothing is computed."""
    return [summary(name, config) for name in families() for config in family(name).configs]


def summary(kind: str, name: str) -> Summary:
    """One of them."""
    config = family(kind).configs[name]
    with torch.device("meta"):
        model = family(kind).build(config).eval()
        parts = model.parts()
        with _Used() as used:
            macs = {part.name: _macs(part) for part in parts}
    cards = {c: load_card(SHIPPED / c) for c in shipped()}
    own = tuple(
        c for c, card in cards.items() if (card.model, card.config) == (kind, plain(config))
    )
    return Summary(
        f"{kind}:{name}",
        config.size,
        config.words,
        sum(used.numbers.values()),
        macs,
        model.cross_attention(),
        own,
    )


def _macs(part: Part) -> int:
    """Counted by torch over one forward; products of matrices and convolutions only."""
    inputs = [
        torch.zeros(
            [n if isinstance(n, int) else 1 for n in p.shape], dtype=getattr(torch, p.dtype)
        )
        for p in part.inputs
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        part.module(*inputs)
    return int(counter.get_total_flops() // 2)


class _Used(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees which parameters take part; what training alone needs does not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, nn.Parameter):
                self.numbers[id(value)] = value.numel()
        return func(*args, **(kwargs or {}))
