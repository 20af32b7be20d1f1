"""Seeded weights are the same every time, whatever else draws numbers."""

from __future__ import annotations

import torch
from refedge.models.examples import host_inputs
from refedge.models.lavt import LAVT
from refedge.models.lavt import TINY as LAVT_TINY
from refedge.models.parts import HOST, Network
from refedge.models.seeded import POSITIVE, seed_weights
from torch import Tensor, nn


def weights(noise: int, dropout: float = 0.5) -> tuple[Network, dict[str, Tensor]]:
    model: Network = LAVT(LAVT_TINY)
    found = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert found
    for module in found:
        module.p = dropout
    torch.manual_seed(noise)
    return model, seed_weights(model, 0).state_dict()


def test_equal_whatever_dropout_draws() -> None:
    _, first = weights(1)
    model, second = weights(2)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not model.training


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    weights(0)
    assert torch.get_num_threads() == before


def test_norms_have_seen_a_forward_and_the_mask_is_neither_empty_nor_full() -> None:
    model, state = weights(0)
    assert any(not torch.all(v == 0) for n, v in state.items() if n.endswith("running_mean"))
    host = host_inputs(model, 6, 0)
    with torch.no_grad():
        logits = model(*[host[name] for name in HOST])
    assert abs(float((logits > 0).float().mean()) - POSITIVE) < 0.01
