"""Files of weights come back as torch wrote them, or are refused in a sentence."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refedge.errors import CheckpointError
from refedge.models.convert.weights import digest, read_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from .weight_writer import State, TinyCLIP, clip_archive, training_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript


def some_state() -> State:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    return network.state_dict()


def same(found: State, wanted: State) -> bool:
    """Equal names and numbers; floats as float32, contiguous."""
    return list(found) == list(wanted) and all(
        torch.equal(found[k], v.float() if v.is_floating_point() else v)
        and found[k].is_contiguous()
        and found[k].dtype == (torch.float32 if v.is_floating_point() else v.dtype)
        for k, v in wanted.items()
    )


def refused(path: Path, *groups: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_weights(path, *(groups or ("model",)))
    assert str(path) in caught.value.what
    return caught.value


@pytest.mark.parametrize("legacy", [False, True])
def test_the_groups_of_a_training_checkpoint(legacy: bool, tmp_path: Path) -> None:
    model, bert = some_state(), {"embeddings.word": torch.randn(5, 3)}
    path = training_checkpoint(tmp_path / "x.pth", legacy=legacy, model=model, bert_model=bert)
    found = read_weights(path, "model", "bert_model")
    assert list(found) == ["model", "bert_model"]
    assert same(found["model"], model)
    assert same(found["bert_model"], bert)
    assert list(read_weights(path, "bert_model")) == ["bert_model"]


@pytest.mark.parametrize("legacy", [False, True])
def test_bare_state_dicts_of_any_dtype(legacy: bool, tmp_path: Path) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16)
    base = torch.randn(4, 6)
    state = {str(d): (torch.randn(2, 3) * 50).to(d) for d in (*dtypes, torch.int8, torch.uint8)} | {
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": base.T,
        "a view": base[1:3, 2:5],
        "the same again": base,
        "parameter": nn.Parameter(torch.randn(3)),
    }
    path = tmp_path / "x.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert same(read_weights(path, "model")["model"], state)


def test_safetensors(tmp_path: Path) -> None:
    state = {"a": torch.randn(2, 3).half(), "b": torch.arange(3)}
    save_file(state, tmp_path / "x.safetensors")
    found = read_weights(tmp_path / "x.safetensors", "model")["model"]
    assert same({k: found[k] for k in state}, state)


def test_what_mmcv_and_others_save_beside_weights(tmp_path: Path) -> None:
    content = {
        "meta": {"mmcv_version": "1.5", "classes": ["wall", "sky"], "score": np.float64(0.5)},
        "state_dict": some_state(),
        "best": np.float32(1.0),
        "milestones": {3, 4},
        "device": torch.device("cpu"),
        "shape": torch.Size([2, 3]),
    }
    torch.save(content, tmp_path / "x.pth")
    assert same(read_weights(tmp_path / "x.pth", "state_dict")["state_dict"], some_state())


@pytest.mark.parametrize("traced", [False, True])
def test_torchscript_archives(traced: bool, tmp_path: Path) -> None:
    path = tmp_path / "ViT-B-16.pt"
    wanted = clip_archive(path, TinyCLIP(), traced=traced)
    found = read_weights(path, "state_dict")["state_dict"]
    assert same({k: found[k] for k in wanted}, wanted)
    assert set(found) == set(wanted) == set(torch.jit.load(path).state_dict())


def test_the_code_of_an_archive_is_not_read(tmp_path: Path) -> None:
    wanted = clip_archive(tmp_path / "clip.pt", TinyCLIP())
    with (
        zipfile.ZipFile(tmp_path / "clip.pt") as source,
        zipfile.ZipFile(tmp_path / "nocode.pt", "w") as target,
    ):
        assert any("/code/" in name for name in source.namelist())
        for entry in source.infolist():
            if "/code/" not in entry.filename:
                target.writestr(entry.filename, source.read(entry))
            else:
                target.writestr(entry.filename, b"import os; os.system('touch harmed')\n")
    found = read_weights(tmp_path / "nocode.pt", "state_dict")["state_dict"]
    assert set(found) == set(wanted)
    with pytest.raises(RuntimeError):
        torch.jit.load(tmp_path / "nocode.pt")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "x.pth").code == "weights-missing"
    assert refused(tmp_path).code == "weights-missing"
    assert refused(tmp_path / "x.safetensors").code == "weights-missing"
    with pytest.raises(CheckpointError) as caught:
        digest(tmp_path / "x.pth")
    assert caught.value.code == "weights-missing"


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ({"optimizer": {"lr": 1.0}, "epoch": 3}, "optimizer, epoch"),
        ({}, "nothing"),
        ([torch.ones(2)], "list"),
        (torch.ones(2), "a bare tensor"),
        ({"model": {"a": torch.ones(2), "note": "text"}}, "note"),
        ({"a": torch.ones(2), "epoch": 3}, "epoch"),
    ],
)
def test_files_of_another_layout(content: Any, held: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    error = refused(tmp_path / "x.pth")
    assert error.code == "weights-layout"
    assert held in error.why


def test_a_whole_model_is_not_weights(tmp_path: Path) -> None:
    """``torch.save(model)`` needs the model's own code to be read."""
    torch.save(nn.Linear(2, 2), tmp_path / "x.pth")
    error = refused(tmp_path / "x.pth")
    assert error.code == "weights-pickle"
    assert "torch.nn.modules.linear.Linear" in error.why


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"<html>404</html>", b"\x80\x02."])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_what_is_no_file_of_weights(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name).code in ("weights-damaged", "weights-pickle")


def written(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(some_state(), path)
    elif kind == "script":
        clip_archive(path, TinyCLIP())
    else:
        training_checkpoint(path, legacy=kind == "legacy", model=some_state())
    return path


KINDS = ("zip", "legacy", "script", "safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, kind)
    raw = path.read_bytes()
    rng = random.Random(0)
    for length in (*rng.sample(range(len(raw)), 40), len(raw) - 1, len(raw) // 2):
        path.write_bytes(raw[:length])
        assert refused(path).code == "weights-damaged"


@pytest.mark.parametrize("kind", KINDS)
def test_changed_bytes_are_noticed_or_harmless(kind: str, tmp_path: Path) -> None:
    """A zip has checksums; the older format and safetensors have none, so numbers may change."""
    path = written(tmp_path, kind)
    raw = path.read_bytes()
    whole = read_weights(path, "model")["model"]
    rng = random.Random(1)
    for _ in range(120):
        damaged = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            found = read_weights(path, "model")["model"]
        except CheckpointError as error:
            assert error.code.startswith("weights-")
        else:
            assert sum(t.numel() for t in found.values()) <= len(raw)
            if kind in ("zip", "script"):
                assert all(torch.equal(found[k], whole[k]) for k in set(found) & set(whole))


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(
    st.dictionaries(st.text(min_size=1, max_size=8), shapes, min_size=1, max_size=5), st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_any_state_dict_comes_back(named: dict[str, tuple[int, ...]], legacy: bool) -> None:
    import tempfile

    state: dict[str, Tensor] = {
        k: torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
        for k, shape in named.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        assert same(read_weights(path, "no group of that name")["no group of that name"], state)


def test_the_digest_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1_000_000)
    import hashlib

    assert digest(tmp_path / "x") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
