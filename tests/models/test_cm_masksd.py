from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from refedge.export.from_torch import to_onnx
from refedge.export.lint import require_clean
from refedge.models.clip import ClipText, ClipVision
from refedge.models.clip_resnet import ClipResNet
from refedge.models.cm_masksd import CONFIGS, PAPER, RN101, TINY, CMMaskSD, CMMaskSDConfig
from refedge.models.cris import (
    Attention,
    CoordConv,
    Decoder,
    DecoderLayer,
    Projector,
    PyramidNeck,
    sinusoids,
)
from refedge.models.distil import choose, divergence
from refedge.models.parts import Part, pictures
from refedge.models.seeded import _fill
from torch import Tensor, nn

from .networks import taken_by

SMALL = replace(
    TINY,
    layers=1,
    text=ClipText(vocabulary=64, width=32, layers=1, heads=4, positions=20),
    vision=ClipVision(patch=8, width=32, layers=1, heads=4),
)
SMALL_RN = replace(SMALL, vision=None, resnet=ClipResNet((1, 1, 1, 1), 16), enlarge=(2, 2))


@torch.no_grad()
def seeded(config: CMMaskSDConfig, seed: int = 3) -> CMMaskSD:
    """Weights of order one, norms with statistics of a real forward, 40 % positive pixels."""
    model = CMMaskSD(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        _fill(name, parameter, generator)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model.train()(*inputs(model, 8))
    for norm in norms:
        norm.momentum = 0.1
    logits = model.eval()(*inputs(model, 8))
    model.rescale(float(logits.quantile(0.6)), float(2.0 / logits.std()))
    return model


def inputs(model: CMMaskSD, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, ids, words and the number of each expression's picture."""
    text, image, mask = model.parts()
    (pixels,), index = taken_by(image, batch, seed), taken_by(mask, batch, seed)[0]
    return pixels, *taken_by(text, batch, seed), index.long()  # type: ignore[return-value]


@cache
def tiny() -> CMMaskSD:
    return seeded(TINY)


@cache
def small_rn() -> CMMaskSD:
    return seeded(SMALL_RN)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts() -> None:
    with torch.device("meta"):
        paper, rn101 = CMMaskSD(PAPER), CMMaskSD(RN101)
    # 149.62 M at 224 pixels, 900 instead of 196 positions
    assert count(paper.clip) == 149_620_736 + (900 - 196) * 768
    # 3 layers of: attention to itself and to words, feed-forward, norms
    layer = 2 * (4 * 512 * 512 + 4 * 512) + 2 * 512 * 2048 + 2560 + 2 * 2048 + 5 * 2 * 512
    assert count(paper.decoder) == 3 * layer + 1024
    assert count(paper.projector) == pytest.approx(4.79e6, rel=1e-2)
    assert count(rn101.decoder) == count(paper.decoder)
    # RN101's tower (56.26 M), its shortcut, the larger grid, the text tower and its projection
    extra = 2048 * 512 + 1024 + (169 - 49) * 2048
    assert count(rn101.clip) == pytest.approx(56.26e6 + extra + 63.43e6, rel=1e-3)
    assert paper.branches is not None
    assert count(paper.branches) == 512 + 512


def test_tiny_is_tiny() -> None:
    assert count(CMMaskSD(TINY)) <= 800_000
    assert CONFIGS["tiny"].framing.threshold == 0.5


def test_the_papers_framing() -> None:
    framing = CMMaskSD(SMALL).framing
    assert (framing.resize, framing.threshold) == ("squash", 0.5)
    assert (PAPER.framing.resize, PAPER.framing.filter) == ("letterbox", "bicubic")
    assert PAPER.framing.threshold == 0.35
    assert PAPER.framing.fill == (123, 117, 104)
    assert (PAPER.grid, RN101.grid, PAPER.vocabulary) == (30, 26, 49408)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 100},
        {"vision": None},
        {"resnet": ClipResNet()},
        {"enlarge": (3, 1)},
        {"width": 60},
        {"words": 21},
        {"mask_patches": 0.7},
        {"distil_share": 0.0},
    ],
)
def test_impossible_configurations(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        replace(TINY, **wrong)


@torch.no_grad()
def test_the_dynamic_convolution_is_torchs_grouped_convolution() -> None:
    torch.manual_seed(0)
    projector = Projector(16, 12, (2, 2)).eval()
    x, state = torch.randn(3, 16, 5, 5), torch.randn(3, 12)
    seen, made = projector.vis(x), projector.txt(state)
    kernels = made[:, :-1].reshape(3, 8, 3, 3)
    expected = F.conv2d(
        seen.reshape(1, 24, 20, 20), kernels, made[:, -1], padding=1, groups=3
    ).transpose(0, 1)
    found = projector(x, *projector.kernel(state))
    # the 1x1 convolution is applied to the kernel, so sums have another order
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    projector.rescale(0.5, 3.0)
    torch.testing.assert_close(
        projector(x, *projector.kernel(state)), 3.0 * (expected - 0.5), atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_coordinates_are_two_more_channels() -> None:
    torch.manual_seed(0)
    conv = CoordConv(6, 8, 4).eval()
    x = torch.randn(2, 6, 4, 4)
    line = torch.linspace(-1, 1, 4)
    across, down = line.expand(2, 1, 4, 4), line[:, None].expand(2, 1, 4, 4)
    expected = conv.conv1(torch.cat((x, across, down), dim=1))
    torch.testing.assert_close(conv(x), expected)


@torch.no_grad()
def test_a_decoder_layer_is_cris_layer() -> None:
    """The public layer, put together from torch's own attention."""
    torch.manual_seed(0)
    layer = DecoderLayer(32, 24, 4, 48, 0.0).eval()
    for p in layer.parameters():
        p.normal_(0.5 if p.ndim == 1 else 0.0, 0.3)
    x, text = torch.randn(2, 9, 32), torch.randn(2, 5, 24)
    places, order = torch.randn(9, 32), torch.randn(5, 24)
    words = torch.tensor([[True] * 5, [True, True, False, False, False]])

    def attend(ours: Attention, q: Tensor, k: Tensor, v: Tensor, hide: Tensor | None) -> Tensor:
        theirs = nn.MultiheadAttention(32, 4, kdim=k.shape[2], vdim=v.shape[2], batch_first=True)
        split = [ours.q_proj, ours.k_proj, ours.v_proj]
        if theirs.in_proj_weight is None:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            for name, part in zip(names, split, strict=True):
                getattr(theirs, name).copy_(part.weight)
        else:
            theirs.in_proj_weight.copy_(torch.cat([part.weight for part in split]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in split]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
        out: Tensor = theirs.eval()(q, k, v, key_padding_mask=hide, need_weights=False)[0]
        return out

    y = layer.norm1(x)
    y = attend(layer.self_attn, y + places, y + places, y, None)
    expected = x + layer.self_attn_norm(y)
    y = layer.norm2(expected) + places
    y = attend(layer.multihead_attn, y, text + order, text, ~words)
    expected = expected + layer.cross_attn_norm(y)
    expected = expected + layer.ffn(layer.norm3(expected))

    keys, values = layer.multihead_attn.keys_values(text + order, text)
    found, weights = layer(x, places, keys, values, words)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weights.sum(3), torch.ones(2, 4, 9))
    assert not weights[1, :, :, 2:].any()


def test_positions_are_the_papers_sinusoids() -> None:
    table = sinusoids(8, 5)
    for place in range(5):
        for i in range(0, 8, 2):
            angle = place / 10000 ** (i / 8)
            assert float(table[place, i]) == pytest.approx(np.sin(angle), abs=1e-6)
            assert float(table[place, i + 1]) == pytest.approx(np.cos(angle), abs=1e-6)
    places = Decoder(1, 16, 8, 2, 8, 3, 4, 0.0).places.reshape(3, 3, 16)
    assert torch.equal(places[0, :, :8], sinusoids(8, 3))  # along x
    assert torch.equal(places[:, 0, 8:], sinusoids(8, 3))  # along y


def test_the_pyramid_has_the_publics_sizes() -> None:
    with torch.device("meta"):
        state = PyramidNeck((512, 1024, 512), 512, 512, 26).state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    assert shapes["txt_proj.0.weight"] == (1024, 512)
    assert shapes["f1_v_proj.0.weight"] == (1024, 512, 1, 1)
    assert shapes["f2_cat.0.weight"] == (512, 1536, 1, 1)
    assert shapes["f3_v_proj.0.weight"] == (256, 512, 3, 3)
    assert shapes["f3_cat.0.weight"] == (512, 768, 1, 1)
    assert shapes["f4_proj5.0.weight"] == (512, 1024, 3, 3)
    assert shapes["aggr.0.weight"] == (512, 1536, 1, 1)
    assert shapes["coordconv.0.conv1.0.weight"] == (512, 514, 3, 3)


@pytest.mark.parametrize("build", [tiny, small_rn])
@torch.no_grad()
def test_parts_chain_to_the_whole(build: object) -> None:
    model = tiny() if build is tiny else small_rn()
    text, image, mask = model.parts()
    pixels, ids, words, index = inputs(model, 5, 1)
    assert len(pixels) == pictures(5) == 3
    products, seen = text.module(ids, words), image.module(pixels)
    logits = mask.module(index.to(torch.int32), words, *products, *seen)
    assert torch.equal(logits, model(pixels, ids, words, index))
    for part, outputs in ((text, products), (image, seen), (mask, (logits,))):
        shapes = [tuple(o.shape[1:]) for o in outputs]
        assert shapes == [port.shape[1:] for port in part.outputs]
    repeated = model(pixels[index], ids, words)
    torch.testing.assert_close(logits, repeated, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_has_no_influence() -> None:
    pixels, ids, words, index = inputs(tiny(), 3)
    other = torch.where(words, ids, torch.full_like(ids, 7))
    assert not torch.equal(ids, other)
    for a, b in zip(tiny().encode_text(ids, words), tiny().encode_text(other, words), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(tiny()(pixels, ids, words, index), tiny()(pixels, other, words, index))


@torch.no_grad()
def test_rows_do_not_know_each_other() -> None:
    pixels, ids, words, index = inputs(tiny(), 4)
    whole = tiny()(pixels, ids, words, index)
    for row in range(4):
        alone = tiny()(pixels[index[row]][None], ids[row][None], words[row][None])
        # products of other sizes add up in another order
        torch.testing.assert_close(whole[row], alone[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_seeded_weights_say_something() -> None:
    pixels, ids, words, index = inputs(tiny(), 6, 9)
    logits = tiny()(pixels, ids, words, index)
    assert 0.2 <= float((logits > 0).float().mean()) <= 0.6
    assert float((logits[0] - logits[1]).abs().mean()) > 0.1  # one picture, two expressions
    assert index[0] == index[1]


def test_what_training_looks_at() -> None:
    model = CMMaskSD(TINY).train()
    pixels, ids, words, index = inputs(model, 8)
    masks = torch.rand(8, 96, 96) > 0.8
    seen = model.rehearse(pixels, ids, words, index, masks)
    assert seen.logits.shape == (8, 96, 96)
    assert tuple(m.shape[1] for m in seen.maps) == model.map_widths == (64,)
    assert seen.maps[0].shape == (4, 64, 12, 12)
    assert len(seen.attention) == TINY.layers
    for weights in seen.attention:
        assert weights.shape == (8, 20, 144)
        torch.testing.assert_close(weights.sum(1), torch.ones(8, 144))
        assert not weights.transpose(1, 2)[~words[:, None].expand(-1, 144, -1)].any()
    assert seen.extra is not None
    branches = ("vision", "language")
    assert set(seen.extra) == {f"{kind}_{b}" for kind in ("masked", "distil") for b in branches}
    assert all(v.ndim == 0 and torch.isfinite(v) for v in seen.extra.values())
    without = CMMaskSD(replace(TINY, distil=False))
    assert without.rehearse(pixels, ids, words, index, masks).extra is None
    assert not [n for n, _ in without.named_parameters() if n.startswith("branches")]


def test_losses_fall_on_one_batch() -> None:
    torch.manual_seed(0)
    model = CMMaskSD(replace(SMALL, distil_share=0.5)).train()
    pixels, ids, words, index = inputs(model, 4)
    masks = torch.zeros(4, 96, 96, dtype=torch.bool)
    for row in range(4):
        masks[row, 16 * row : 16 * row + 32, 20:70] = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    totals, parts = [], []
    for _ in range(12):
        seen = model.rehearse(pixels, ids, words, index, masks)
        assert seen.extra is not None
        parts.append({k: float(v.detach()) for k, v in seen.extra.items()})
        loss = F.binary_cross_entropy_with_logits(seen.logits, masks.float())
        total = loss + sum(seen.extra.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.7 * totals[0]
    assert parts[-1]["masked_vision"] < parts[0]["masked_vision"]
    assert parts[-1]["masked_language"] < parts[0]["masked_language"]


def test_the_teacher_has_no_gradient() -> None:
    """The branch that sees all is a constant to the losses; what replaces the masked learns."""
    torch.manual_seed(0)
    model = CMMaskSD(SMALL).train()
    pixels, ids, words, index = inputs(model, 4)
    embedded = model.clip.text_model.embeddings.token_embedding(ids)
    maps = tuple(m[index] for m in model.look(pixels))
    teacher = torch.randn(4, 1, 24, 24, requires_grad=True)
    masks = torch.zeros(4, 96, 96, dtype=torch.bool)
    assert model.branches is not None
    losses = model.branches(
        model, maps, embedded, model.read(embedded, words), words, teacher, masks
    )
    (losses["distil_vision"] + losses["distil_language"]).backward()
    assert teacher.grad is None
    for parameter in (*model.branches.patch, model.branches.word):
        assert parameter.grad is not None
        assert parameter.grad.any()


def test_divergence_is_kullback_and_leiblers() -> None:
    same = torch.randn(2, 1, 3, 3)
    assert float(divergence(same, same)) == pytest.approx(0.0, abs=1e-6)
    p, q = torch.sigmoid(torch.tensor(0.3)), torch.sigmoid(torch.tensor(-1.2))
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    found = divergence(torch.tensor([-1.2]), torch.tensor([0.3]))
    torch.testing.assert_close(found, expected)


def test_masked_branches_leave_the_norms_alone() -> None:
    """Statistics are those of whole pictures and expressions, which is what is run later."""
    both = []
    for distil in (True, False):
        torch.manual_seed(0)
        model = CMMaskSD(replace(SMALL, distil=distil)).train()
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if not name.startswith("branches"):
                _fill(name, p.data, generator)
        model.rehearse(*inputs(model, 4), torch.zeros(4, 96, 96, dtype=torch.bool))
        both.append({k: v for k, v in model.state_dict().items() if "running" in k})
        assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert len(both[0]) >= 10
    assert all(torch.equal(v, both[1][k]) for k, v in both[0].items())


def test_what_is_masked() -> None:
    torch.manual_seed(0)
    scores = torch.rand(5, 40)
    allowed = torch.ones(5, 40, dtype=torch.bool)
    chosen = choose(scores, allowed, 0.25)
    assert chosen.sum(1).tolist() == [10] * 5
    top = scores.argsort(dim=1, descending=True)[:, :20]
    inside = torch.zeros_like(allowed).scatter(1, top, True)
    assert not (chosen & ~inside).any()
    assert not torch.equal(chosen, choose(scores, allowed, 0.25))  # a random half
    few = torch.arange(40)[None] < torch.tensor([[1], [2], [3], [0], [40]])
    assert choose(scores, few, 0.2).sum(1).tolist() == [1, 1, 1, 0, 8]
    assert not (choose(scores, few, 0.2) & ~few).any()


def test_start_and_end_are_never_muted() -> None:
    model = CMMaskSD(replace(SMALL, brackets=True))
    assert model.branches is not None
    words = torch.arange(20)[None] < torch.tensor([[2], [3], [9], [20]])
    for _ in range(5):
        muted = model.branches.mute_words(torch.rand(4, 144, 20), words)
        assert not muted[:, 0].any()
        assert not (muted & ~words).any()
        assert not muted[torch.arange(4), words.sum(1) - 1].any()
        assert muted.sum(1).tolist() == [0, 1, 1, 4]


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@torch.no_grad()
def require_parity(part: Part) -> onnx.ModelProto:
    graph = to_onnx(part)
    require_clean(graph)
    runner = session(graph)
    for batch in (1, 4):
        example = taken_by(part, batch, 5)
        expected = part.module(*example)
        expected = expected if isinstance(expected, tuple) else (expected,)
        feeds = {p.name: v.numpy() for p, v in zip(part.inputs, example, strict=True)}
        outputs = runner.run(None, feeds)
        for port, found, wanted in zip(part.outputs, outputs, expected, strict=True):
            # float32 in another order: a few 1e-6 of the spread; the bar of the design is 1e-3
            assert np.abs(found - wanted.numpy()).max() <= 1e-4 * float(wanted.std()), port.name
    return graph


def test_the_graphs_of_the_transformer() -> None:
    model = seeded(SMALL)
    graphs = {part.name: require_parity(part) for part in model.parts() if part.name != "text"}
    names = {t.name for g in graphs.values() for t in g.graph.initializer}
    assert not [n for n in names if n.startswith("branches")]
    kinds = {name: [n.op_type for n in g.graph.node] for name, g in graphs.items()}
    assert kinds["mask"].count("Gather") == 3  # the picture's row, the layer's keys and values
    # two of the neck, two of the projector, the moves of the taps; coordinates are a constant
    assert kinds["mask"].count("Conv") == 5
    assert kinds["mask"].count("BatchNormalization") == 1  # behind the gate
    assert kinds["image"].count("Conv") == 2  # patches, and the neck's 1x1
    assert not {"ScatterND", "Expand", "Tile"} & {k for ks in kinds.values() for k in ks}


def test_the_graphs_of_the_residual_network() -> None:
    _, image, mask = small_rn().parts()
    assert [port.name for port in image.outputs] == ["seen_1", "seen_2", "seen_3"]
    for part in (image, mask):
        graph = require_parity(part)
        assert not {"Expand", "Tile"} & {n.op_type for n in graph.graph.node}
