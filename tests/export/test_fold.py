"""Folding is exact: the same function before and after, and the operators are gone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from refedge.export.fold import fold_affine
from torch import nn


class Neck(nn.Module):
    """A residual block as MSCAN has them, without the language."""

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.first = nn.Conv2d(channels, channels, 1, bias=bias)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        self.up = nn.Conv2d(channels, 2 * channels, 1)
        self.down = nn.Conv2d(2 * channels, channels, 1)
        self.scale1 = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.scale2 = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.scale1 * (self.last(torch.relu(self.first(y))) + y)
        return x + self.scale2 * self.down(torch.relu(self.up(self.norm2(x))))


def graph_of(module: nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    with torch.no_grad():
        program = torch.onnx.export(
            module.eval(), (x,), dynamo=True, opset_version=20, verbose=False
        )
    assert program is not None
    model = onnx.shape_inference.infer_shapes(program.model_proto)
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{i}"
    return model


def randomise(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.05, 4.0, generator=generator)
        norm.weight.data.normal_(generator=generator)
        norm.bias.data.normal_(generator=generator)


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node)


def outputs(model: onnx.ModelProto, x: torch.Tensor) -> np.ndarray:
    name = model.graph.input[0].name
    return np.asarray(ReferenceEvaluator(model).run(None, {name: x.numpy()})[0])


@settings(max_examples=4, deadline=None)
@given(st.integers(2, 9), st.integers(0, 1000))
def test_a_residual_block_keeps_its_function(channels: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = Neck(channels)
    randomise(module, seed)
    x = torch.randn(2, channels, 5, 6)
    model = graph_of(module, x)
    before, found = kinds(model), outputs(model, x)
    fold_affine(model)
    onnx.checker.check_model(model)
    after = kinds(model)
    assert before["BatchNormalization"] == 2
    assert after["BatchNormalization"] == after["Mul"] == 0
    assert after["Conv"] == before["Conv"] + 1  # the shortcut
    assert after["Add"] == before["Add"] - 1
    # weights are rounded to float32 once more, some products of them are added up
    np.testing.assert_allclose(outputs(model, x), found, rtol=1e-4, atol=1e-4)


def test_a_norm_that_others_read_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return self.conv(y) * torch.sigmoid(y)

    module = Shared()
    randomise(module, 0)
    x = torch.randn(1, 4, 3, 3)
    model = graph_of(module, x)
    before = list(model.graph.node)
    found = outputs(model, x)
    fold_affine(model)
    assert list(model.graph.node) == before
    np.testing.assert_array_equal(outputs(model, x), found)


@pytest.mark.parametrize("padding", [0, 1])
def test_padding_is_not_shifted(padding: int) -> None:
    """A convolution pads with zeros behind the norm; folding it would pad with -shift."""
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1, padding=padding))
    randomise(module, 1)
    x = torch.randn(1, 3, 4, 4)
    model = graph_of(module, x)
    found = outputs(model, x)
    fold_affine(model)
    assert kinds(model)["BatchNormalization"] == padding
    np.testing.assert_allclose(outputs(model, x), found, rtol=1e-5, atol=1e-5)


def test_a_flattened_map_is_transposed_before() -> None:
    class Pixels(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x).flatten(2).transpose(1, 2) @ torch.ones(3, 2)

    x = torch.randn(2, 3, 4, 5)
    model = graph_of(Pixels(), x)
    found = outputs(model, x)
    fold_affine(model)
    onnx.checker.check_model(model)
    order = [n.op_type for n in model.graph.node]
    assert order.index("Transpose") < order.index("Reshape")
    np.testing.assert_array_equal(outputs(model, x), found)


@pytest.mark.parametrize("shared", [False, True])
def test_a_norm_behind_a_constant_map_is_folded(shared: bool) -> None:
    """A convolution with coordinates: what it makes of them is one constant map."""

    class Coordinates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(5)
            self.register_buffer("map", torch.randn(1, 5, 4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen = self.conv(x)
            y = torch.relu(self.norm(seen + self.map))
            return y + seen if shared else y

    module = Coordinates()
    randomise(module, 2)
    x = torch.randn(2, 3, 4, 6)
    model = graph_of(module, x)
    before = kinds(model)
    found = outputs(model, x)
    fold_affine(model)
    onnx.checker.check_model(model)
    assert before["BatchNormalization"] == 1
    assert kinds(model)["BatchNormalization"] == shared  # somebody else reads the convolution
    np.testing.assert_allclose(outputs(model, x), found, rtol=1e-4, atol=1e-5)
