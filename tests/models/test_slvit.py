from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from refedge.models.examples import host_inputs
from refedge.models.layouts import from_official, is_dead
from refedge.models.parts import HOST
from refedge.models.seeded import seed_weights
from refedge.models.slvit import PAPER, TINY, SLViT

from .weight_writer import official_shapes


@pytest.fixture(scope="module")
def tiny() -> SLViT:
    return seed_weights(SLViT(TINY), 3)


@pytest.fixture(scope="module")
def paper() -> SLViT:
    with torch.device("meta"):
        return SLViT(PAPER)


def parameters(shapes: dict[str, tuple[int, ...]], *prefixes: str) -> int:
    return sum(
        int(np.prod(shape))
        for name, shape in shapes.items()
        if name.startswith(prefixes) and "running" not in name and "num_batches" not in name
    )


def test_parameter_counts_are_the_papers(paper: SLViT) -> None:
    """specs: 48.97 M without BERT, of which 2.48 M in 44 tensors are dead and not built here."""
    shapes = official_shapes(paper)
    parts = {
        "backbone.": 45.83e6,
        "classifier.": 1.576e6,
        "inter_trans.": 0.790e6,
        ("squeelayers.", "normlayers."): 0.773e6,
        "text_encoder.": 108.89e6,
    }
    for prefix, millions in parts.items():
        found = parameters(shapes, *([prefix] if isinstance(prefix, str) else prefix))
        assert found == pytest.approx(millions, rel=1e-3), prefix
    whole = parameters(shapes, "") - parameters(shapes, "text_encoder.")
    assert whole == 48_972_546
    dead = {k: v for k, v in shapes.items() if is_dead(k)}
    assert len(dead) == 44
    assert sum(int(np.prod(s)) for s in dead.values()) == pytest.approx(2.48e6, rel=2e-3)
    ours = sum(p.numel() for n, p in paper.named_parameters() if not n.startswith("text_encoder."))
    assert ours == whole - sum(int(np.prod(s)) for s in dead.values())


@pytest.mark.parametrize(
    ("stage", "millions", "fusion"),
    [(1, 0.631, 0.357), (2, 1.851, 0.838), (3, 26.21, 12.06), (4, 15.20, 6.30)],
)
def test_stage_counts_are_the_papers(
    paper: SLViT, stage: int, millions: float, fusion: float
) -> None:
    shapes = official_shapes(paper)
    blocks = {k: v for k, v in shapes.items() if k.startswith(f"backbone.block{stage}.")}
    assert parameters(blocks, "") == pytest.approx(millions * 1e6, rel=1e-3)
    fused = {k: v for k, v in blocks.items() if ".fusion." in k}
    assert parameters(fused, "") == pytest.approx(fusion * 1e6, rel=2e-3)


def test_the_official_layout_has_1144_tensors(paper: SLViT) -> None:
    shapes = official_shapes(paper)
    assert len([k for k in shapes if not k.startswith("text_encoder.")]) == 1144
    stem = "backbone.block3.7.attn.spatial_gating_unit"
    assert shapes[f"{stem}.conv0_1.weight"] == (320, 1, 1, 7)
    assert shapes[f"{stem}.conv2_2.weight"] == (320, 1, 21, 1)
    assert shapes[f"{stem}.fusion.vis_lang_att.project_k.0.weight"] == (320, 768, 1)
    assert shapes[f"{stem}.fusion.res_gate.2.weight"] == (320, 320)
    assert shapes["backbone.patch_embed1.proj.3.weight"] == (64, 32, 3, 3)
    assert shapes["inter_trans.group_attention.0.Attention.qkv_linear.weight"] == (768, 256)
    assert shapes["classifier.squeeze.conv.weight"] == (512, 1024, 1, 1)
    assert shapes["squeelayers.2.weight"] == (320, 640, 1, 1)
    assert "text_encoder.encoder.layer.11.attention.self.query.weight" in shapes


def test_an_official_file_maps_by_key(tiny: SLViT) -> None:
    official = {k: torch.zeros(s) for k, s in official_shapes(tiny).items()}
    official["text_encoder.embeddings.position_ids"] = torch.zeros(1, 20)
    assert set(from_official(official)) == set(tiny.state_dict())


def inputs_of(batch: int, seed: int) -> tuple[torch.Tensor, ...]:
    with torch.device("meta"):
        model = SLViT(TINY)
    host = host_inputs(model, batch, seed)
    return tuple(host[name] for name in HOST[:3])


def test_tiny_is_tiny() -> None:
    assert sum(p.numel() for p in SLViT(TINY).parameters()) <= 800_000


@pytest.mark.parametrize("size", [96, 128, 192])
def test_shapes_at_every_size(size: int) -> None:
    model = SLViT(replace(TINY, size=size)).eval()
    text = model.parts()[0]
    host = host_inputs(model, 2, 0)
    pixels, ids, words = (host[name] for name in HOST[:3])
    with torch.no_grad():
        logits = model(pixels, ids, words)
        products = model.encode_text(ids, words)
    assert logits.shape == (2, size, size)
    assert [tuple(p.shape[1:]) for p in products] == [port.shape[1:] for port in text.outputs]


@pytest.mark.parametrize("wrong", [{"size": 100}, {"size": 32}, {"score": "dice"}, {"regions": 10}])
def test_impossible_configurations(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        replace(TINY, **wrong)


def test_two_forwards_are_equal(tiny: SLViT) -> None:
    """The public code draws the decoder's bases anew at every forward."""
    inputs = inputs_of(1, 0)
    with torch.no_grad():
        assert torch.equal(tiny(*inputs), tiny(*inputs))
    again = seed_weights(SLViT(TINY), 3)
    with torch.no_grad():
        assert torch.equal(tiny(*inputs), again(*inputs))


def test_padding_has_no_influence(tiny: SLViT) -> None:
    pixels, ids, words = inputs_of(2, 0)
    other = torch.where(words, ids, torch.full_like(ids, 7))
    assert not torch.equal(ids, other)
    with torch.no_grad():
        a, b = tiny(pixels, ids, words), tiny(pixels, other, words)
    # -1e4 in front of a softmax is an exact zero in float32
    assert torch.equal(a, b)


def test_parts_chain_to_the_whole(tiny: SLViT) -> None:
    text, mask = tiny.parts()
    pixels, ids, words = inputs_of(3, 1)
    with torch.no_grad():
        products = text.module(ids, words)
        assert torch.equal(mask.module(pixels, words, *products), tiny(pixels, ids, words))


def test_seeded_weights_say_something(tiny: SLViT) -> None:
    """design: O(1) activations and 20 to 60 % positive pixels, also on other inputs."""
    with torch.no_grad():
        logits = tiny(*inputs_of(4, 9))
        pixels, ids, words = inputs_of(4, 9)
        maps, _ = tiny.features(pixels, words, tiny.encode_text(ids, words))
    assert 0.2 <= float((logits > 0).float().mean()) <= 0.6
    assert all(0.1 < float(m.std()) < 10 for m in maps)


def test_relevance_is_not_constant(tiny: SLViT) -> None:
    """The public code sums the softmax over words, which is one everywhere."""
    pixels, ids, words = inputs_of(1, 0)
    with torch.no_grad():
        _, relevances = tiny.features(pixels, words, tiny.encode_text(ids, words))
    assert all(float(r.std()) > 1e-3 for r in relevances)
    margin = tiny.selection_margin(
        {"pixels": pixels.numpy(), "ids": ids.numpy(), "words": words.numpy()}
    )
    assert margin > 1e-4


@pytest.mark.parametrize("score", ["official", "all"])
def test_other_choices_of_regions(score: str) -> None:
    model = seed_weights(SLViT(replace(TINY, score=score)), 0)
    with torch.no_grad():
        logits = model(*inputs_of(2, 0))
    assert torch.isfinite(logits).all()


def test_all_regions_equals_choosing_all_regions() -> None:
    dense = seed_weights(SLViT(replace(TINY, score="all")), 0)
    chosen = SLViT(replace(TINY, score="paper", regions=9)).eval()
    chosen.load_state_dict(dense.state_dict())
    inputs = inputs_of(2, 0)
    with torch.no_grad():
        torch.testing.assert_close(dense(*inputs), chosen(*inputs), rtol=1e-4, atol=1e-4)


def test_gradients_reach_everything_that_is_trained() -> None:
    model = SLViT(TINY).train()
    model(*inputs_of(2, 0)).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # biases that instance normalisation cancels, position 20 onwards, unused words
    assert all(n.endswith("bias") or "embeddings" in n for n in without), without
