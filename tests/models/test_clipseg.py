"""CLIPSeg against transformers' own forward, on a small model saved by ``save_pretrained``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from refedge.errors import CheckpointError
from refedge.export.from_torch import to_onnx
from refedge.export.lint import require_clean
from refedge.models.checkpoint import open_model
from refedge.models.clip import ClipText, ClipVision
from refedge.models.clipseg import (
    PAPER,
    TINY,
    CLIPSeg,
    CLIPSegConfig,
    _transformers_config,
    from_folder,
)
from refedge.models.parts import pictures
from torch import Tensor
from transformers import CLIPSegForImageSegmentation

from .networks import inputs_of, taken_by

EOS = 39
SMALL = CLIPSegConfig(
    size=48,
    words=10,
    embed=24,
    layers=(0, 2),
    width=16,
    heads=2,
    hidden=32,
    refined=False,
    text=ClipText(vocabulary=40, width=32, layers=2, heads=4, positions=12),
    vision=ClipVision(patch=8, width=48, layers=4, heads=4),
)


def saved(folder: Path, config: CLIPSegConfig, size: int) -> CLIPSegForImageSegmentation:
    """A model for pictures of another size than the one it will run at."""
    torch.manual_seed(0)
    theirs = _transformers_config(replace(config, size=size))
    model = CLIPSegForImageSegmentation(theirs).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.15)
    model.save_pretrained(folder)
    return model


def expressions(config: CLIPSegConfig) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, EOS, (3, config.words), generator=torch.Generator().manual_seed(1))
    numbers, lengths = torch.arange(config.words)[None], torch.tensor([10, 6, 2])[:, None]
    ids = torch.where(numbers == lengths - 1, EOS, ids) * (numbers < lengths)
    return ids.to(torch.int32), numbers < lengths


@pytest.mark.parametrize(
    ("refined", "condition", "layers"), [(True, 0, (0, 2)), (False, 1, (1, 2, 3))]
)
@torch.no_grad()
def test_logits_are_transformers(
    tmp_path: Path, refined: bool, condition: int, layers: tuple[int, ...]
) -> None:
    vision = replace(SMALL.vision, patch=16 if refined else 8)
    config = replace(SMALL, refined=refined, condition=condition, layers=layers, vision=vision)
    theirs = saved(tmp_path, config, 32)
    model = from_folder(tmp_path, size=48, words=10)
    assert model.config == config
    ids, words = expressions(config)
    pixels = torch.randint(0, 256, (3, 48, 48, 3), dtype=torch.uint8)
    floats = (pixels.float() / 255 - model.mean) / model.std
    expected = theirs(
        input_ids=ids.long(), pixel_values=floats.permute(0, 3, 1, 2), attention_mask=words
    ).logits
    # float32 through a dozen layers, pixels normalised in another order
    torch.testing.assert_close(model(pixels, ids, words), expected, atol=1e-4, rtol=1e-4)
    assert float(expected.std()) > 0.01
    other = torch.where(words, ids, torch.full_like(ids, 7))
    assert torch.equal(model(pixels, other, words), model(pixels, ids, words))
    model.rescale(0.25, 3.0)
    found = model(pixels, ids, words)
    torch.testing.assert_close(found, 3.0 * (expected - 0.25), atol=3e-4, rtol=1e-4)


def test_only_what_is_used_is_built() -> None:
    with torch.device("meta"):
        model = CLIPSeg(PAPER)
        whole = CLIPSegForImageSegmentation(_transformers_config(replace(PAPER, size=224)))
    assert len(model.clip.vision_model.encoder.layers) == 10
    names = {n for n, _ in whole.named_parameters()}
    assert {n for n, _ in model.named_parameters()} <= names
    # clipseg-rd64-refined: 150.7 M, of which the decoder has 1.13 M
    assert sum(p.numel() for p in whole.parameters()) == pytest.approx(150.75e6, rel=1e-3)
    assert sum(p.numel() for p in model.decoder.parameters()) == pytest.approx(1.13e6, rel=2e-2)


def test_the_processor_says_mean_and_deviation(tmp_path: Path) -> None:
    saved(tmp_path, SMALL, 48)
    text = json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": 352})
    (tmp_path / "preprocessor_config.json").write_text(text)
    model = from_folder(tmp_path, size=48)
    assert (model.config.mean, model.config.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert model.config.words == 12


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_folder(tmp_path)
    assert caught.value.code == "checkpoint-missing"
    saved(tmp_path, SMALL, 48)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError):
        from_folder(tmp_path, size=48)
    with pytest.raises(CheckpointError):
        from_folder(tmp_path, size=50)


@pytest.mark.parametrize(
    "wrong", [{"size": 50}, {"words": 13}, {"condition": 2}, {"layers": (4,)}, {"refined": True}]
)
def test_impossible_configurations(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        replace(SMALL, **wrong)


@torch.no_grad()
def test_the_graphs() -> None:
    torch.manual_seed(0)
    model = CLIPSeg(SMALL).eval()
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    text, image, mask = model.parts()
    for part in (text, image, mask):
        graph = to_onnx(part)
        require_clean(graph)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        runner = onnxruntime.InferenceSession(graph.SerializeToString(), options)
        for batch in (1, 4):
            example = taken_by(part, batch, 5)
            expected = part.module(*example)
            expected = expected if isinstance(expected, tuple) else (expected,)
            feeds = {p.name: v.numpy() for p, v in zip(part.inputs, example, strict=True)}
            outputs = runner.run(None, feeds)
            for port, found, wanted in zip(part.outputs, outputs, expected, strict=True):
                assert tuple(wanted.shape[1:]) == port.shape[1:]
                assert np.abs(found - wanted.numpy()).max() <= 1e-4 * float(wanted.std())


@torch.no_grad()
def test_parts_chain_to_the_whole() -> None:
    model = CLIPSeg(TINY).eval()
    text, image, mask = model.parts()
    (ids, words), (pixels,) = taken_by(text, 4, 0), taken_by(image, 4, 0)
    assert len(pixels) == pictures(4) == 2
    index = taken_by(mask, 4, 0)[0]
    logits = mask.module(index, *text.module(ids, words), image.module(pixels))
    assert logits.shape == (4, 96, 96)
    assert torch.equal(logits, model(pixels, ids, words, index))
    masks = torch.zeros(4, 96, 96, dtype=torch.bool)
    assert torch.equal(model.rehearse(pixels, ids, words, index, masks).logits, logits)


@torch.no_grad()
def test_the_name_of_a_folder_opens_it(tmp_path: Path) -> None:
    saved(tmp_path, TINY, TINY.size)
    loaded = open_model(f"clipseg:{tmp_path}", ("the", "red", "circle"))
    assert (loaded.card.model, len(loaded.card.sha256)) == ("clipseg", 64)
    encoded = loaded.tokenizer.encode("the red circle")
    assert len(encoded.ids) >= 3
    assert max(encoded.ids) < loaded.model.config.vocabulary
    given = inputs_of(loaded.model, 2, 0)
    assert torch.equal(loaded.model(*given), from_folder(tmp_path)(*given))
    with pytest.raises(CheckpointError):
        open_model(f"clipseg:{tmp_path / 'nothing'}", ())
    with pytest.raises(CheckpointError, match="weights of its own"):
        open_model(f"clipseg:{tmp_path}", (), weights=tmp_path / "model.safetensors")
