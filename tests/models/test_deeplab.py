from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from refedge.models.deeplab import DILATIONS, DeepLab, DeepLabConfig
from torch import nn

SMALL = DeepLabConfig(8, 5, (4, 6, 8, 10), (1, 2, 3, 1), 2)


@pytest.fixture(scope="module")
def resnet101() -> DeepLab:
    with torch.device("meta"):
        return DeepLab(DeepLabConfig())


def test_it_is_resnet_101(resnet101: DeepLab) -> None:
    """44,549,160 parameters in torchvision, of which 2,049,000 are the classifier's."""
    assert sum(p.numel() for p in resnet101.parameters()) == 44_549_160 - 2_049_000
    assert sum(isinstance(m, nn.Conv2d) for m in resnet101.modules()) == 1 + 3 * 33 + 4


def test_names_and_shapes_are_torchvisions(resnet101: DeepLab) -> None:
    """As in the backbone of ``deeplabv3_resnet101``."""
    shapes = {name: tuple(t.shape) for name, t in resnet101.state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["bn1.running_mean"] == (64,)
    assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["layer1.0.downsample.1.running_var"] == (256,)
    assert shapes["layer2.0.downsample.0.weight"] == (512, 256, 1, 1)
    assert shapes["layer3.22.conv2.weight"] == (256, 256, 3, 3)
    assert shapes["layer4.2.conv3.weight"] == (2048, 512, 1, 1)
    assert "layer4.1.downsample.0.weight" not in shapes
    assert not any(name.startswith(("fc", "maxpool")) for name in shapes)


def test_the_last_stages_dilate_instead_of_stride(resnet101: DeepLab) -> None:
    for stage, dilation in enumerate(DILATIONS, start=1):
        for block in resnet101.get_submodule(f"layer{stage}").children():
            conv = block.get_submodule("conv2")
            assert isinstance(conv, nn.Conv2d)
            assert conv.dilation == conv.padding == (dilation, dilation)
            assert conv.stride in ((1, 1), (2, 2))
    strides = [m.stride[0] for m in resnet101.modules() if isinstance(m, nn.Conv2d)]
    assert strides.count(2) == 3  # the stem, and both paths into the second stage


def test_five_maps() -> None:
    model = DeepLab(SMALL).eval()
    with torch.no_grad():
        maps = model(torch.randn(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [
        (2, 8, 16, 16),
        (2, 8, 16, 16),
        (2, 12, 8, 8),
        (2, 16, 8, 8),
        (2, 20, 8, 8),
    ]
    assert [m.shape[1] for m in maps] == list(SMALL.channels)


def test_a_block_is_a_residual() -> None:
    """With the last norm silenced, what is left is the shortcut."""
    model = DeepLab(SMALL).eval()
    block = model.get_submodule("layer3.1")
    nn.init.zeros_(block.get_parameter("bn3.weight"))
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("wrong", [{"kernel": 4}, {"depths": (1, 1, 0, 1)}])
def test_impossible_configurations(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        replace(SMALL, **wrong)
