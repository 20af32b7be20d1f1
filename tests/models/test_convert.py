"""``refedge convert``: what it writes loads, is what the files hold, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from refedge.cli import main
from refedge.errors import CheckpointError
from refedge.models.checkpoint import load_checkpoint
from refedge.models.convert.convert import convert
from refedge.models.convert.weights import digest
from refedge.models.darknet import Darknet
from refedge.models.lavt import LAVT
from refedge.models.lavt import TINY as LAVT_TINY
from refedge.models.lts import LTS
from refedge.models.lts import TINY as LTS_TINY
from refedge.models.slvit import TINY, SLViT
from refedge.models.text import bert

from .test_convert_layouts import (
    CLIP,
    darknet_numbers,
    glove,
    lavt_shapes,
    mscan_shapes,
    shaped,
    tiny_clip,
    write_darknet,
)
from .weight_writer import clip_archive, official_shapes, random_like, training_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle", "##s", "left"]


def quiet(message: str) -> None:
    """Nobody listens."""


@pytest.fixture
def mscan(tmp_path: Path) -> Path:
    torch.save({"state_dict": shaped(mscan_shapes())}, tmp_path / "mscan_b.pth")
    return tmp_path / "mscan_b.pth"


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A folder of Hugging Face with BERT and its vocabulary."""
    network = bert(TINY.text)
    network.load_state_dict(random_like(network.state_dict(), seed=9))
    network.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return tmp_path / "bert"


def test_a_model_of_two_files_and_seeds(mscan: Path, words: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    files = [("mscan", mscan), ("bert", words)]
    record = convert(files, folder, model="slvit:tiny", seed=3, say=quiet)
    loaded = load_checkpoint(str(folder))
    assert loaded.card.training == record
    assert loaded.card.tokenizer == "wordpiece"
    assert loaded.tokenizer.encode("red circles").ids == [2, 5, 6, 7, 3]
    state = loaded.model.state_dict()
    wanted = torch.load(mscan)["state_dict"]
    name = "block1.0.attn.proj_1.weight"
    assert torch.equal(state[f"backbone.{name}"], wanted[name])  # all bits, not as float16
    first, second = record["converted"]
    assert first["layout"] == "mscan"
    assert first["files"] == {"mscan_b.pth": digest(mscan)}
    assert first["tensors"] == len(wanted)
    assert first["modules"] == ["backbone"]
    assert second["files"] == {"model.safetensors": digest(words / "model.safetensors")}
    own = SLViT(TINY)
    given = sum(
        p.numel()
        for n, p in own.named_parameters()
        if n.startswith("text_encoder.") or (n.startswith("backbone.") and ".fusion." not in n)
    )
    assert sum(record["seeded"].values()) == sum(p.numel() for p in own.parameters()) - given
    assert "text_encoder" not in record["seeded"]
    assert {"backbone", "classifier", "inter_trans"} <= set(record["seeded"])


def test_the_rest_is_seeded_reproducibly(mscan: Path, tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        convert([("mscan", mscan)], tmp_path / name, model="slvit:tiny", seed=seed, say=quiet)
        digests.append(load_checkpoint(str(tmp_path / name)).card.sha256)
    assert digests[0] == digests[1] != digests[2]


def test_a_whole_model_seeds_nothing(words: Path, tmp_path: Path) -> None:
    official = shaped(official_shapes(SLViT(TINY)))
    path = training_checkpoint(tmp_path / "model_best.pth", model=official)
    said: list[str] = []
    record = convert(
        [("slvit", path)], tmp_path / "a", model="slvit:tiny", tokenizer=words, say=said.append
    )
    assert record["seeded"] == {}
    assert said == [f"reading {path}"]
    loaded = load_checkpoint(str(tmp_path / "a"))
    assert all(torch.equal(v, official[k]) for k, v in loaded.model.state_dict().items())
    convert([("slvit", path)], tmp_path / "b", config=TINY, spare_words=("red",), say=said.append)
    assert load_checkpoint(str(tmp_path / "b")).card.tokenizer == "word-level"


def test_lavt_in_two_groups(tmp_path: Path) -> None:
    bert_model = random_like(bert(LAVT_TINY.text).state_dict())
    state = shaped(lavt_shapes())
    path = training_checkpoint(tmp_path / "refcoco.pth", model=state, bert_model=bert_model)
    record = convert([("lavt", path)], tmp_path / "own", model="lavt:tiny", say=quiet)
    loaded = load_checkpoint(str(tmp_path / "own"))
    assert isinstance(loaded.model, LAVT)
    assert record["seeded"] == {}
    name = "text_encoder.embeddings.LayerNorm.weight"
    assert torch.equal(loaded.model.state_dict()[name], bert_model[name.split(".", 1)[1]])


def test_word_vectors_bring_their_words(tmp_path: Path) -> None:
    """LTS from Darknet and GloVe: the tokenizer is the file's first words."""
    network = LTS(LTS_TINY)
    backbone = network.get_submodule("backbone")
    assert isinstance(backbone, Darknet)
    backbone.load_state_dict(random_like(backbone.state_dict(), seed=4))
    weights = write_darknet(tmp_path / "yolov3.weights", darknet_numbers(backbone))
    vectors = glove(tmp_path / "glove.txt", {",": 1, "The": 2, "the": 3, "red": 4}, width=48)
    files = [("darknet", weights), ("glove", vectors)]
    record = convert(files, tmp_path / "own", model="lts:tiny", say=quiet)
    loaded = load_checkpoint(str(tmp_path / "own"))
    assert loaded.card.tokenizer == "word-level"
    assert loaded.tokenizer.encode("The RED fox").ids == [3, 4, 1]
    assert loaded.model.state_dict()["embeddings.weight"][4, 0] == 4
    assert record["converted"][1]["words"] == 3
    assert {"recurrent", "locator", "head"} <= set(record["seeded"])
    assert not {"backbone", "embeddings"} & set(record["seeded"])


def test_clip_brings_its_towers(tmp_path: Path) -> None:
    clip_archive(tmp_path / "ViT-B-16.pt", tiny_clip())
    record = convert([("clip", tmp_path / "ViT-B-16.pt")], tmp_path / "own", config=CLIP, say=quiet)
    loaded = load_checkpoint(str(tmp_path / "own"))
    assert loaded.card.model == "cm_masksd"
    assert loaded.model.config == CLIP
    assert "clip" not in record["seeded"]
    assert {"neck", "decoder", "projector"} <= set(record["seeded"])


def refused(tmp_path: Path, *files: tuple[str, Path], **options: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        convert(files, tmp_path / "own", say=quiet, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "own").exists()
    return caught.value


def test_what_cannot_be_converted_leaves_nothing(mscan: Path, words: Path, tmp_path: Path) -> None:
    both = [("mscan", mscan), ("mscan", mscan)]
    assert refused(tmp_path, *both, model="slvit:tiny").code == "convert-overlap"
    assert refused(tmp_path, ("bert", words)).code == "convert-model"
    assert refused(tmp_path, ("vgg", mscan), model="slvit:tiny").code == "convert-layout"
    assert refused(tmp_path, ("mscan", mscan), model="lavt:tiny").code == "convert-part"
    assert refused(tmp_path, ("mscan", mscan), model="slvit:huge").code == "config-unknown"
    assert refused(tmp_path, ("mscan", words), model="slvit:tiny").code == "weights-missing"
    missing = refused(tmp_path, ("mscan", mscan), model="slvit:tiny", tokenizer=tmp_path)
    assert missing.code == "convert-vocabulary"
    (words / "vocab.txt").write_text("\n".join([*VOCAB, *map(str, range(60))]) + "\n")
    large = refused(tmp_path, ("bert", words), model="slvit:tiny")
    assert large.code == "convert-vocabulary"
    assert "69" in large.why


def test_what_is_there_is_not_overwritten(mscan: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "model.safetensors").write_text("precious")
    with pytest.raises(CheckpointError) as caught:
        convert([("mscan", mscan)], tmp_path / "own", model="slvit:tiny", say=quiet)
    assert caught.value.code == "output-unwritable"
    assert (tmp_path / "own" / "model.safetensors").read_text() == "precious"


def refedge(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def test_the_command(mscan: Path, words: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    result = refedge("mscan", mscan, "bert", words, "-o", folder, "--model", "slvit:tiny")
    assert result.exit_code == 0, result.output
    assert f"mscan: {len(mscan_shapes())} tensors of backbone" in result.output
    assert "seeded: backbone (" in result.output
    assert json.loads((folder / "card.json").read_text())["training"]["seeded"]["classifier"]


def test_the_command_refuses(mscan: Path, tmp_path: Path) -> None:
    for arguments, code in (
        (("mscan",), "convert-layout"),
        (("mscan", mscan, "bert"), "convert-layout"),
        (("mscan", mscan, "--words", tmp_path / "words.txt"), "weights-missing"),
        (("mscan", tmp_path / "x.pth", "--model", "slvit:tiny"), "weights-missing"),
    ):
        result = refedge(*arguments, "-o", tmp_path / "own")
        assert result.exit_code == 2
        assert f"error [{code}]" in result.output
        assert not (tmp_path / "own").exists()
