from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from refedge.models.gated_neck import Sentence
from refedge.models.m3att import CONFIGS, PAPER, PAPER_DARKNET, TINY, M3Att, M3AttConfig
from refedge.models.m3att_config import DarknetConfig, GruConfig
from refedge.models.m3att_heads import MaskHead, Reconstruction
from refedge.models.mutual_attention import MutualAttention, MutualDecoder
from refedge.models.parts import HOST
from refedge.models.seeded import seed_weights
from refedge.models.swin import SwinConfig
from torch import Tensor, nn

from .networks import compare_parts, graphs_of, taken_by

GATED = replace(TINY, early_fusion=True, skip=False)
SMALL_SWIN = SwinConfig(width=16, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8), window=3, drop_path=0.0)
# the two variants of the paper, small
SWIN_BERT = replace(GATED, darknet=None, swin=SMALL_SWIN, stride=16, doublings=3, layers=2)
DARKNET_GRU = replace(GATED, bert=None, gru=GruConfig(64, 24, 32), words=15, layers=1)
SWIN_GRU = replace(SWIN_BERT, bert=None, gru=GruConfig(64, 24, 32), words=6)
VARIANTS = {"tiny": TINY, "gated": GATED, "swin-bert": SWIN_BERT, "darknet-gru": DARKNET_GRU}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> M3Att:
    return seed_weights(M3Att(VARIANTS[request.param]), 3)


def inputs(model: M3Att, batch: int, seed: int) -> tuple[Tensor, ...]:
    """Pixels, ids, words and the index of pictures."""
    known: dict[str, Tensor] = {}
    for part in model.parts():
        names = (port.name for port in part.inputs)
        known |= dict(zip(names, taken_by(part, batch, seed), strict=True))
    return tuple(known[name] for name in HOST)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def test_mutual_attention_is_the_papers_formula() -> None:
    """The literal formula, head by head, F_la made; padded words in the second row."""
    rng = np.random.default_rng(0)
    heads, length, depth, pixels = 3, 5, 4, 7
    keys, values = rng.normal(size=(2, 2, length, heads * depth))
    seen_keys, seen_values = rng.normal(size=(2, 2, pixels, heads * depth))
    words = np.array([[True] * length, [True, True, True, False, False]])
    seen_from = np.zeros((2, length, heads * depth))
    told_to = np.zeros((2, pixels, heads * depth))
    mean = np.zeros((2, length, pixels))
    for b in range(2):
        for h in range(heads):
            part = slice(h * depth, (h + 1) * depth)
            a = keys[b, :, part] @ seen_keys[b, :, part].T / np.sqrt(depth)
            seen_from[b, :, part] = softmax(a, 1) @ seen_values[b, :, part]
            seen_from[b, ~words[b]] = 0.0
            by_word = softmax(np.where(words[b][None], a.T, -1e4), 1)
            told_to[b, :, part] = by_word @ values[b, :, part]
            mean[b] += by_word.T / heads
    expected = seen_from @ told_to.transpose(0, 2, 1) / np.sqrt(heads * depth)

    def split(x: np.ndarray) -> Tensor:
        rows = torch.from_numpy(x)
        return rows.reshape(2, x.shape[1], heads, depth).transpose(1, 2)

    product, told = MutualAttention()(
        split(keys), split(values), torch.from_numpy(words),
        split(seen_keys).transpose(2, 3), split(seen_values),
    )  # fmt: skip
    np.testing.assert_allclose(product.numpy(), expected, atol=1e-13)
    np.testing.assert_allclose(told.numpy(), mean, atol=1e-13)
    np.testing.assert_allclose(told.numpy().sum(1), 1.0, atol=1e-13)
    assert not product[1, 3:].any()
    assert not told[1, 3:].any()


def test_the_decoder_follows_the_paper() -> None:
    """Two layers by hand: language re-injected between them, F_mul through W_o, post-norm."""
    torch.manual_seed(0)
    decoder = MutualDecoder(8, 2, 16, 2, 4, 6).double().eval()
    for p in decoder.parameters():
        nn.init.normal_(p, std=0.5)
    language = torch.randn(1, 4, 8, dtype=torch.float64)
    vision = torch.randn(1, 6, 8, dtype=torch.float64)
    words = torch.tensor([[True, True, True, False]])
    heads = 2

    def cut(x: Tensor) -> Tensor:
        return torch.stack(x[0].chunk(heads, dim=1))[None]

    pixels = decoder.vision(vision).chunk(4, dim=2)  # keys 1, values 1, keys 2, values 2
    x = decoder.attend[0](language + decoder.positions.double(), words)
    k, u = decoder.language[0](x + language).chunk(2, dim=2)
    y, _ = MutualAttention()(cut(k), cut(u), words, cut(pixels[0]).transpose(2, 3), cut(pixels[1]))
    step = decoder.between[0]
    x = step.norm1(x + y @ step.back.weight.T + step.back.bias)
    x = step.norm2(x + step.feed(x))
    refined = step.norm3(language + x @ step.inject.weight.T + step.inject.bias)
    x = decoder.attend[1](x, words)
    k, u = decoder.language[1](x + refined).chunk(2, dim=2)
    expected, _ = MutualAttention()(
        cut(k), cut(u), words, cut(pixels[2]).transpose(2, 3), cut(pixels[3])
    )
    decoder.positions = decoder.positions.double()
    found, attention = decoder(
        language, decoder.start(language, words), words, decoder.project(vision)
    )
    assert len(attention) == 2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_gate_is_a_weighted_sum_over_words() -> None:
    torch.manual_seed(0)
    module = Sentence(6).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    words = torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        found = module(x, words).numpy()
        scores = np.tanh(module.weigh(x).numpy())
    for b, count in enumerate((4, 2)):
        weights = softmax(scores[b, :count], 0)
        np.testing.assert_allclose(found[b], (weights * x[b, :count].numpy()).sum(0), atol=1e-13)


def test_the_skip_is_a_convolution_of_both_maps_together() -> None:
    """With norms that change nothing, conv(cat(F_mul, fused)) is what the two shares add up to."""
    torch.manual_seed(0)
    head = MaskHead(3, 8, 1, 4, 16, skip=5).double().eval()
    for norm in (head.norm, head.skip[1]):
        norm.eps = 0.0
    product = torch.randn(2, 3, 16, dtype=torch.float64)
    fused = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    both = nn.Conv2d(8, 8, 3, padding=1, bias=False).double()
    both.weight.data = torch.cat((head.first.weight, head.skip[0].weight), dim=1).detach()
    heard: list[Tensor] = []
    head.refine.register_forward_hook(lambda _m, given, _o: heard.append(given[0]))
    with torch.no_grad():
        logits = head(product, head.beside(fused))
        together = both(torch.cat((product.reshape(2, 3, 4, 4), fused), dim=1))
    torch.testing.assert_close(heard[0], nn.functional.leaky_relu(together, 0.1))
    assert logits.shape == (2, 16, 16)


def test_reconstruction_judges_words_only() -> None:
    torch.manual_seed(0)
    module = Reconstruction(4, 9, 6)
    words = torch.tensor([[True, True, True, True], [True, True, False, False]])
    valid = words[:, :, None]
    product = torch.randn(2, 4, 9) * valid
    language = torch.randn(2, 4, 6, requires_grad=True)
    loss = module(product, language, words)
    other = module(product + 5 * ~valid, language + 5 * ~valid, words)
    torch.testing.assert_close(loss, other)
    loss.backward()
    assert language.grad is None, "the target gets no gradient"
    assert module.take.weight.grad is not None
    with torch.no_grad():
        nn.init.zeros_(module.give.weight)
        nn.init.zeros_(module.give.bias)
        sentences = (language * valid).sum(1) / words.sum(1, keepdim=True)
        rows = torch.cat((language[0], language[1, :2], sentences))
        torch.testing.assert_close(module(product, language, words), rows.square().mean())


def count(config: M3AttConfig) -> dict[str, int]:
    with torch.device("meta"):
        model = M3Att(config)
    names = ("text", "backbone", "neck", "encoder", "decoder", "head", "reconstruction")
    return {n: sum(p.numel() for p in getattr(model, n).parameters()) for n in names}


def test_paper_sizes() -> None:
    """By hand from the widths of specs: D 256, 900 tokens of 30 x 30, 3 layers, 20 words."""
    found = count(PAPER)
    assert found["text"] == pytest.approx(108.89e6, rel=1e-3), "BERT-base without pooler"
    assert found["backbone"] == pytest.approx(86.88e6, rel=1e-3), "Swin-B"
    d, n = 256, 900
    attention, feed, norm = 4 * d * (d + 1), 2 * d * 1024 + 1024 + d, 2 * d
    assert found["encoder"] == 2 * (attention + feed + 2 * norm)
    layers = 3 * (attention + norm) + 3 * 2 * d * (d + 1) + 3 * 2 * d * (d + 1)
    between = 2 * ((n + 1) * d + feed + d * (d + 1) + 3 * norm)
    assert found["decoder"] == layers + between
    conv = 256 * 256 * 9 + 2 * 256
    assert found["head"] == 20 * 256 * 9 + 2 * 256 + 5 * conv + 256 * 9 + 1
    neck = (
        (256**2 + 2 * 256) + (512**2 + 2 * 512)  # laterals
        + (1024 * 512 + 2 * 512) + (512 * 1024 * 9 + 2 * 1024) + 2 * 1024  # residual, norm
        + 768 * 769 + (768 * 1024 + 2 * 1024)  # sentence, gate
        + (1536 * 512 + 2 * 512) + (768 * 512 + 2 * 512) + (1024 * 256 + 2 * 256)
    )  # fmt: skip
    assert found["neck"] == neck
    darknet = count(PAPER_DARKNET)
    assert darknet["backbone"] == pytest.approx(40.58e6, rel=1e-3), "Darknet-53, no classifier"
    gru = 2 * 3 * 1024 * (300 + 1024 + 2)
    assert darknet["text"] == 12000 * 300 + gru
    assert PAPER_DARKNET.side**2 == 676


def test_tiny_is_tiny() -> None:
    total = sum(p.numel() for p in M3Att(TINY).parameters())
    assert 500_000 <= total <= 1_300_000
    assert set(CONFIGS) == {"paper", "darknet", "tiny"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 100},
        {"stride": 4},
        {"heads": 3},
        {"layers": 0},
        {"doublings": 4},
        {"swin": SMALL_SWIN},
        {"darknet": None},
        {"gru": GruConfig()},
        {"bert": None},
    ],
)
def test_impossible_configurations(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        replace(TINY, **wrong)


def test_parts_chain_to_the_whole(model: M3Att) -> None:
    pixels, ids, words, index = inputs(model, 5, 1)
    assert len(pixels) == 3
    text, image, mask = model.parts()
    with torch.no_grad():
        from_text, from_image = text.module(ids, words), image.module(pixels)
        logits = mask.module(index, words, *from_text, *from_image)
        assert torch.equal(logits, model(pixels, ids, words, index))
        repeated = model(pixels[index.long()], ids, words)
    assert logits.shape == (5, model.config.size, model.config.size)
    for ports, values in ((text.outputs, from_text), (image.outputs, from_image)):
        assert [p.shape[1:] for p in ports] == [tuple(v.shape[1:]) for v in values]
    # products of other sizes round otherwise; logits are of order 2
    torch.testing.assert_close(repeated, logits, rtol=0, atol=2e-4)


def test_padding_and_neighbours_have_no_influence(model: M3Att) -> None:
    pixels, ids, words, index = inputs(model, 4, 0)
    other = torch.where(words, ids, torch.full_like(ids, 7))
    assert not torch.equal(ids, other)
    with torch.no_grad():
        logits = model(pixels, ids, words, index)
        # -1e4 in front of a softmax is an exact zero in float32
        assert torch.equal(logits, model(pixels, other, words, index))
        alone = model(pixels[:1], ids[:1], words[:1], index[:1])
    torch.testing.assert_close(alone[0], logits[0], rtol=0, atol=2e-4)


def test_text_and_image_both_matter(model: M3Att) -> None:
    pixels, ids, words, index = inputs(model, 4, 2)
    with torch.no_grad():
        logits = model(pixels, ids, words, index)
        said = model(pixels, ids.flip(0), words.flip(0), index)
        shown = model(pixels.flip(0), ids, words, index)
    spread = float(logits.std())
    assert 0.02 <= float((logits > 0).float().mean()) <= 0.98
    assert float((said - logits).abs().mean()) > 0.02 * spread
    assert float((shown - logits).abs().mean()) > 0.1 * spread


def test_only_early_fusion_mixes_text_into_the_image() -> None:
    """What a picture's part gives is all that the decoder reads, or only the neck's laterals."""
    late, early = (M3Att(c) for c in (TINY, GATED))
    assert [p.name for p in late.parts()[0].outputs] == ["language", "state"]
    assert [p.name for p in early.parts()[0].outputs] == ["language", "state", "gate"]
    names = [p.name for p in late.parts()[1].outputs]
    assert names == [f"{kind}_{i}" for i in (1, 2, 3) for kind in ("keys", "values")] + ["beside"]
    assert [p.name for p in early.parts()[1].outputs] == ["top", "middle", "low"]


def test_the_same_graph_in_onnx_with_early_fusion() -> None:
    """Unoptimised ONNX Runtime; rounding stays far below 1e-3 σ."""
    model = seed_weights(M3Att(SWIN_GRU), 3)
    # the recurrent text is traced in test_recurrent.py
    graphs = graphs_of(model, only=("image", "mask"))
    for batch in (1, 4):
        for agreement in compare_parts(model, graphs, batch).values():
            assert agreement.sigma < 1e-4


def test_rescale_moves_the_logits(model: M3Att) -> None:
    given = inputs(model, 2, 3)
    moved = M3Att(model.config).eval()
    moved.load_state_dict(model.state_dict())
    moved.rescale(0.5, 3.0)
    with torch.no_grad():
        expected = 3.0 * (model(*given) - 0.5)
        torch.testing.assert_close(moved(*given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [TINY, GATED], ids=["late", "early"])
def test_rehearsal(config: M3AttConfig) -> None:
    torch.manual_seed(0)
    model = M3Att(config).train()
    pixels, ids, words, _ = inputs(model, 6, 0)
    index = torch.tensor([0, 0, 1, 1, 1, 2])
    seen = model.rehearse(pixels, ids, words, index, torch.zeros(6, 96, 96, dtype=torch.bool))
    assert seen.logits.shape == (6, 96, 96)
    assert [m.shape[1] for m in seen.maps] == list(model.map_widths)
    assert {len(m) for m in seen.maps} == {6 if config.early_fusion else 3}
    assert len(seen.attention) == config.layers
    for weights in seen.attention:
        assert weights.shape == (6, config.words, config.side**2)
        torch.testing.assert_close(weights.sum(1), torch.ones(6, config.side**2))
        assert not weights[~words].any()
    assert seen.extra is not None
    total = seen.logits.square().mean() + seen.extra["language"]
    total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # a softmax does not see what is added to all its scores
    silent = ("embeddings", "key.bias", "qkv.bias")
    assert all(any(s in n for s in silent) for n in without), without


def test_gradients_of_the_other_variants() -> None:
    for config in (SWIN_BERT, DARKNET_GRU):
        model = M3Att(config).train()
        model(*inputs(model, 4, 0)).square().mean().backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        silent = ("embeddings", "key.bias", "reconstruction", "backbone.norm0")
        assert all(any(s in n for s in silent) for n in without), without


def test_sizes_of_backbones_are_checked() -> None:
    with pytest.raises(ValueError, match="6 widths"):
        M3Att(replace(TINY, darknet=DarknetConfig(widths=(8, 16, 32))))  # type: ignore[arg-type]
