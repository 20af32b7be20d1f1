"""Modules against plain NumPy in float64."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from refedge.models.hamburger import NMF, GroupNorm
from refedge.models.mscan import ChannelNorm, MapConv1d, MapLinear, TokenConv1d
from refedge.models.pictures import MEAN, STD, normalise_pixels
from refedge.models.urce import CrossScaleEnhancement
from refedge.models.word_attention import GatedCross


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def instance_norm(x: np.ndarray) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5)


def test_word_attention_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    module = GatedCross(12, 8).double().eval()
    x = torch.randn(2, 12, 5, 5, dtype=torch.float64)
    text = torch.randn(2, 6, 8, dtype=torch.float64)
    words = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    attention = module.vis_lang_att
    keys, values = attention.project_text(text, words)
    with torch.no_grad():
        out, weights = module(x, keys, values.transpose(1, 2), words)

    w = {k: v.detach().numpy() for k, v in module.state_dict().items()}

    def project(name: str, tokens: np.ndarray) -> np.ndarray:
        weight = w[f"vis_lang_att.{name}.0.weight"][:, :, 0]
        return tokens @ weight.T + w[f"vis_lang_att.{name}.0.bias"]

    tokens = x.flatten(2).transpose(1, 2).numpy()  # B, N, C
    mask = words.numpy()[:, :, None]
    q = instance_norm(project("project_q", tokens).transpose(0, 2, 1)).transpose(0, 2, 1)
    k = project("project_k", text.numpy()) * mask
    v = project("project_v", text.numpy()) * mask
    scores = q @ k.transpose(0, 2, 1) * 12**-0.5 + (1e4 * mask - 1e4).transpose(0, 2, 1)
    a = softmax(scores, -1)
    o = instance_norm(project("W", a @ v).transpose(0, 2, 1))  # B, C, N
    hidden = np.maximum(w["res_gate.0.weight"] @ o, 0)
    expected = np.tanh(w["res_gate.2.weight"] @ hidden) * o
    np.testing.assert_allclose(out.flatten(2).numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(weights.transpose(1, 2).numpy(), a, atol=1e-12)


def test_nmf_is_seven_multiplicative_updates() -> None:
    module = NMF(16, 4, 6, 7).double().eval()
    x = torch.rand(2, 16, 30, dtype=torch.float64)
    b = module.bases.numpy().repeat(2, 0)
    assert np.allclose(np.linalg.norm(b, axis=1), 1)
    xt = x.numpy()
    c = softmax(xt.transpose(0, 2, 1) @ b, -1)  # B, N, R

    def update_c(b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return c * (xt.transpose(0, 2, 1) @ b) / (c @ (b.transpose(0, 2, 1) @ b) + 1e-6)

    for _ in range(7):
        c = update_c(b, c)
        b = b * (xt @ c) / (b @ (c.transpose(0, 2, 1) @ c) + 1e-6)
    c = update_c(b, c)
    with torch.no_grad():
        np.testing.assert_allclose(module(x).numpy(), b @ c.transpose(0, 2, 1), atol=1e-9)


def test_nmf_lowers_the_residual() -> None:
    x = torch.rand(1, 16, 40)
    with torch.no_grad():
        far = torch.linalg.norm(x - NMF(16, 4, 6, 0).eval()(x))
        near = torch.linalg.norm(x - NMF(16, 4, 6, 7).eval()(x))
    assert near < 0.9 * far


def test_group_norm_is_torchs() -> None:
    torch.manual_seed(0)
    ours = GroupNorm(4, 16)
    torch.nn.init.normal_(ours.weight)
    torch.nn.init.normal_(ours.bias)
    x = torch.randn(3, 16, 5, 6)
    expected = torch.nn.functional.group_norm(x, 4, ours.weight, ours.bias, ours.eps)
    torch.testing.assert_close(ours(x), expected)


def test_channel_norm_normalises_channels() -> None:
    x = torch.randn(2, 8, 3, 4) * 5 + 2
    out = ChannelNorm(8)(x)
    torch.testing.assert_close(out.mean(1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(1, unbiased=False), torch.ones(2, 3, 4), atol=1e-3, rtol=0)


def test_pixels_are_normalised_as_torchvision_does() -> None:
    pixels = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    expected = (pixels.float() / 255 - mean) / std
    out = normalise_pixels(pixels, mean, std)
    torch.testing.assert_close(out, expected.permute(0, 3, 1, 2), atol=1e-5, rtol=0)


def test_layers_over_maps_and_tokens_are_linear_layers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 3)
    linear, conv = MapLinear(6, 5), MapConv1d(6, 5)
    expected = F.linear(x.permute(0, 2, 3, 1), linear.weight, linear.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(conv(x).flatten(2), F.conv1d(x.flatten(2), conv.weight, conv.bias))
    tokens = TokenConv1d(6, 5)
    rows = x.flatten(2).transpose(1, 2)
    expected = F.conv1d(x.flatten(2), tokens.weight, tokens.bias).transpose(1, 2)
    torch.testing.assert_close(tokens(rows), expected)


def test_regions_follow_rows_and_columns() -> None:
    """Cutting a map into regions and putting it together again changes nothing; region r is
    row r // grid, column r % grid, as in the official index arithmetic."""
    module = CrossScaleEnhancement((8, 8, 8, 8), 3, 8, 2, 4, "paper")
    x = torch.arange(2 * 8 * 12 * 12.0).reshape(2, 8, 12, 12)
    regions = module._to_regions(x, 4)
    assert regions.shape == (2, 9, 16 * 8)
    torch.testing.assert_close(module._to_map(regions, 4), x)
    block = x[1, :, 4:8, 8:12].permute(1, 2, 0).reshape(-1)  # row 1, column 2
    assert torch.equal(regions[1, 5], block)


def test_regions_that_are_not_chosen_are_doubled() -> None:
    torch.manual_seed(0)
    module = CrossScaleEnhancement((6, 6, 6, 6), 3, 8, 2, 2, "official").eval()
    maps = [torch.randn(1, 6, 3 * 2**i, 3 * 2**i) for i in (3, 2, 1, 0)]
    relevances = [m[:, :1] for m in maps]
    with torch.no_grad():
        out = module(maps, relevances)
        inner = module.fc_module[3](maps[3])
        expected = module.fc_rever_module[3](2 * inner)
    flat, wanted = out[3].flatten(2), expected.flatten(2)
    torch.testing.assert_close(flat[:, :, 2:], wanted[:, :, 2:])  # regions 0 and 1 are chosen
    assert not torch.allclose(flat[:, :, :2], wanted[:, :, :2], atol=1e-3)


def test_uncertainty_is_the_papers_sum_of_differences() -> None:
    module = CrossScaleEnhancement((6, 6, 6, 6), 3, 8, 2, 2, "paper")
    flat = [
        torch.full((1, 1, 3 * 2**i, 3 * 2**i), float(v))
        for i, v in ((3, 1), (2, 4), (1, 2), (0, 7))
    ]
    expected = torch.full((1, 9), 3.0 + 2.0 + 5.0)
    torch.testing.assert_close(module.uncertainty(flat), expected)
