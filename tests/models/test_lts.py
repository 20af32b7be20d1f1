from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from refedge.export.from_torch import to_onnx
from refedge.export.lint import require_clean
from refedge.models.aspp import ASPP
from refedge.models.darknet import ConvNorm
from refedge.models.locators import CrossAttention, Filtering, WordsToPixels
from refedge.models.lts import CONFIGS, LTS, PAPER, TINY, LTSConfig
from refedge.models.lts_neck import Neck, Share, coordinates, enlarge
from refedge.models.parts import HOST, Framing, Part
from refedge.models.seeded import seed_weights
from torch import Tensor, nn

from .networks import taken_by

# every option at a size that costs little
VARIANTS = {
    "tiny": TINY,
    "filtering": replace(TINY, locator="filtering", filters=2, kernel=3),
    "stride16": replace(TINY, locator="filtering", stride=16, doublings=(24, 16), codes=2),
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> LTS:
    return seed_weights(LTS(VARIANTS[request.param]), 3)


@pytest.fixture(scope="module")
def tiny() -> LTS:
    return seed_weights(LTS(TINY), 3)


def inputs(model: LTS, batch: int, seed: int) -> tuple[Tensor, ...]:
    """Pixels of half as many pictures, ids, words, image_index."""
    text, image, mask = model.parts()
    return (
        *taken_by(image, batch, seed),
        *taken_by(text, batch, seed),
        taken_by(mask, batch, seed)[0],
    )


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sizes_of_the_paper() -> None:
    """specs: the tensors of the table at 416."""
    with torch.device("meta"):
        model = LTS(PAPER).eval()
        pixels = torch.empty(1, 416, 416, 3, dtype=torch.uint8)
        ids = torch.empty(1, 15, dtype=torch.int32)
        words = torch.empty(1, 15, dtype=torch.bool)
        gate, kernels, biases = model.encode_text(ids, words)
        top, middle, low = model.encode_image(pixels)
        fused = model.neck((top, middle, low), gate, None)
        logits = model(pixels, ids, words)
        head = model.head(fused, fused[:, :1])
    assert [tuple(t.shape[1:]) for t in (gate, kernels, biases)] == [
        (1024, 1, 1),
        (1, 1, 512),
        (1, 1, 1),
    ]
    assert [tuple(t.shape[1:]) for t in (top, middle, low)] == [
        (1024, 13, 13),
        (512, 26, 26),
        (512, 26, 26),
    ]
    assert fused.shape == (1, 512, 26, 26)
    assert head.shape == (1, 1, 104, 104)
    assert logits.shape == (1, 416, 416)
    assert parameters(model.backbone) == 40_584_928
    assert parameters(model.locator) == 1024 * 513 + 513
    gru = 2 * 3 * 512 * (300 + 512 + 2)
    assert parameters(model.recurrent) == gru
    assert model.framing == Framing("letterbox", "bilinear", (128, 128, 128), 0.35)


def test_the_papers_transformer_attends_with_eight_heads_of_32() -> None:
    with torch.device("meta"):
        model = LTS(replace(PAPER, locator="transformer"))
    shapes = {port.name: port.shape[1:] for port in model.parts()[0].outputs}
    assert shapes["keys_1"] == (8, 32, 15)
    assert shapes["values_2"] == (8, 15, 32)
    assert isinstance(model.locator, CrossAttention)
    assert model.locator.positions.shape == (1, 676, 256)


def test_tiny_is_tiny() -> None:
    assert 0.5e6 <= parameters(LTS(TINY)) <= 1.3e6
    assert TINY.framing == Framing()
    assert (TINY.size, TINY.words, TINY.vocabulary) == (96, 20, 64)
    assert set(CONFIGS) == {"paper", "tiny"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 100},
        {"stride": 4},
        {"codes": 3},
        {"locator": "elsewhere"},
        {"filters": 0},
        {"kernel": 5},
        {"heads": 7},
        {"layers": 0},
        {"doublings": (8, 8, 8, 8)},
    ],
)
def test_impossible_configurations(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        replace(TINY, **wrong)


def test_high_modules_exist(model: LTS) -> None:
    """Each prefix names a module in one of the variants; all of the last layers are named."""
    names = {name for name, _ in model.named_modules()}
    either = {"locator.score"} if model.config.locator == "filtering" else {"locator.evidence"}
    assert set(model.high) - either <= names
    assert "head.logit" in model.high


def test_ports_are_what_parts_give(model: LTS) -> None:
    for part in model.parts():
        given = taken_by(part, 4, 0)
        assert [tuple(t.shape[1:]) for t in given] == [p.shape[1:] for p in part.inputs], part.name
        assert [str(t.dtype).removeprefix("torch.") for t in given] == [
            p.dtype for p in part.inputs
        ]
        with torch.no_grad():
            found = part.module(*given)
        found = (found,) if isinstance(found, Tensor) else found
        assert [tuple(t.shape[1:]) for t in found] == [p.shape[1:] for p in part.outputs], part.name


def test_parts_chain_to_the_whole(model: LTS) -> None:
    text, image, mask = model.parts()
    pixels, ids, words, index = inputs(model, 5, 1)
    assert len(pixels) == 3
    with torch.no_grad():
        known = {
            **dict(zip((p.name for p in text.outputs), text.module(ids, words), strict=True)),
            **dict(zip((p.name for p in image.outputs), image.module(pixels), strict=True)),
            "words": words,
            "image_index": index,
        }
        whole = model(pixels, ids, words, index)
        assert torch.equal(mask.module(*(known[p.name] for p in mask.inputs)), whole)
        repeated = model(pixels[index.long()], ids, words)
    # the same sums in another blocking
    torch.testing.assert_close(repeated, whole, rtol=0, atol=2e-4)


def test_padding_has_no_influence(model: LTS) -> None:
    pixels, ids, words, index = inputs(model, 4, 0)
    other = torch.where(words, ids, torch.full_like(ids, 7))
    assert not torch.equal(ids, other)
    with torch.no_grad():
        assert torch.equal(model(pixels, ids, words, index), model(pixels, other, words, index))


def test_rows_have_no_influence_on_each_other(model: LTS) -> None:
    pixels, ids, words, index = inputs(model, 4, 2)
    with torch.no_grad():
        together = model(pixels, ids, words, index)
        for i in range(4):
            row = slice(i, i + 1)
            alone = model(pixels[index[row].long()], ids[row], words[row])
            # logits have a standard deviation of 2; the same sums in another blocking
            torch.testing.assert_close(alone, together[row], rtol=0, atol=2e-4)


def test_words_and_pictures_matter(model: LTS) -> None:
    pixels, ids, words, index = inputs(model, 4, 0)
    with torch.no_grad():
        logits = model(pixels, ids, words, index)
        said = model(pixels, ids.roll(1, 0), words.roll(1, 0), index)
        seen = model(pixels.flip(0), ids, words, index)
    assert float((logits - said).std()) > 0.03 * float(logits.std())
    assert float((logits - seen).std()) > 0.3 * float(logits.std())


def test_seeded_weights_say_something(model: LTS) -> None:
    """design: O(1) activations and 20 to 60 % positive pixels, also on other inputs."""
    pixels, ids, words, index = inputs(model, 4, 9)
    with torch.no_grad():
        logits = model(pixels, ids, words, index)
        maps = model.encode_image(pixels)
    assert 0.2 <= float((logits > 0).float().mean()) <= 0.6
    assert all(0.1 < float(m.std()) < 10 for m in maps)


def test_rescale_moves_the_logits(tiny: LTS) -> None:
    given = inputs(tiny, 2, 0)
    moved = LTS(TINY).eval()
    moved.load_state_dict(tiny.state_dict())
    moved.rescale(0.7, 3.0)
    with torch.no_grad():
        torch.testing.assert_close(moved(*given), 3.0 * (tiny(*given) - 0.7), rtol=0, atol=1e-3)


def test_rehearsal_shows_what_training_looks_at(model: LTS) -> None:
    pixels, ids, words, index = inputs(model, 4, 0)
    masks = torch.zeros(4, 96, 96, dtype=torch.bool)
    masks[:, 16:48, 32:64] = True
    with torch.no_grad():
        seen = model.rehearse(pixels, ids, words, index.long(), masks)
        assert torch.equal(seen.logits, model(pixels, ids, words, index))
    assert [m.shape[1] for m in seen.maps] == list(model.map_widths)
    assert [len(m) for m in seen.maps] == [2, 2, 4]
    assert all(96 % m.shape[2] == 0 for m in seen.maps)
    side = model.config.side
    for weights in seen.attention:
        assert weights.shape == (4, 20, side**2)
        torch.testing.assert_close(weights.sum(1), torch.ones(4, side**2))
        assert not weights[~words].any()
    assert len(seen.attention) == (2 if model.config.locator == "transformer" else 0)


def test_the_location_loss_asks_for_the_share_of_each_cell(tiny: LTS) -> None:
    """Binary cross-entropy of the scores against the mask's mean in each cell, weighted."""
    pixels, ids, words, index = inputs(tiny, 4, 0)
    masks = torch.rand(4, 96, 96, generator=torch.Generator().manual_seed(0)) > 0.7
    with torch.no_grad():
        extra = tiny.rehearse(pixels, ids, words, index.long(), masks).extra
        image, text = tiny.encode_image(pixels), tiny.encode_text(ids, words)
        scores = tiny.decode(words, text, image, index).scores[:, 0].double()
    share = masks.double().reshape(4, 12, 8, 12, 8).mean((2, 4))
    prior = torch.sigmoid(scores)
    wanted = -(share * prior.log() + (1 - share) * (1 - prior).log()).mean()
    assert extra is not None
    assert float(extra["location"]) == pytest.approx(float(wanted), rel=1e-5)
    half = LTS(replace(TINY, location=0.5)).eval()
    half.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        found = half.rehearse(pixels, ids, words, index.long(), masks).extra
    assert found is not None
    assert float(found["location"]) == pytest.approx(0.5 * float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_gradients_reach_everything_that_is_trained(name: str) -> None:
    torch.manual_seed(0)
    model = LTS(VARIANTS[name]).train()
    pixels, ids, words, index = inputs(model, 4, 0)
    seen = model.rehearse(pixels, ids, words, index.long(), torch.ones(4, 96, 96) > 0)
    seen.logits.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("kernel", [1, 3])
def test_filtering_is_a_convolution_by_the_sentence(kernel: int) -> None:
    torch.manual_seed(0)
    locator = Filtering(6, 10, 5, kernel, 1).double()
    fused = torch.randn(3, 10, 5, 5, dtype=torch.float64)
    sentence = torch.randn(3, 6, dtype=torch.float64)
    products = locator.project_text(sentence[:, None], sentence)
    scores, same, _ = locator(fused, None, products)
    assert same is fused
    for i in range(3):
        made = locator.kernels[0](sentence[i])
        taps = made[:-1].reshape(kernel, kernel, 10).permute(2, 0, 1)[None]
        wanted = F.conv2d(fused[i : i + 1], taps, made[-1:], padding=kernel // 2)
        torch.testing.assert_close(scores[i : i + 1], wanted)


def test_filtering_again_sees_the_prior() -> None:
    torch.manual_seed(0)
    locator = Filtering(6, 10, 5, 1, 2).eval()
    fused, sentence = torch.randn(2, 10, 5, 5), torch.randn(2, 6)
    kernels, biases = locator.project_text(sentence[:, None], sentence)
    with torch.no_grad():
        scores, refined, _ = locator(fused, None, (kernels, biases))
        first = torch.einsum("bc,bchw->bhw", kernels[:, 0, 0], fused)[:, None] + biases[:, :1]
        weight = torch.cat((locator.mix[0].conv.weight, locator.evidence[0].weight), dim=1)
        scale = (1 + locator.mix[0].bn.eps) ** -0.5  # the norm is still the identity
        weight[:, :10] *= scale
        both = torch.cat((fused, torch.sigmoid(first)), dim=1)
        wanted = F.leaky_relu(F.conv2d(both, weight, padding=1), 0.1)
        torch.testing.assert_close(refined, wanted, rtol=1e-4, atol=1e-5)
        again = torch.einsum("bc,bchw->bhw", kernels[:, 1, 0], wanted)[:, None] + biases[:, 1:]
        torch.testing.assert_close(scores, again, rtol=1e-4, atol=1e-4)


def test_pixels_attend_to_words_as_torch_does() -> None:
    torch.manual_seed(0)
    module = WordsToPixels(6, 8, 2).double()
    x, states = (torch.randn(3, n, w, dtype=torch.float64) for n, w in ((9, 8), (5, 6)))
    words = torch.arange(5)[None] < torch.tensor([[5], [1], [3]])
    found, weights = module(x, *module.project_text(states), words)
    theirs = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True).double()
    theirs.load_state_dict(
        {
            "q_proj_weight": module.q.weight,
            "k_proj_weight": module.k.weight,
            "v_proj_weight": module.v.weight,
            "in_proj_bias": torch.cat((module.q.bias, module.k.bias, module.v.bias)),
            "out_proj.weight": module.out.weight,
            "out_proj.bias": module.out.bias,
        }
    )
    wanted, shares = theirs(x, states, states, key_padding_mask=~words, average_attn_weights=False)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(weights, shares)


def _unit(norm: nn.Module) -> None:
    """A norm that does nothing."""
    nn.init.constant_(norm.running_var, 1.0 - norm.eps)


@torch.no_grad()
def test_the_neck_is_convolutions_of_concatenated_maps() -> None:
    """specs §2: with idle norms, the sums of shares are cbr1x1(cat(...)) of the spec."""
    torch.manual_seed(0)
    neck = Neck((4, 6, 8), 10, 12, 16, 4, 8).double().eval()
    for module in neck.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            _unit(module)
    v3, v4, v5 = (torch.randn(2, c, s, s, dtype=torch.float64) for c, s in ((4, 8), (6, 4), (8, 2)))
    gate = torch.randn(2, 10, 1, 1, dtype=torch.float64)
    found = neck(neck.laterals((v3, v4, v5)), gate, None)

    def joined(maps: list[Tensor], shares: list[nn.Module], kernel: int = 1) -> Tensor:
        weight = torch.cat([s.conv.weight if isinstance(s, Share) else s.weight for s in shares], 1)
        y = F.conv2d(torch.cat(maps, dim=1), weight, padding=kernel // 2)
        return F.leaky_relu(y, 0.1)

    m5 = F.relu(neck.top(v5) * gate)
    m4 = joined([neck.middle[0](v4), enlarge(m5, 2)], [neck.middle[1], neck.top_to_middle])
    m3 = joined([F.avg_pool2d(neck.low[0](v3), 2), m4], [neck.low[2], neck.middle_to_low])
    m = joined(
        [neck.from_low[0](m3), neck.from_middle[0](m4), enlarge(neck.from_top[0](m5), 2)],
        [neck.from_low[1], neck.from_middle[1], neck.from_top[1]],
    )
    places = neck.code.expand(2, -1, -1, -1)
    torch.testing.assert_close(found, joined([m, places], [neck.out, neck.place], 3))


@torch.no_grad()
def test_the_pyramid_is_one_projection_of_all_branches() -> None:
    torch.manual_seed(0)
    module = ASPP(6, 4, (1, 2)).double().eval()
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)):
        _unit(norm)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    pooled = module.pooled(x.mean((2, 3))).expand(-1, -1, 5, 5)
    both = torch.cat([*(b(x) for b in module.branches), pooled], dim=1)
    weight = torch.cat((module.project.conv.weight, module.project_pooled.weight), dim=1)
    torch.testing.assert_close(module(x), F.leaky_relu(F.conv2d(both, weight), 0.1))
    assert [b.conv.dilation for b in module.branches if isinstance(b, ConvNorm)] == [
        (1, 1), (1, 1), (2, 2),
    ]  # fmt: skip


def test_coordinates_say_where_a_cell_is() -> None:
    code = coordinates(4, 8)
    np.testing.assert_allclose(
        code[0, :, 1, 3], [0.5, -0.5, 1.0, 0.0, 0.75, -0.25, 0.25, 0.25], atol=1e-7
    )
    assert torch.equal(coordinates(4, 2), code[:, 4:6])


def session(part: Part) -> ort.InferenceSession:
    model = to_onnx(part)
    require_clean(model)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert not set(kinds) & {"GRU", "LSTM", "Expand", "Attention"}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options)


@pytest.mark.parametrize(
    ("name", "traced"),
    [
        ("filtering", ("mask",)),
        ("stride16", ("mask",)),
    ],
)
def test_exported_parts_give_torchs_logits(name: str, traced: tuple[str, ...]) -> None:
    """Of each variant what tests/models/test_families.py has not seen."""
    model = seed_weights(LTS(replace(VARIANTS[name], words=6)), 3)
    sessions = {part.name: session(part) for part in model.parts() if part.name in traced}
    for batch in (1, 4):
        given = inputs(model, batch, 7)
        known = {name: t.numpy() for name, t in zip(HOST, given, strict=True)}
        for part in model.parts():
            taken = {port.name: known[port.name] for port in part.inputs}
            if part.name in traced:
                found = sessions[part.name].run(None, taken)
            else:
                with torch.no_grad():
                    found = part.module(*(torch.from_numpy(x) for x in taken.values()))
            known |= {port.name: np.asarray(x) for port, x in zip(part.outputs, found, strict=True)}
        with torch.no_grad():
            logits = model(*given).numpy()
        # design: 1e-3 sigma; float32 rounding alone is a hundredth of it
        assert np.abs(known["logits"] - logits).max() <= 1e-4 * logits.std()


def test_configurations_are_hashable_and_equal_by_value() -> None:
    assert hash(LTSConfig()) == hash(PAPER)
    assert replace(TINY, size=128).side == 16
