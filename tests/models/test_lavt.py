from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from refedge.models.lavt import CONFIGS, LAVT, PAPER, TINY
from refedge.models.pwam import PWAM, ImageLanguageAttention
from refedge.models.seeded import seed_weights
from refedge.models.swin import SwinConfig
from torch import nn

from .networks import compare_parts, graphs_of, inputs_of

# a shifted block, and grids of 24, 12, 6 padded to 25, 15, 10
PADDED = replace(
    TINY, swin=SwinConfig(8, (2, 1, 1, 1), (1, 2, 2, 4), window=5, ratio=2, drop_path=0.0)
)


@pytest.fixture(scope="module")
def tiny() -> LAVT:
    return seed_weights(LAVT(TINY), 3)


@pytest.fixture(scope="module")
def paper() -> LAVT:
    with torch.device("meta"):
        return LAVT(PAPER)


def test_weights_have_the_public_names_and_shapes(paper: LAVT) -> None:
    shapes = {k: tuple(v.shape) for k, v in paper.state_dict().items()}
    for key, shape in {
        "backbone.patch_embed.proj.weight": (128, 3, 4, 4),
        "backbone.layers.0.blocks.1.attn.qkv.weight": (384, 128),
        "backbone.layers.1.downsample.reduction.weight": (512, 1024),
        "backbone.layers.2.blocks.17.attn.relative_position_bias_table": (529, 16),
        "backbone.layers.0.fusion.vis_project.0.weight": (128, 128, 1),
        "backbone.layers.1.fusion.image_lang_att.f_query.0.weight": (256, 256, 1),
        "backbone.layers.2.fusion.image_lang_att.f_key.0.weight": (512, 768, 1),
        "backbone.layers.3.fusion.image_lang_att.f_value.0.weight": (1024, 768, 1),
        "backbone.layers.3.fusion.image_lang_att.W.0.bias": (1024,),
        "backbone.layers.3.fusion.project_mm.0.weight": (1024, 1024, 1),
        "backbone.layers.0.res_gate.0.weight": (128, 128),
        "backbone.layers.2.res_gate.2.weight": (512, 512),
        "backbone.norm3.weight": (1024,),
        "classifier.conv1_4.weight": (512, 1536, 3, 3),
        "classifier.bn2_4.running_var": (512,),
        "classifier.conv1_3.weight": (512, 768, 3, 3),
        "classifier.conv1_2.weight": (512, 640, 3, 3),
        "classifier.conv1_1.weight": (2, 512, 1, 1),
        "text_encoder.encoder.layer.11.attention.self.query.weight": (768, 768),
    }.items():
        assert shapes[key] == shape, key
    assert {k.split(".")[0] for k in shapes} == {"backbone", "classifier", "text_encoder"}
    assert not any("layers.3.res_gate" in k for k in shapes)


def test_parameter_counts_are_the_layers(paper: LAVT) -> None:
    """Swin-B 86.9 M; per PWAM 4 C x C and 2 C x 768 with biases, per gate 2 C x C; six 3x3
    convolutions with batch norms and a 1x1; BERT-base without pooler 108.9 M."""
    widths = (128, 256, 512, 1024)
    fusion = sum(4 * c * c + 2 * 768 * c + 6 * c for c in widths)
    gates = sum(2 * c * c for c in widths[:3])
    swin = 86_878_584 + 2 * sum(widths[:3])
    convolutions = 9 * 512 * (1536 + 768 + 640 + 3 * 512) + 6 * 2 * 512 + 2 * 513
    found = {n: sum(p.numel() for p in m.parameters()) for n, m in paper.named_children()}
    assert found["backbone"] == swin + fusion + gates
    assert found["classifier"] == convolutions
    assert found["text_encoder"] == pytest.approx(108.89e6, rel=1e-3)


def test_tiny_is_tiny() -> None:
    assert 500_000 <= sum(p.numel() for p in LAVT(TINY).parameters()) <= 1_500_000
    assert CONFIGS == {"paper": PAPER, "tiny": TINY}


def test_pwam_is_the_papers_formula() -> None:
    """NumPy in float64, with the output projection where the paper has it: behind the sum."""
    torch.manual_seed(0)
    module = PWAM(12, 8).double().eval()
    x = torch.randn(2, 25, 12, dtype=torch.float64)
    text = torch.randn(2, 6, 8, dtype=torch.float64)
    words = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    with torch.no_grad():
        keys, values = module.image_lang_att.project_text(text, words)
        out, weights = module(x, keys, values, words)

    w = {k: v.detach().numpy() for k, v in module.state_dict().items()}

    def project(name: str, rows: np.ndarray) -> np.ndarray:
        return rows @ w[f"{name}.0.weight"][:, :, 0].T + w[f"{name}.0.bias"]

    def norm(rows: np.ndarray) -> np.ndarray:
        mean, variance = rows.mean(1, keepdims=True), rows.var(1, keepdims=True)
        return (rows - mean) / np.sqrt(variance + 1e-5)

    def gelu(rows: np.ndarray) -> np.ndarray:
        return nn.functional.gelu(torch.from_numpy(rows)).numpy()

    pixels, valid = x.numpy(), words.numpy()[:, :, None]
    q = norm(project("image_lang_att.f_query", pixels))
    k = project("image_lang_att.f_key", text.numpy()) * valid
    v = project("image_lang_att.f_value", text.numpy()) * valid
    scores = q @ k.transpose(0, 2, 1) * 12**-0.5 + (1e4 * valid - 1e4).transpose(0, 2, 1)
    a = np.exp(scores - scores.max(-1, keepdims=True))
    a /= a.sum(-1, keepdims=True)
    found = norm(project("image_lang_att.W", a @ v))
    expected = gelu(project("project_mm", gelu(project("vis_project", pixels)) * found))
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(weights.transpose(1, 2).numpy(), a, atol=1e-12)


def test_one_valid_word_is_harmless() -> None:
    """Every pixel finds the same, so instance normalisation leaves nothing, and no NaN."""
    module = ImageLanguageAttention(8, 8).eval()
    words = torch.tensor([[True, False, False]])
    with torch.no_grad():
        keys, values = module.project_text(torch.randn(1, 3, 8), words)
        found, weights = module(torch.randn(1, 16, 8), keys, values, words)
    assert torch.equal(weights[:, 0], torch.ones(1, 16))
    assert float(found.abs().max()) < 1e-3


def test_the_gate_feeds_the_next_stage(tiny: LAVT) -> None:
    """What stage 0 found reaches stage 1 through its gate, and the decoder past it."""
    pixels, ids, words, _ = inputs_of(tiny, 1, 0)
    closed = LAVT(TINY).eval()
    closed.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        closed.backbone.layers[0].get_submodule("res_gate.2").weight.zero_()  # type: ignore[operator]
        before, *_ = tiny.features(pixels, words, tiny.encode_text(ids, words))
        after, *_ = closed.features(pixels, words, closed.encode_text(ids, words))
    assert torch.equal(before[0], after[0])
    assert float((before[1] - after[1]).abs().mean()) > 0.05


@pytest.mark.parametrize("size", [64, 96, 160])
def test_shapes_at_every_size(size: int) -> None:
    model = LAVT(replace(TINY, size=size)).eval()
    pixels, ids, words, _ = inputs_of(model, 2, 0)
    text, mask = model.parts()
    with torch.no_grad():
        products = text.module(ids, words)
        logits = mask.module(pixels, words, *products)
    assert logits.shape == (2, size, size)
    assert [tuple(p.shape[1:]) for p in products] == [port.shape[1:] for port in text.outputs]
    assert [port.name for port in mask.inputs[2:]] == [port.name for port in text.outputs]


@pytest.mark.parametrize("wrong", [{"size": 100}, {"size": 32}, {"words": 21}])
def test_impossible_configurations(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        replace(TINY, **wrong)


def test_parts_chain_to_the_whole(tiny: LAVT) -> None:
    text, mask = tiny.parts()
    pixels, ids, words, _ = inputs_of(tiny, 3, 1)
    with torch.no_grad():
        products = text.module(ids, words)
        assert torch.equal(mask.module(pixels, words, *products), tiny(pixels, ids, words))


def test_padding_has_no_influence(tiny: LAVT) -> None:
    pixels, ids, words, _ = inputs_of(tiny, 2, 0)
    other = torch.where(words, ids, torch.full_like(ids, 7))
    assert not torch.equal(ids, other)
    with torch.no_grad():
        # -1e4 in front of a softmax is an exact zero in float32
        assert torch.equal(tiny(pixels, ids, words), tiny(pixels, other, words))


def test_rows_of_a_batch_do_not_mix(tiny: LAVT) -> None:
    pixels, ids, words, _ = inputs_of(tiny, 3, 5)
    with torch.no_grad():
        together, alone = tiny(pixels, ids, words), tiny(pixels[1:2], ids[1:2], words[1:2])
    # matrix products of another height may sum in another order
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


def test_pictures_are_named_by_their_index(tiny: LAVT) -> None:
    pixels, ids, words, _ = inputs_of(tiny, 4, 2)
    index = torch.tensor([1, 0, 1, 1])
    with torch.no_grad():
        shared = tiny(pixels[:2], ids, words, index)
        repeated = tiny(pixels[:2][index], ids, words)
    torch.testing.assert_close(shared, repeated, atol=1e-4, rtol=1e-4)


def test_words_and_pixels_matter(tiny: LAVT) -> None:
    pixels, ids, words, _ = inputs_of(tiny, 2, 4)
    with torch.no_grad():
        logits = tiny(pixels, ids, words)
        other_words = tiny(pixels, ids.flip(0), words.flip(0))
        other_pixels = tiny(pixels.flip(0), ids, words)
    for other in (other_words, other_pixels):
        assert float((logits - other).abs().mean()) > 0.05 * float(logits.std())


def test_rescale_moves_and_stretches_logits() -> None:
    model = seed_weights(LAVT(TINY), 0)
    inputs = inputs_of(model, 1, 0)
    with torch.no_grad():
        before = model(*inputs)
        model.rescale(0.5, 3.0)
        torch.testing.assert_close(model(*inputs), 3.0 * (before - 0.5), atol=1e-4, rtol=1e-4)


def test_a_rehearsal_shows_maps_and_attention() -> None:
    model = LAVT(TINY).train()
    pixels, ids, words, _ = inputs_of(model, 4, 0)
    index = torch.tensor([0, 0, 1, 1])
    masks = torch.zeros(4, 96, 96, dtype=torch.bool)
    seen = model.rehearse(pixels[:2], ids, words, index, masks)
    assert seen.logits.shape == (4, 96, 96)
    assert tuple(m.shape[1] for m in seen.maps) == model.map_widths
    assert [m.shape[2] for m in seen.maps] == [24, 12, 6, 3]
    assert [a.shape for a in seen.attention] == [(4, 20, n * n) for n in (24, 12, 6, 3)]
    for weights in seen.attention:
        torch.testing.assert_close(weights.sum(1), torch.ones(4, weights.shape[2]))
        assert not weights.masked_select(~words[:, :, None]).any()
    (seen.logits.sum() + sum(m.square().sum() for m in seen.maps)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # biases that instance normalisation cancels, unused words
    cancelled = ("f_query.0.bias", "W.0.bias", "f_key.0.bias", "key.bias")
    assert all(n.endswith(cancelled) or "embeddings" in n for n in without), without


def test_padded_windows_export_without_arithmetic_on_shapes() -> None:
    model = seed_weights(LAVT(PADDED), 1)
    graphs = graphs_of(model, only=("mask",))
    for batch in (1, 4):
        for agreement in compare_parts(model, graphs, batch).values():
            assert agreement.sigma < 1e-4
