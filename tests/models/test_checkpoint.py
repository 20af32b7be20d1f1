from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refedge.data.refshapes.expressions import words
from refedge.errors import CheckpointError
from refedge.models.checkpoint import (
    SHIPPED,
    compact,
    fit,
    load_checkpoint,
    locate,
    open_model,
    save_checkpoint,
    shipped,
)
from refedge.models.seeded import seed_weights
from refedge.models.slvit import TINY, SLViT
from refedge.models.tokenizers import word_level
from safetensors.torch import save_file

from .weight_writer import official_shapes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = seed_weights(SLViT(TINY), 0)
    return save_checkpoint(
        tmp_path / "own", "slvit", model, word_level(words()), training={"pairs": 3}
    )


def test_round_trip(folder: Path) -> None:
    loaded = load_checkpoint(str(folder))
    again = compact(loaded.model)
    first = compact(seed_weights(SLViT(TINY), 0))
    assert all(torch.equal(again[k], first[k]) for k in first)
    assert loaded.card.training == {"pairs": 3}
    assert loaded.model.config == TINY
    assert not loaded.model.training


def test_what_is_shipped_is_small_and_loads() -> None:
    assert "slvit-tiny" in shipped()
    for name in shipped():
        assert (SHIPPED / name / "model.safetensors").stat().st_size <= 3_000_000
        loaded = load_checkpoint(name)
        assert {"recipe", "pairs", "curve"} <= set(loaded.card.training)
        assert {"refshapes:test"} <= set(loaded.card.scores)


def test_a_changed_weight_is_noticed(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(folder))
    assert caught.value.code == "checkpoint-hash"


def test_a_checkpoint_of_another_configuration(folder: Path) -> None:
    """The card says one thing, the weights another."""
    card = json.loads((folder / "card.json").read_text())
    card["config"]["widths"][3] = 112
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(folder))
    assert caught.value.code == "checkpoint-mismatch"
    assert "of another shape" in caught.value.why


def test_a_checkpoint_of_another_model(folder: Path) -> None:
    card = json.loads((folder / "card.json").read_text()) | {"model": "unet"}
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(folder))
    assert caught.value.code == "checkpoint-model"


@pytest.mark.parametrize("file", ["card.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"model": 3}'])
def test_damaged_files(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(folder))
    assert caught.value.code == "checkpoint-unreadable"


def test_missing_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(folder))
    assert caught.value.code == "checkpoint-unreadable"
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(folder))
    assert caught.value.code == "checkpoint-missing"


def test_every_key_that_does_not_fit_is_named() -> None:
    model = SLViT(TINY)
    state = dict(model.state_dict())
    state["backbone.norm9.weight"] = torch.zeros(1)
    del state["classifier.conv1.bias"]
    state["squeelayers.0.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as caught:
        fit(model, state)
    for part in ("classifier.conv1.bias", "backbone.norm9.weight", "squeelayers.0.bias (5,)"):
        assert part in caught.value.why


def test_official_weights_load_into_a_configuration(tmp_path: Path) -> None:
    model = SLViT(TINY)
    official = {k: torch.full(s, 0.01) for k, s in official_shapes(model).items()}
    path = tmp_path / "official.safetensors"
    save_file(official, path)
    loaded = open_model("slvit:tiny", words(), weights=path)
    assert float(loaded.model.classifier.conv1.weight[0, 0, 0, 0]) == pytest.approx(0.01)
    assert len(loaded.card.sha256) == 64
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError) as caught:
        open_model("slvit:tiny", words(), weights=tmp_path / "bad.safetensors")
    assert caught.value.code == "checkpoint-unreadable"


@pytest.mark.parametrize(
    ("name", "options", "code"),
    [
        ("slvit:huge", {}, "config-unknown"),
        ("unet:tiny", {}, "config-unknown"),
        ("slvit:tiny", {"size": 100}, "config-size"),
        ("slvit:tiny", {"size": 32}, "config-size"),  # one region, of which four are chosen
        ("nothing", {}, "checkpoint-missing"),
    ],
)
def test_models_that_do_not_exist(name: str, options: dict[str, int], code: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_model(name, words(), **options)  # type: ignore[arg-type]
    assert caught.value.code == code


def test_another_size_keeps_the_weights(folder: Path) -> None:
    own, larger = (open_model(str(folder), words(), size=s) for s in (None, 128))
    assert larger.model.config == replace(TINY, size=128)
    assert torch.equal(own.model.classifier.conv1.weight, larger.model.classifier.conv1.weight)


def test_a_family_alone_is_its_tiny_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("slvit") == locate("slvit-tiny")
    mine = tmp_path / "slvit"
    mine.mkdir()
    (mine / "card.json").write_text("{}")
    assert locate("slvit") == Path("slvit")
