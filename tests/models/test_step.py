from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from refedge.models.deeplab import DeepLabConfig
from refedge.models.lts_neck import coordinates
from refedge.models.pictures import normalise_pixels
from refedge.models.step import LEVELS, PAPER, STEP, TINY, STEPConfig
from refedge.models.step_layers import Atrous, ConvGRU, resize
from torch import Tensor, nn

from .networks import taken_by

SMALL = replace(
    TINY,
    size=64,
    words=6,
    word_width=12,
    hidden=10,
    backbone=DeepLabConfig(8, 5, (4, 6, 8, 10), (1, 1, 1, 1), 2),
    context=14,
    key=9,
    joint=11,
    filters=5,
)


def lively(config: STEPConfig, seed: int = 0) -> STEP:
    """Random weights, batch norms with statistics of their own, heat maps that matter."""
    torch.manual_seed(seed)
    model = STEP(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.1, 0.5)
    nn.init.normal_(model.head.weight, 0.0, 4.0)
    return model


def inputs(model: STEP, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """pixels of (batch + 1) // 2 pictures, ids, words, image_index."""
    text, image, mask = model.parts()
    return (
        *taken_by(image, batch, seed),
        *taken_by(text, batch, seed),
        taken_by(mask, batch, seed)[1],
    )


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def naive_step(model: STEP, pixels: Tensor, ids: Tensor, words: Tensor) -> list[Tensor]:
    """The specification's formulas, one pair at a time: [B, h, w] probabilities P_t of each step.

    A sentence vector is pooled from every pixel and word in every step; convolutions see the
    concatenated coordinates; gates have kernels of their own.
    """
    c = model.config
    maps = model.backbone(normalise_pixels(pixels, model.mean, model.std))
    states = model.recurrent(model.embeddings(ids), words)
    grid = c.size // c.stride
    wf, wz, wc = model.gru.inputs.weight.chunk(3)
    bf, bz, bc = model.gru.inputs.bias.chunk(3)
    rf, rz = model.gru.gates.weight.chunk(2)
    found = []
    for b in range(len(ids)):
        length = int(words[b].sum())
        h = states[b, :length]
        ht = model.ht(h)
        state = pixels.new_zeros(1, c.filters, grid, grid, dtype=h.dtype)
        masks: list[Tensor] = []
        previous: Tensor | None = None
        for t in range(1, LEVELS * c.folds + 1):
            level = (t % 5 or 5) - 1
            if c.deep_first:
                level = 4 - level
            atrous, side = model.atrous[level], c.grids[level]
            seen = torch.cat((maps[level][b : b + 1], coordinates(side, 8).to(h)), 1)
            weight = torch.cat((atrous.conv.weight, atrous.place.weight), 1)
            scale = atrous.bn.weight / (atrous.bn.running_var + atrous.bn.eps).sqrt()
            bias = atrous.bn.bias - atrous.bn.running_mean * scale
            weight = weight * torch.cat((scale[:, None].expand(-1, maps[level].shape[1]),
                                         torch.ones_like(scale)[:, None].expand(-1, 8)),
                                        1)[:, :, None, None]  # fmt: skip
            v = F.conv2d(seen, weight, bias, padding=3, dilation=3).relu()
            vt = model.vt[level](v)[0].flatten(1).T
            alpha = (vt @ ht.T).softmax(1)
            uniform = torch.full((1, 1, grid, grid), 0.5).to(h)
            last = F.interpolate(masks[-1] if masks else uniform, size=(side, side),
                                 mode="bilinear")  # fmt: skip
            w = last.flatten().softmax(0)
            s = torch.zeros_like(h[0])
            for i in range(side * side):
                s = s + w[i] * (alpha[i][:, None] * h).sum(0)
            psi = unit(torch.tanh(model.psi(s)))
            phi = unit(torch.tanh(model.phi[level](v)[0].flatten(1).T))
            q = (phi @ psi).clamp_min(0.0).reshape(1, 1, side, side)
            q = F.interpolate(q, size=(grid, grid), mode="bilinear")
            x = q
            if c.echoes:
                nothing = torch.zeros_like(q)
                x = torch.cat((q, masks[-1] if masks else nothing,
                               nothing if previous is None else previous), 1)  # fmt: skip
            reset = torch.sigmoid(F.conv2d(state, rf, padding=1) + F.conv2d(x, wf, bf, padding=1))
            keep = torch.sigmoid(F.conv2d(state, rz, padding=1) + F.conv2d(x, wz, bz, padding=1))
            new = torch.tanh(model.gru.candidate(reset * state) + F.conv2d(x, wc, bc, padding=1))
            state = keep * state + (1 - keep) * new
            masks.append(torch.sigmoid(model.head(state)))
            previous = q
        found.append(torch.cat(masks))
    return list(torch.stack(found, 1)[:, :, 0])


@pytest.mark.parametrize(
    "changes",
    [
        {"folds": 1},
        {"folds": 3, "echoes": False},
        {"folds": 2, "stride": 8},
        {"deep_first": True, "keep_dim": True, "echoes": False},
    ],
)
def test_the_loop_is_the_papers(changes: dict[str, object]) -> None:
    """Sums are only ordered differently; float64, so what is left is rounding."""
    model = lively(replace(SMALL, **changes)).double()
    pixels, ids, words, index = inputs(model, 3)
    with torch.no_grad():
        products = [x.index_select(0, index) for x in model.encode_image(pixels)]
        logits, _ = model.steps(words, model.encode_text(ids, words), tuple(products))
        wanted = naive_step(model, pixels.index_select(0, index), ids, words)
    assert len(logits) == len(wanted) == LEVELS * model.config.folds
    for found, probability in zip(logits, wanted, strict=True):
        torch.testing.assert_close(found[:, 0].sigmoid(), probability, rtol=0, atol=1e-9)
    assert float(wanted[-1].std()) > 0.01


def test_the_coordinates_are_the_papers() -> None:
    code = coordinates(5, 8)[0]
    for y in range(5):
        for x in range(5):
            left, top, right, bottom = (2 * n / 5 - 1 for n in (x, y, x + 1, y + 1))
            wanted = [left, top, right, bottom, (left + right) / 2, (top + bottom) / 2, 0.2, 0.2]
            np.testing.assert_allclose(code[:, y, x], wanted, atol=1e-6)


def test_resizing_is_bilinear() -> None:
    x = torch.randn(2, 3, 8, 8)
    for side in (4, 8, 16):
        wanted = F.interpolate(x, size=(side, side), mode="bilinear")
        torch.testing.assert_close(resize(x, side), wanted, rtol=0, atol=1e-6)


def test_parameter_counts() -> None:
    with torch.device("meta"):
        model = STEP(PAPER)
    assert parameters(model.backbone) == 42_500_160
    # nine taps of each map and its coordinates, to 512 channels, and their batch norms
    assert parameters(model.atrous) == 9 * (72 + 264 + 520 + 1032 + 2056) * 512 + LEVELS * 1024
    assert parameters(model.recurrent) == 2 * 4 * 1000 * (300 + 1000 + 2)
    assert parameters(model.gru) == 3 * (9 * (1 + 32) * 32 + 32)
    assert parameters(model.vt) == LEVELS * (512 + 1) * 400
    assert parameters(model.phi) == LEVELS * (512 + 1) * 1000
    assert parameters(model) - parameters(model.embeddings) == pytest.approx(77.5e6, rel=2e-3)
    assert 0.4e6 < parameters(STEP(TINY)) < 1.3e6


def test_paper_shapes() -> None:
    """17,600 pixels over the levels, of 1000 and 400 values (the specification's table)."""
    with torch.device("meta"):
        _, image, mask = STEP(PAPER).parts()
    shapes = [port.shape[1:] for port in image.outputs]
    assert shapes == [s for n in (6400, 6400, 1600, 1600, 1600) for s in ((n, 400), (n, 1000))]
    assert len(PAPER.schedule) == 25
    assert PAPER.schedule[:6] == (0, 1, 2, 3, 4, 0)
    assert replace(PAPER, keep_dim=True).contexts == (72, 264, 520, 1032, 2056)
    assert mask.outputs[0].shape == ("batch", 320, 320)


@pytest.mark.parametrize("folds", [1, 2])
def test_folds_share_their_weights(folds: int) -> None:
    model = STEP(replace(SMALL, folds=folds))
    assert parameters(model) == parameters(STEP(SMALL))
    pixels, ids, words, index = inputs(model.eval(), 2)
    with torch.no_grad():
        image = tuple(x.index_select(0, index) for x in model.encode_image(pixels))
        logits, attention = model.steps(words, model.encode_text(ids, words), image)
    assert len(logits) == 5 * folds
    assert len(attention) == 5
    assert [tuple(x.shape) for x in logits] == [(2, 1, 16, 16)] * (5 * folds)


def test_more_folds_begin_like_fewer() -> None:
    model, longer = lively(SMALL), STEP(replace(SMALL, folds=2)).eval()
    longer.load_state_dict(model.state_dict())
    pixels, ids, words, index = inputs(model, 2)
    with torch.no_grad():
        image = tuple(x.index_select(0, index) for x in model.encode_image(pixels))
        text = model.encode_text(ids, words)
        short, long = model.steps(words, text, image)[0], longer.steps(words, text, image)[0]
    assert all(torch.equal(a, b) for a, b in zip(short, long[:5], strict=True))
    assert not torch.allclose(short[-1], long[-1], atol=1e-3)


@pytest.mark.parametrize("wrong", [{"size": 100}, {"stride": 16}, {"folds": 0}])
def test_impossible_configurations(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        replace(TINY, **wrong)


@pytest.mark.parametrize("size", [64, 128])
def test_shapes_at_every_size(size: int) -> None:
    model = STEP(replace(TINY, size=size)).eval()
    with torch.no_grad():
        assert model(*inputs(model, 2)).shape == (2, size, size)
        image = model.encode_image(inputs(model, 2)[0])
    wanted = [port.shape[1:] for port in model.parts()[1].outputs]
    assert [tuple(x.shape[1:]) for x in image] == wanted


def test_padding_has_no_influence() -> None:
    model = lively(TINY)
    pixels, ids, words, index = inputs(model, 4)
    other = torch.where(words, ids, torch.full_like(ids, 7))
    assert not torch.equal(ids, other)
    with torch.no_grad():
        # padded states are zero and -1e4 in front of a softmax is an exact zero in float32
        assert torch.equal(model(pixels, ids, words, index), model(pixels, other, words, index))


def test_rows_do_not_see_each_other() -> None:
    model = lively(TINY)
    pixels, ids, words, index = inputs(model, 4)
    with torch.no_grad():
        whole = model(pixels, ids, words, index)
        for row in range(4):
            picture = pixels[int(index[row])][None]
            alone = model(picture, ids[row : row + 1], words[row : row + 1])
            torch.testing.assert_close(whole[row : row + 1], alone, rtol=0, atol=1e-4)
    assert float((whole[0] - whole[1]).abs().max()) > 1e-2  # one picture, two expressions


def test_a_gathered_picture_is_a_repeated_one() -> None:
    model = lively(TINY)
    pixels, ids, words, index = inputs(model, 4)
    assert index.tolist() == [0, 0, 1, 1]
    with torch.no_grad():
        gathered = model(pixels, ids, words, index)
        repeated = model(pixels.index_select(0, index), ids, words)
    torch.testing.assert_close(gathered, repeated, rtol=0, atol=1e-4)


def test_every_level_and_step_counts() -> None:
    """A change of one level's joint space changes the mask."""
    model = lively(TINY)
    given = inputs(model, 2)
    with torch.no_grad():
        before = model(*given)
        for level in range(LEVELS):
            model.phi[level].bias += 0.5
            after = model(*given)
            model.phi[level].bias -= 0.5
            assert float((after - before).abs().max()) > 1e-3, level


def test_rescaling_is_exact() -> None:
    """Although the loop looks at masks that the last layer reads out."""
    model = lively(TINY)
    given = inputs(model, 2)
    with torch.no_grad():
        before = model(*given)
        model.rescale(0.3, 2.0)
        model.rescale(-0.1, 0.7)
        after = model(*given)
    torch.testing.assert_close(after, 0.7 * (2.0 * (before - 0.3) + 0.1), rtol=0, atol=1e-5)


def test_rehearsal() -> None:
    model = lively(TINY)
    pixels, ids, words, index = inputs(model, 4)
    masks = torch.rand(4, 96, 96) > 0.7
    rehearsal = model.rehearse(pixels, ids, words, index.long(), masks)
    with torch.no_grad():
        torch.testing.assert_close(rehearsal.logits, model(pixels, ids, words, index.long()))
    assert tuple(m.shape[1] for m in rehearsal.maps) == model.map_widths
    assert all(m.shape[0] == 2 for m in rehearsal.maps)
    for weights in rehearsal.attention:
        assert weights.shape[:2] == (4, 20)
        torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
        assert not weights[~words].any()
    assert rehearsal.extra is not None
    assert float(rehearsal.extra["steps"].detach()) > 0


def test_gradients_reach_everything() -> None:
    torch.manual_seed(0)
    model = STEP(TINY).train()
    pixels, ids, words, index = inputs(model, 4)
    masks = torch.rand(4, 96, 96) > 0.7
    rehearsal = model.rehearse(pixels, ids, words, index.long(), masks)
    assert rehearsal.extra is not None
    (rehearsal.logits.square().mean() + rehearsal.extra["steps"]).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # adding one number to all scores of a pixel changes no softmax
    assert set(without) <= {"ht.bias"}, without


def test_the_atrous_convolution_sees_far() -> None:
    """Rate 3: a cell hears from cells three away, and not from its neighbours."""
    module = Atrous(2, 3, 12).eval()
    x = torch.zeros(1, 2, 12, 12, requires_grad=True)
    nn.init.constant_(module.bn.bias, 10.0)
    module(x)[0, :, 6, 6].sum().backward()
    assert x.grad is not None
    touched = x.grad[0].abs().sum(0).nonzero().tolist()
    assert touched == [[a, b] for a in (3, 6, 9) for b in (3, 6, 9)]


def test_what_is_missing_from_the_gru_is_zero() -> None:
    """The first step has no state yet, and nothing to echo."""
    gru = ConvGRU(3, 4).double()
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    filled = torch.cat((x, torch.zeros(2, 2, 6, 6, dtype=torch.float64)), 1)
    zero = torch.zeros(2, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(gru(x, None), gru(filled, zero), rtol=0, atol=1e-12)
