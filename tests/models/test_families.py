"""Every network that refedge knows keeps the protocol of models/parts.py."""

from __future__ import annotations

import pytest
import torch
from refedge.errors import CheckpointError
from refedge.models.families import configurations, families, family
from refedge.models.own import require_sound
from refedge.models.parts import Network
from refedge.models.seeded import seed_weights

from .networks import compare_parts, graphs_of, inputs_of, with_other_padding

NAMES = families()
_made: dict[str, Network] = {}


def tiny(name: str) -> Network:
    if name not in _made:
        kind = family(name)
        _made[name] = seed_weights(kind.build(kind.configs["tiny"]), 3)
    return _made[name]


def test_there_is_a_paper_and_a_tiny_configuration_of_each() -> None:
    assert {f"{n}:{c}" for n in NAMES for c in ("paper", "tiny")} <= set(configurations())
    with pytest.raises(CheckpointError) as caught:
        family("unet")
    assert caught.value.code == "checkpoint-model"


@pytest.mark.parametrize("name", NAMES)
def test_parts_promise_what_they_do(name: str) -> None:
    require_sound(tiny(name))


# SLViT goes through the whole export, at two sizes, in tests/export/test_export.py
@pytest.mark.parametrize("name", [n for n in NAMES if n != "slvit"])
def test_graphs_compute_what_torch_computes(name: str) -> None:
    model = tiny(name)
    graphs = graphs_of(model)
    assert ("mask fused" in graphs) == (name in ("cm_masksd", "lts", "m3att"))
    for batch in (1, 4):
        for part, agreement in compare_parts(model, graphs, batch).items():
            # float32 rounding through a few dozen layers; the bar of an export is 1e-3
            assert agreement.sigma < 3e-4, (part, batch)
            assert agreement.iou is None or agreement.iou > 0.999


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padding_and_neighbours_have_no_influence(name: str) -> None:
    model = tiny(name)
    pixels, ids, words, index = inputs_of(model, 4, 1)
    logits = model(pixels, ids, words, index)
    padded = model(pixels, with_other_padding(ids, words), words, index)
    assert torch.equal(logits, padded)
    for row in range(4):
        picture = int(index[row])
        alone = model(
            pixels[picture : picture + 1], ids[row : row + 1], words[row : row + 1], index[:1] * 0
        )
        # other batch sizes may take other kernels, so rounding differs
        torch.testing.assert_close(alone[0], logits[row], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_seeded_weights_say_something(name: str) -> None:
    """design: 20 to 60 % positive pixels, also on other inputs, of which words have a part."""
    model = tiny(name)
    pixels, ids, words, index = inputs_of(model, 6, 9)
    logits = model(pixels, ids, words, index)
    assert 0.2 <= float((logits > 0).float().mean()) <= 0.6
    other = model(pixels, ids.flip(0), words.flip(0), index)
    assert float((other - logits).abs().max()) > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_training_sees_the_same_logits(name: str) -> None:
    kind = family(name)
    model = seed_weights(kind.build(kind.configs["tiny"]), 5)
    pixels, ids, words, index = inputs_of(model, 4, 2)
    masks = torch.zeros(4, model.config.size, model.config.size, dtype=torch.bool)
    masks[:, 20:40, 30:60] = True
    seen = model.rehearse(pixels, ids, words, index, masks)
    torch.testing.assert_close(seen.logits, model(pixels, ids, words, index), rtol=1e-3, atol=1e-3)
    assert tuple(m.shape[1] for m in seen.maps) == model.map_widths
    assert all(len(m) in (len(ids), len(pixels)) for m in seen.maps)
    for weights in seen.attention:
        torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
        assert not weights.masked_select(~words[:, :, None]).any()
    model.train()
    seen = model.rehearse(pixels, ids, words, index, masks)
    total = seen.logits.square().mean() + sum((seen.extra or {}).values())
    torch.autograd.backward(total + sum(m.square().mean() for m in seen.maps))
    reached = sum(p.numel() for p in model.parameters() if p.grad is not None and p.grad.any())
    assert reached > 0.9 * sum(
        p.numel() for n, p in model.named_parameters() if "embeddings" not in n
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_checkpoint_is_at_most_3_mb(name: str) -> None:
    assert 2 * sum(p.numel() for p in tiny(name).parameters()) <= 3_000_000
