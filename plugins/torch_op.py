"""The fused operators for torch, each of which exports as one ONNX node.

Nothing is registered by importing this file; ``register`` is called where they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .onnx_function import DOMAIN, PLUGIN

_MASKED = -1e4


def cross_attention(
    x: Tensor, keys: Tensor, values: Tensor, words: Tensor, offset: Tensor
) -> Tensor:
    """As ``reference.cross_attention``, in the dtype of x; the softmax in float32."""
    scores = (x @ keys.flatten(2)).float().reshape(*x.shape[:2], *keys.shape[2:])
    scores = scores + offset.float()[:, None]
    weights = torch.softmax(torch.where(words[:, None, None], scores, _MASKED), dim=3)
    return weights.to(x.dtype).flatten(2) @ values.flatten(1, 2)


def norm_attention(
    query: Tensor, keys: Tensor, values: Tensor, words: Tensor, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``reference.norm_attention``, folded; statistics and centring in float32."""
    scores = torch.where(words[:, :, None], (keys @ query).float(), _MASKED)
    weights = torch.softmax(scores, dim=1)
    mean = weights.mean(2, keepdim=True)
    centred = weights - mean
    shifted = values.float() - values.float() @ mean
    covariance = centred @ centred.transpose(1, 2) / weights.shape[2]
    variance = ((shifted @ covariance) * shifted).sum(2, keepdim=True).clamp_min(0.0)
    columns = (shifted / torch.sqrt(variance + 1e-5)).to(query.dtype)
    rounded = centred.to(query.dtype)
    gate = torch.tanh(second @ torch.relu((first @ columns) @ rounded))
    return gate * (columns @ rounded), weights.amax(1)


def mutual_attention(
    keys: Tensor, values: Tensor, words: Tensor, seen_keys: Tensor, seen_values: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``reference.mutual_attention``; both softmaxes in float32."""
    scores, valid = (keys @ seen_keys).float(), words[:, None, :, None]
    seen = torch.softmax(scores, dim=3).to(keys.dtype) @ seen_values
    told = torch.softmax(torch.where(valid, scores, _MASKED), dim=2)
    pairs = torch.where(valid, (seen @ values.transpose(2, 3)).float(), 0.0)
    pairs = pairs * (values.shape[1] * values.shape[3]) ** -0.5
    return (pairs.to(keys.dtype) @ told.to(keys.dtype)).sum(1), told.mean(1)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "CrossAttention": cross_attention,
    "NormAttention": norm_attention,
    "MutualAttention": mutual_attention,
}


@cache
def register() -> dict[str, Any]:
    """Register ``torch.ops.refedge.*`` once; the operators by the name of their ONNX function."""
    made = {}
    for name, function in _OPERATORS.items():
        made[name] = torch.library.custom_op(
            f"{DOMAIN}::{function.__name__}", function, mutates_args=()
        )
        made[name].register_fake(function)
    return made


def apply(operator: str, *inputs: Tensor) -> Any:
    """Run an operator by its name; while torch exports to ONNX, one node of domain ``refedge``.

    ``onnx_function.attach`` gives the exported model the functions that it then calls.
    """
    made = register()
    if not torch.onnx.is_in_onnx_export():
        return made[operator](*inputs)
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    name = f"{DOMAIN}::{operator}_{dtype}"
    shapes = _shapes(operator, inputs)
    kinds = [inputs[0].dtype, torch.float32][: len(shapes)]
    found = torch.onnx.ops.symbolic_multi_out(
        name, inputs, dict(PLUGIN), dtypes=kinds, shapes=shapes, version=1
    )
    return found[0] if len(shapes) == 1 else tuple(found)


def _shapes(operator: str, inputs: tuple[Tensor, ...]) -> list[list[Any]]:
    first, values = inputs[0], inputs[2 if operator != "MutualAttention" else 1]
    if operator == "CrossAttention":
        return [[*first.shape[:2], values.shape[3]]]
    if operator == "NormAttention":
        return [[*first.shape], [first.shape[0], first.shape[2]]]
    product: list[int | torch.SymInt] = [first.shape[0], first.shape[2], inputs[3].shape[3]]
    return [product, product]
