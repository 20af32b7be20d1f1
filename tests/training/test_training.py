from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from refedge.data.refshapes.dataset import RefShapes
from refedge.data.refshapes.scene import COLOURS, SHAPES
from refedge.errors import CheckpointError
from refedge.models.checkpoint import load_checkpoint
from refedge.models.slvit import TINY
from refedge.runtime.segmenter import load
from refedge.training.batches import (
    ATTRIBUTES,
    collate,
    make,
    meanings,
    stream,
    token_rows,
    tokenizer,
)
from refedge.training.losses import AttributeHead, grounding_loss, mask_loss
from refedge.training.recipe import MIXTURE, Recipe
from refedge.training.train import _schedule, train

SHORT = Recipe(steps=4, scenes=1, warmup=2)


def test_a_batch_is_a_function_of_its_step() -> None:
    a, b, c = make(5, SHORT, 96, 20), make(5, SHORT, 96, 20), make(6, SHORT, 96, 20)
    assert torch.equal(a.pixels, b.pixels)
    assert torch.equal(a.ids, b.ids)
    assert not torch.equal(a.pixels, c.pixels)
    other = make(5, replace(SHORT, seed=2), 96, 20)
    assert not torch.equal(a.pixels, other.pixels)


def test_worker_processes_make_the_same_batches() -> None:
    alone = list(stream(SHORT, 96, 20, start=1))
    helped = list(stream(SHORT, 96, 20, start=1, workers=1))
    assert len(alone) == len(helped) == 3
    assert all(torch.equal(a.masks, b.masks) for a, b in zip(alone, helped, strict=True))


def test_batches_hold_what_the_scenes_hold() -> None:
    sample = RefShapes("val", families=MIXTURE[1])[0]
    batch = collate([sample], 20)
    assert batch.pixels.shape == (1, 96, 96, 3)
    assert batch.labels.shape == (1, 4, 96, 96)
    assert batch.index.tolist() == [0, 0, 0, 0]
    for i, e in enumerate(sample.expressions):
        assert torch.equal(batch.masks[i], torch.from_numpy(sample.mask(e)))
        if e.target >= 0:
            thing = sample.scene.things[e.target]
            shape, colour = (batch.labels[0, j][batch.masks[i]].unique().tolist() for j in (0, 1))
            assert shape == [SHAPES.index(thing.shape) + 1]
            assert colour == [COLOURS.index(thing.colour) + 1]
    assert (batch.labels[0][:, torch.from_numpy(sample.things == 0)] == 0).all()


def test_training_and_runtime_encode_alike(bundle: Path) -> None:
    segmenter = load(bundle)
    texts = [e.text for s in RefShapes("val", scenes=30) for e in s.expressions]
    ids, words = token_rows(texts, segmenter.manifest.tokenizer.words)
    for i, text in enumerate(texts):
        tokens = segmenter.tokenize(text)
        assert ids[i].tolist() == tokens.ids.tolist()
        assert words[i].tolist() == tokens.words.tolist()


def test_meanings_name_every_attribute_word() -> None:
    table, vocabulary = meanings(), tokenizer().get_vocab()
    assert table[vocabulary["red"]].tolist() == [0, COLOURS.index("red") + 1, 0, 0]
    assert table[vocabulary["the"]].tolist() == [0, 0, 0, 0]
    named = sum(name in vocabulary for names in ATTRIBUTES for name in names)
    assert int((table > 0).sum()) == named == 22


def test_mask_loss_prefers_the_truth() -> None:
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4] = True  # the second has no target
    right = torch.where(masks, 6.0, -6.0)
    assert mask_loss(right, masks) < 0.05
    assert mask_loss(-right, masks) > 5
    assert mask_loss(torch.zeros(2, 8, 8), masks) < mask_loss(-right, masks)


def test_grounding_wants_true_words() -> None:
    labels = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    labels[:, 1, :, :2], labels[:, 0, :, :2] = 1, 1  # a red circle on the left half
    labels[:, 1, :, 2:], labels[:, 0, :, 2:] = 3, 1  # a blue circle on the right
    named = torch.zeros(1, 3, 4, dtype=torch.long)
    named[0, 1, 1] = 1  # "the red ..."
    words = torch.tensor([[True, True, False]])
    left, right = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    weights = torch.stack([left, left, right, right], 1).repeat(1, 4)[None]
    good = grounding_loss(weights, named, words, labels)
    bad = grounding_loss(weights.flip(2), named, words, labels)
    assert good < 0.01
    assert bad > 5


def test_attribute_head_sees_every_label() -> None:
    head = AttributeHead((8,))
    batch = collate([RefShapes("val")[0]], 20)
    loss = head([torch.randn(5, 8, 12, 12)], batch.labels, batch.index, batch.masks)
    assert loss.isfinite()
    loss.backward()
    assert head.layers[0].weight.grad is not None
    shared = torch.randn(1, 8, 12, 12)
    alone = head([shared], batch.labels, batch.index, batch.masks)
    masks = torch.rand(batch.masks.shape) > 0.5
    # maps of the picture are not asked what an expression means
    assert torch.equal(alone, head([shared], batch.labels, batch.index, masks))
    repeated = head([shared.expand(5, -1, -1, -1)], batch.labels, batch.index, batch.masks)
    assert repeated > alone


def test_the_schedule_warms_up_and_cools_down() -> None:
    recipe = Recipe(steps=1000, warmup=100)
    rates = [_schedule(i, recipe) for i in range(1000)]
    assert rates[0] == 0.01
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)
    assert all(a >= b for a, b in pairwise(rates[100:]))


def test_a_run_stops_resumes_and_ships(tmp_path: Path) -> None:
    """Two runs of the same recipe, one of them cut in the middle, end with the same weights."""
    config = replace(TINY, size=96)
    lines: list[str] = []
    straight = train(
        "slvit", config, SHORT, tmp_path / "a", every=4, test_scenes=2, say=lines.append
    )
    assert len(lines) == 2
    assert "val mIoU" in lines[0]
    assert straight.card.scores["refshapes:test"]["overall"]["count"] == 8

    class StopError(Exception):
        pass

    def stop(line: str) -> None:
        raise StopError

    with pytest.raises(StopError):
        train("slvit", config, SHORT, tmp_path / "b", every=2, say=stop)
    assert not (tmp_path / "b" / "card.json").exists()
    resumed = train(
        "slvit", config, SHORT, tmp_path / "b", every=2, test_scenes=2, say=lines.append
    )
    assert lines[2] == "resumed at step 2 of 4"
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    loaded = load_checkpoint(str(tmp_path / "b"))
    assert loaded.card.training["pairs"] == 16
    assert [point["step"] for point in loaded.card.training["curve"]] == [2, 4]
    with pytest.raises(CheckpointError) as caught:
        train("slvit", config, replace(SHORT, seed=9), tmp_path / "b", say=lambda _: None)
    assert caught.value.code == "train-recipe"
