from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from refedge.errors import CheckpointError
from refedge.models.darknet import ConvNorm, Darknet, load_weights
from refedge.models.pictures import unit_pixels

SMALL = ((4, 6, 8, 10, 12, 14), (1, 1, 2, 1, 1))


@pytest.fixture
def small() -> Darknet:
    torch.manual_seed(0)
    return Darknet(*SMALL).eval()


def test_darknet_53_is_the_papers() -> None:
    """52 convolutions before the classifier; 41.61 M parameters with its 1000 classes."""
    with torch.device("meta"):
        network = Darknet()
        maps = network(torch.empty(1, 3, 416, 416))
    assert [tuple(m.shape[1:]) for m in maps] == [(256, 52, 52), (512, 26, 26), (1024, 13, 13)]
    assert len(list(network.layers())) == 52
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters == 40_584_928
    assert parameters + 1024 * 1000 + 1000 == pytest.approx(41.61e6, rel=1e-3)


def test_the_order_of_the_file_is_the_order_of_the_forward(small: Darknet) -> None:
    called: list[torch.nn.Module] = []
    for layer in small.layers():
        layer.register_forward_hook(lambda module, *_: called.append(module))
    small(torch.rand(1, 3, 32, 32))
    assert [id(m) for m in called] == [id(m) for m in small.layers()]


def test_weights_come_in_darknets_order(small: Darknet) -> None:
    count = sum(layer.conv.weight.numel() + 4 * layer.bn.num_features for layer in small.layers())
    values = np.random.default_rng(0).uniform(0.1, 1.0, count + 9).astype(np.float32)
    assert load_weights(small, values) == count
    position = 0
    for layer in small.layers():  # Darknet's parser: biases, scales, mean, variance, weights
        bias, scale, mean, variance = values[position : position + 4 * layer.bn.num_features].reshape(4, -1)  # noqa: E501  # fmt: skip
        position += 4 * layer.bn.num_features
        kernel = values[position : position + layer.conv.weight.numel()]
        position += kernel.size
        np.testing.assert_array_equal(layer.bn.bias.detach(), bias)
        np.testing.assert_array_equal(layer.bn.weight.detach(), scale)
        np.testing.assert_array_equal(layer.bn.running_mean, mean)
        np.testing.assert_array_equal(layer.bn.running_var, variance)
        np.testing.assert_array_equal(layer.conv.weight.detach().flatten(), kernel)
    with pytest.raises(CheckpointError, match="too few"):
        load_weights(small, values[: count - 1])


@pytest.mark.parametrize(("kernel", "stride", "rate"), [(1, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2)])
def test_a_layer_is_convolution_norm_and_leak(kernel: int, stride: int, rate: int) -> None:
    torch.manual_seed(0)
    layer = ConvNorm(3, 5, kernel, stride, rate).eval()
    layer.bn.running_mean.normal_()
    layer.bn.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, 8, 8)
    y = F.conv2d(x, layer.conv.weight, None, stride, rate * (kernel // 2), rate)
    y = (y - layer.bn.running_mean[:, None, None]) / (layer.bn.running_var[:, None, None] + 1e-5).sqrt()  # noqa: E501  # fmt: skip
    y = torch.where(y > 0, y, 0.1 * y)
    assert y.shape[2] == 8 // stride
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)


def test_residuals_are_added(small: Darknet) -> None:
    block = small.stages[0][1]
    x = torch.randn(1, 6, 4, 4)
    torch.testing.assert_close(block(x) - x, block.expand(block.squeeze(x)), atol=1e-6, rtol=0)


def test_pixels_become_zero_to_one() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 2, 4, 3)
    found = unit_pixels(pixels)
    assert found.shape == (1, 3, 2, 4)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.0, 0.2, 1.0]))


@pytest.mark.parametrize("wrong", [((8,) * 5, (1,) * 5), ((8,) * 6, (1,) * 4)])
def test_impossible_sizes(wrong: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="6 widths"):
        Darknet(*wrong)
