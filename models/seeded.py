"""Weights for networks that nobody has trained: seeded, with activations of order one.

A fresh initialisation says little about an exporter: residual branches are scaled to nearly
nothing and one class wins everywhere. Here every branch contributes, batch norms hold statistics
of a real forward, and about two fifths of the pixels are positive, so that parity means something.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from .examples import host_inputs
from .parts import HOST, Network

N = TypeVar("N", bound=Network)
_SEEN = 6  # expressions that set norms and threshold
# ends of residual branches, which are to be weaker than the stream they add to: thirty equal ones
# of a ResNet multiply float32's rounding a thousandfold, twelve of BERT make all words alike
_BRANCH = 0.3
_BRANCH_NORM = "bn3.weight"
_BRANCH_LINEAR = "output.dense.weight"
POSITIVE = 0.4  # share of pixels that end up above zero on the seed's own images


@torch.no_grad()
def seed_weights(model: N, seed: int) -> N:
    """Fill a model in place, reproducibly for a given torch version; returns it in eval mode.

    Forwards run on one thread, since two round sums in another order. Norms of text see a tenth of
    the statistics of a forward, as in training; norms of maps see all of it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        _fill(name, parameter, generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _settle(model, seed)
    finally:
        torch.set_num_threads(threads)


def _settle(model: N, seed: int) -> N:
    """Statistics of norms, and the threshold, from the seed's own images."""
    host = host_inputs(model, _SEEN, seed)
    inputs = [host[name] for name in HOST]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average, so one forward sets the statistics
    model.eval()  # a dropout would make every call's weights others
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.train()
    model(*inputs)
    for norm in norms:
        norm.momentum = 0.1
    model.eval()
    logits = model(*inputs)
    model.rescale(float(logits.flatten().quantile(1.0 - POSITIVE)), float(2.0 / logits.std()))
    return model


def _fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if "layer_scale" in name or name.endswith(_BRANCH_NORM):
        parameter.fill_(_BRANCH)
    elif parameter.ndim < 2:
        is_scale = name.endswith("weight")
        parameter.normal_(1.0 if is_scale else 0.0, 0.1, generator=generator)
    elif "embeddings" in name:
        parameter.normal_(0.0, 0.5, generator=generator)
    else:
        fan_in = parameter[0].numel()
        scale = _BRANCH if name.endswith(_BRANCH_LINEAR) else 1.0
        parameter.normal_(0.0, scale * fan_in**-0.5, generator=generator)
