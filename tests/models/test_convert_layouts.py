"""Public names and formats find their places in the models, and nothing else does."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from refedge.errors import CheckpointError
from refedge.models.clip import ClipText, ClipVision, embed_words, encode_words
from refedge.models.clip_resnet import ClipResNet
from refedge.models.cm_masksd import TINY as CM_TINY
from refedge.models.cm_masksd import CMMaskSD
from refedge.models.convert.darknet import read_darknet, yolo_heads
from refedge.models.convert.glove import read_glove
from refedge.models.convert.layouts import place, read_layout
from refedge.models.darknet import Darknet
from refedge.models.lavt import LAVT
from refedge.models.lavt import TINY as LAVT_TINY
from refedge.models.lts import LTS
from refedge.models.lts import TINY as LTS_TINY
from refedge.models.m3att import M3Att, M3AttConfig
from refedge.models.m3att_config import TINY as M3ATT_TINY
from refedge.models.parts import Network
from refedge.models.slvit import TINY, SLViT
from refedge.models.step import STEP
from refedge.models.step import TINY as STEP_TINY
from refedge.models.text import TextConfig, bert, encode
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertForMaskedLM, BertModel, CLIPConfig, CLIPModel

from .weight_writer import (
    State,
    TinyCLIP,
    clip_archive,
    official_shapes,
    random_like,
    training_checkpoint,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
WORDS = ("red", "circle", "left")


def fill(model: Network, layout: str, path: Path, words: tuple[str, ...] | None = None) -> set[str]:
    """Read and place a file; gives the names whose numbers it has changed."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    place(model, read_layout(layout, path, model, words), path)
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def refused(model: Network, layout: str, path: Path) -> CheckpointError:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        place(model, read_layout(layout, path, model, WORDS), path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return caught.value


def shaped(shapes: dict[str, tuple[int, ...]]) -> State:
    """Random numbers under these names; counters are integers."""
    counters = {k for k in shapes if k.endswith("num_batches_tracked")}
    return random_like(
        {k: torch.zeros(s, dtype=torch.long if k in counters else None) for k, s in shapes.items()}
    )


# SLViT and LAVT -----------------------------------------------------------------------------------


def test_the_official_slvit(tmp_path: Path) -> None:
    model = SLViT(TINY)
    official = shaped(official_shapes(model))
    official["text_encoder.embeddings.position_ids"] = torch.arange(20)[None]
    path = training_checkpoint(tmp_path / "model_best.pth", model=official)
    fill(model, "slvit", path)
    state = model.state_dict()
    assert all(torch.equal(state[k], official[k].to(state[k].dtype)) for k in state)


def test_a_key_that_is_missing_unexpected_or_of_another_shape_is_named(tmp_path: Path) -> None:
    model = SLViT(TINY)
    official = shaped(official_shapes(model))
    del official["classifier.conv1.bias"]
    official["backbone.norm9.weight"] = torch.zeros(1)
    official["squeelayers.0.bias"] = torch.zeros(5)
    path = training_checkpoint(tmp_path / "model_best.pth", model=official)
    error = refused(model, "slvit", path)
    assert error.code == "checkpoint-mismatch"
    assert str(path) in error.what
    for part in ("classifier.conv1.bias", "backbone.norm9.weight", "squeelayers.0.bias (5,)"):
        assert part in error.why


def swin_shapes(width: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int, ratio: int
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Keys of microsoft/Swin-Transformer without its classifier."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 4, 4),
        **{f"patch_embed.{n}": (width,) for n in ("proj.bias", "norm.weight", "norm.bias")},
    }
    for i, (depth, h) in enumerate(zip(depths, heads, strict=True)):
        c = width * 2**i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            shapes |= {f"{block}.norm{n}.{k}": (c,) for n in (1, 2) for k in ("weight", "bias")}
            shapes |= {
                f"{block}.attn.relative_position_bias_table": ((2 * window - 1) ** 2, h),
                f"{block}.attn.relative_position_index": (window**2, window**2),
                f"{block}.attn.qkv.weight": (3 * c, c),
                f"{block}.attn.qkv.bias": (3 * c,),
                f"{block}.attn.proj.weight": (c, c),
                f"{block}.attn.proj.bias": (c,),
                f"{block}.mlp.fc1.weight": (ratio * c, c),
                f"{block}.mlp.fc1.bias": (ratio * c,),
                f"{block}.mlp.fc2.weight": (c, ratio * c),
                f"{block}.mlp.fc2.bias": (c,),
            }
            if j % 2:
                shapes[f"{block}.attn_mask"] = (4, window**2, window**2)
        if i < 3:
            down = f"layers.{i}.downsample"
            shapes |= {f"{down}.norm.weight": (4 * c,), f"{down}.norm.bias": (4 * c,)}
            shapes[f"{down}.reduction.weight"] = (2 * c, 4 * c)
    return shapes


def lavt_shapes(config: type(LAVT_TINY) = LAVT_TINY) -> dict[str, tuple[int, ...]]:  # type: ignore[valid-type]
    """Keys of the official LAVT without BERT; the gate of the last stage is dead."""
    s, e, w = config.swin, config.text.width, config.head_width
    swin = swin_shapes(s.width, s.depths, s.heads, s.window, s.ratio)
    shapes = {f"backbone.{k}": v for k, v in swin.items() if not k.endswith("attn_mask")}
    for i in range(4):
        c = s.width * 2**i
        shapes |= {f"backbone.norm{i}.weight": (c,), f"backbone.norm{i}.bias": (c,)}
        stage = f"backbone.layers.{i}"
        shapes |= {f"{stage}.res_gate.{n}.weight": (c, c) for n in (0, 2)}
        inner = {"vis_project.0": c, "project_mm.0": c} | {
            f"image_lang_att.{n}.0": width
            for n, width in (("f_query", c), ("f_key", e), ("f_value", e), ("W", c))
        }
        for name, width in inner.items():
            shapes[f"{stage}.fusion.{name}.weight"] = (c, width, 1)
            shapes[f"{stage}.fusion.{name}.bias"] = (c,)
    below = 8 * s.width
    for level, c in ((4, 4 * s.width), (3, 2 * s.width), (2, s.width)):
        shapes[f"classifier.conv1_{level}.weight"] = (w, below + c, 3, 3)
        shapes[f"classifier.conv2_{level}.weight"] = (w, w, 3, 3)
        for n in (1, 2):
            norm = f"classifier.bn{n}_{level}"
            names = ("weight", "bias", "running_mean", "running_var")
            shapes |= {f"{norm}.{k}": (w,) for k in names} | {f"{norm}.num_batches_tracked": ()}
        below = w
    return shapes | {"classifier.conv1_1.weight": (2, w, 1, 1), "classifier.conv1_1.bias": (2,)}


@pytest.mark.parametrize("one", [False, True])
def test_the_official_lavt_and_lavt_one(one: bool, tmp_path: Path) -> None:
    model = LAVT(LAVT_TINY)
    state = shaped(lavt_shapes())
    words = random_like(bert(LAVT_TINY.text).state_dict(), seed=2)
    words |= {"pooler.dense.weight": torch.ones(48, 48), "embeddings.position_ids": torch.ones(1)}
    if one:
        groups = {"model": state | {f"text_encoder.{k}": v for k, v in words.items()}}
    else:
        groups = {"model": state, "bert_model": words}
    path = training_checkpoint(tmp_path / "refcoco.pth", **groups)
    fill(model, "lavt", path)
    for name, tensor in model.state_dict().items():
        inner = name.removeprefix("text_encoder.")
        wanted = state[name] if inner == name else words[inner]
        assert torch.equal(tensor, wanted.to(tensor.dtype)), name


def test_lavt_without_its_bert_is_refused(tmp_path: Path) -> None:
    path = training_checkpoint(tmp_path / "refcoco.pth", model=shaped(lavt_shapes()))
    error = refused(LAVT(LAVT_TINY), "lavt", path)
    assert "text_encoder.embeddings" in error.why


def test_swin_of_imagenet(tmp_path: Path) -> None:
    model = LAVT(LAVT_TINY)
    s = LAVT_TINY.swin
    state = shaped(swin_shapes(s.width, s.depths, s.heads, s.window, s.ratio))
    whole = state | {"norm.weight": torch.ones(192), "head.weight": torch.ones(9, 192)}
    torch.save({"model": whole}, tmp_path / "swin.pth")
    changed = fill(model, "swin", tmp_path / "swin.pth")
    unused = ("relative_position_index", "attn_mask")
    assert changed == {f"backbone.{k}" for k in state if not k.endswith(unused)}
    swapped = M3Att(replace(M3ATT_TINY, darknet=None, swin=s))
    assert len(fill(swapped, "swin", tmp_path / "swin.pth")) == len(changed)


# MSCAN --------------------------------------------------------------------------------------------


def mscan_shapes(inner: str = "dwconv.dwconv") -> dict[str, tuple[int, ...]]:
    """Keys of Visual-Attention-Network/SegNeXt's backbone; mmsegmentation's have one ``dwconv``."""
    norm = ("weight", "bias", "running_mean", "running_var")
    shapes: dict[str, tuple[int, ...]] = {}

    def both(name: str, weight: tuple[int, ...]) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def batch_norm(name: str, c: int) -> None:
        shapes.update({f"{name}.{k}": (c,) for k in norm} | {f"{name}.num_batches_tracked": ()})

    before = 3
    for i, (c, depth, r) in enumerate(zip(TINY.widths, TINY.depths, TINY.ratios, strict=True), 1):
        if i == 1:
            both("patch_embed1.proj.0", (c // 2, 3, 3, 3))
            batch_norm("patch_embed1.proj.1", c // 2)
            both("patch_embed1.proj.3", (c, c // 2, 3, 3))
            batch_norm("patch_embed1.proj.4", c)
        else:
            both(f"patch_embed{i}.proj", (c, before, 3, 3))
            batch_norm(f"patch_embed{i}.norm", c)
        for j in range(depth):
            block = f"block{i}.{j}"
            shapes |= {f"{block}.layer_scale_1": (c,), f"{block}.layer_scale_2": (c,)}
            batch_norm(f"{block}.norm1", c)
            batch_norm(f"{block}.norm2", c)
            both(f"{block}.attn.proj_1", (c, c, 1, 1))
            both(f"{block}.attn.proj_2", (c, c, 1, 1))
            unit = f"{block}.attn.spatial_gating_unit"
            both(f"{unit}.conv0", (c, 1, 5, 5))
            for n, k in enumerate((7, 11, 21)):
                both(f"{unit}.conv{n}_1", (c, 1, 1, k))
                both(f"{unit}.conv{n}_2", (c, 1, k, 1))
            both(f"{unit}.conv3", (c, c, 1, 1))
            both(f"{block}.mlp.fc1", (r * c, c, 1, 1))
            both(f"{block}.mlp.{inner}", (r * c, 1, 3, 3))
            both(f"{block}.mlp.fc2", (c, r * c, 1, 1))
        shapes |= {f"norm{i}.weight": (c,), f"norm{i}.bias": (c,)}
        before = c
    return shapes


@pytest.mark.parametrize("kind", ["segnext", "mmseg", "inside a SegNeXt", "parallel"])
def test_mscan(kind: str, tmp_path: Path) -> None:
    model = SLViT(TINY)
    state = shaped(mscan_shapes("dwconv" if kind == "mmseg" else "dwconv.dwconv"))
    extra = {"head.weight": torch.ones(9, 104), "head.bias": torch.ones(9)}
    prefix = {"inside a SegNeXt": "backbone.", "parallel": "module."}.get(kind, "")
    if kind == "inside a SegNeXt":
        extra = {"decode_head.conv_seg.weight": torch.ones(9, 4, 1, 1)}
    else:
        extra = {prefix + k: v for k, v in extra.items()}
    content = {
        "meta": {"epoch": 3},
        "state_dict": {prefix + k: v for k, v in state.items()} | extra,
    }
    torch.save(content, tmp_path / "mscan_b.pth")
    changed = fill(model, "mscan", tmp_path / "mscan_b.pth")
    own = {k for k in model.state_dict() if k.startswith("backbone.") and ".fusion." not in k}
    assert changed == own
    name = "block3.1.mlp.dwconv.dwconv.weight"
    wanted = state[name if kind != "mmseg" else name.replace("dwconv.dwconv", "dwconv")]
    assert torch.equal(model.state_dict()[f"backbone.{name}"], wanted)


def test_another_mscan_is_refused_by_name(tmp_path: Path) -> None:
    state = shaped(mscan_shapes())
    state["block1.9.layer_scale_1"] = torch.zeros(16)
    torch.save(state, tmp_path / "mscan_l.pth")
    error = refused(SLViT(TINY), "mscan", tmp_path / "mscan_l.pth")
    assert "1 unexpected: backbone.block1.9.layer_scale_1" in error.why
    assert refused(LAVT(LAVT_TINY), "mscan", tmp_path / "mscan_l.pth").code == "convert-part"


# BERT ---------------------------------------------------------------------------------------------


@pytest.fixture
def reference(tmp_path: Path) -> BertForMaskedLM:
    """A BERT with a head of its own, as transformers makes and saves it."""
    torch.manual_seed(1)
    config = BertModel(bert(TINY.text).config).config
    network = BertForMaskedLM(config).eval()
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.2)
    network.save_pretrained(tmp_path / "bert")
    return network


def write_old(folder: Path, state: State, *, prefix: bool) -> None:
    """As Google's weights came to torch: a pickle, ``gamma`` and ``beta``, pooler and heads."""
    (folder / "model.safetensors").unlink()
    old = {}
    for name, tensor in state.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        name = name.replace("LayerNorm.bias", "LayerNorm.beta")
        if prefix or name.startswith("bert."):
            old[name if prefix else name.removeprefix("bert.")] = tensor
    stem = "bert." if prefix else ""
    old |= {
        f"{stem}pooler.dense.bias": torch.ones(48),
        f"{stem}embeddings.position_ids": torch.ones(1),
    }
    torch.save(old, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("kind", ["safetensors", "old", "old without prefix"])
def test_bert_of_hugging_face(kind: str, reference: BertForMaskedLM, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    if kind != "safetensors":
        write_old(folder, reference.state_dict(), prefix=kind == "old")
    model = SLViT(TINY)
    changed = fill(model, "bert", folder)
    assert {k for k in model.state_dict() if k.startswith("text_encoder.")} == changed
    ids = torch.randint(1, 64, (2, 7))
    with torch.no_grad():
        found = encode(model.text_encoder.eval(), ids, torch.ones(2, 7, dtype=torch.bool))
        wanted = reference.bert(ids).last_hidden_state
    assert torch.equal(found, wanted)


def test_bert_fits_every_model_that_has_one(reference: BertForMaskedLM, tmp_path: Path) -> None:
    counts = {
        len(fill(model, "bert", tmp_path / "bert"))
        for model in (SLViT(TINY), LAVT(LAVT_TINY), M3Att(M3ATT_TINY))
    }
    assert len(counts) == 1
    error = refused(STEP(STEP_TINY), "bert", tmp_path / "bert")
    assert error.code == "convert-part"
    assert "BertModel" in error.why


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 8),
        ("hidden_act", "relu"),
        ("layer_norm_eps", 1e-5),
        ("vocab_size", [1]),
    ],
)
def test_a_bert_that_computes_something_else(
    field: str, value: object, reference: BertForMaskedLM, tmp_path: Path
) -> None:
    path = tmp_path / "bert" / "config.json"
    config = json.loads(path.read_text()) | {field: value}
    path.write_text(json.dumps(config))
    error = refused(SLViT(TINY), "bert", tmp_path / "bert")
    assert error.code == "weights-layout"
    assert field in error.why


def test_settings_that_a_file_leaves_out_are_the_usual_ones(
    reference: BertForMaskedLM, tmp_path: Path
) -> None:
    path = tmp_path / "bert" / "config.json"
    config = json.loads(path.read_text())
    del config["hidden_act"], config["layer_norm_eps"]
    path.write_text(json.dumps(config))
    assert fill(SLViT(TINY), "bert", tmp_path / "bert")
    del config["hidden_size"]  # usually 768
    path.write_text(json.dumps(config))
    assert "768" in refused(SLViT(TINY), "bert", tmp_path / "bert").why


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_damaged_settings(content: bytes, reference: BertForMaskedLM, tmp_path: Path) -> None:
    (tmp_path / "bert" / "config.json").write_bytes(content)
    assert refused(SLViT(TINY), "bert", tmp_path / "bert").code == "weights-damaged"


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert refused(SLViT(TINY), "bert", tmp_path / "nothing").code == "weights-layout"
    (tmp_path / "notes.txt").write_text("x")
    error = refused(SLViT(TINY), "bert", tmp_path)
    assert error.code == "weights-layout"
    assert "notes.txt" in error.why


# CLIP ---------------------------------------------------------------------------------------------

CLIP = replace(
    CM_TINY,
    embed=16,
    text=ClipText(vocabulary=64, width=32, layers=2, heads=4, positions=20),
    vision=ClipVision(patch=8, width=48, layers=2, heads=4),
)


def tiny_clip(grid: int = 12) -> TinyCLIP:
    torch.manual_seed(3)
    made = TinyCLIP(
        embed=16, vision=(48, 2, 4, 8, grid), text=(32, 2, 4), vocabulary=64, positions=20
    )
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3)
    return made


@torch.no_grad()
def agree(model: CMMaskSD, places: Tensor, words: Tensor, pixels: Tensor, ids: Tensor) -> None:
    """The towers give what CLIP gives; float32 sums in another order, values of order one."""
    ours = model.clip.eval()
    (seen,) = ours.look(pixels)
    seen = seen.flatten(2).transpose(1, 2)
    valid = torch.ones(ids.shape, dtype=torch.bool)
    read = encode_words(ours.text_model, embed_words(ours.text_model, ids), valid)
    assert (seen - places).abs().max() < 2e-5 * places.abs().max()
    assert (read - words).abs().max() < 2e-5 * words.abs().max()


@pytest.mark.parametrize("traced", [False, True])
def test_openais_archive_computes_the_same(traced: bool, tmp_path: Path) -> None:
    theirs = tiny_clip()
    state = clip_archive(tmp_path / "ViT-B-16.pt", theirs, traced=traced)
    theirs = tiny_clip()
    theirs.load_state_dict(state)
    model = CMMaskSD(CLIP)
    changed = fill(model, "clip", tmp_path / "ViT-B-16.pt")
    assert changed == {k for k in model.state_dict() if k.startswith("clip.")}
    pixels, ids = torch.randn(2, 3, 96, 96), torch.randint(0, 64, (2, 20))
    with torch.no_grad():
        places, words = theirs.eval()(pixels, ids)
        agree(model, places[:, 1:], words, pixels, ids)
        sentence = model.clip.text_projection(words)
    assert torch.allclose(sentence, words @ state["text_projection"], atol=1e-5)


def test_clip_of_hugging_face_computes_the_same(tmp_path: Path) -> None:
    both = {"num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 128, "eos_token_id": 63}
    text |= {"max_position_embeddings": 20, **both}
    vision = {
        "image_size": 96,
        "patch_size": 8,
        "hidden_size": 48,
        "intermediate_size": 192,
        **both,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    torch.manual_seed(4)
    theirs = CLIPModel(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "clip")
    model = CMMaskSD(CLIP)
    fill(model, "clip", tmp_path / "clip")
    pixels, ids = torch.randn(2, 3, 96, 96), torch.randint(0, 64, (2, 20))
    with torch.no_grad():
        seen = theirs.vision_model(pixels).last_hidden_state[:, 1:]
        places = theirs.visual_projection(theirs.vision_model.post_layernorm(seen))
        agree(model, places, theirs.text_model(ids).last_hidden_state, pixels, ids)
    path = tmp_path / "clip" / "config.json"
    settings = json.loads(path.read_text())
    settings["text_config"]["hidden_act"] = "gelu"
    path.write_text(json.dumps(settings))
    assert "hidden_act" in refused(CMMaskSD(CLIP), "clip", tmp_path / "clip").why


def test_positions_are_brought_to_another_size(tmp_path: Path) -> None:
    """A grid of 6 interpolated to 12; a table of equal rows stays one."""
    theirs = tiny_clip(grid=6)
    row = torch.randn(48)
    theirs.visual.positional_embedding.data[1:] = row
    state = clip_archive(tmp_path / "clip.pt", theirs)
    model = CMMaskSD(CLIP)
    fill(model, "clip", tmp_path / "clip.pt")
    table = model.state_dict()["clip.vision_model.embeddings.position_embedding.weight"]
    assert table.shape == (145, 48)
    assert torch.equal(table[0], state["visual.positional_embedding"][0])
    assert torch.allclose(table[1:], row.expand(144, -1), atol=1e-5)
    fewer = CMMaskSD(replace(CLIP, text=replace(CLIP.text, positions=20), words=17))
    fill(fewer, "clip", tmp_path / "clip.pt")


def clip_resnet_shapes(blocks: tuple[int, ...], width: int, embed: int, grid: int
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Keys of ``visual`` in OpenAI's RN50 and RN101."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_norm(conv: str, norm: str, weight: tuple[int, ...]) -> None:
        shapes[f"{conv}.weight"] = weight
        names = ("weight", "bias", "running_mean", "running_var")
        shapes.update({f"{norm}.{k}": weight[:1] for k in names})
        shapes[f"{norm}.num_batches_tracked"] = ()

    half = width // 2
    for n, weight in enumerate(((half, 3), (half, half), (width, half)), 1):
        conv_norm(f"conv{n}", f"bn{n}", (*weight, 3, 3))
    before = width
    for i, depth in enumerate(blocks):
        inner = width * 2**i
        for j in range(depth):
            block = f"layer{i + 1}.{j}"
            conv_norm(f"{block}.conv1", f"{block}.bn1", (inner, before, 1, 1))
            conv_norm(f"{block}.conv2", f"{block}.bn2", (inner, inner, 3, 3))
            conv_norm(f"{block}.conv3", f"{block}.bn3", (4 * inner, inner, 1, 1))
            if j == 0:
                down = f"{block}.downsample"
                conv_norm(f"{down}.0", f"{down}.1", (4 * inner, before, 1, 1))
            before = 4 * inner
    for name, out in (("k", before), ("q", before), ("v", before), ("c", embed)):
        shapes |= {
            f"attnpool.{name}_proj.weight": (out, before),
            f"attnpool.{name}_proj.bias": (out,),
        }
    return shapes | {"attnpool.positional_embedding": (grid**2 + 1, before)}


def test_openais_residual_network(tmp_path: Path) -> None:
    """The shortcut beside the attention pool is CRIS's own and stays as it was."""
    resnet = ClipResNet(blocks=(1, 2, 1, 1), width=8)
    model = CMMaskSD(
        replace(CLIP, vision=None, resnet=resnet, enlarge=(2, 2), width=64, distil=False)
    )
    text = {k: v for k, v in tiny_clip().state_dict().items() if not k.startswith("visual.")}
    visual = shaped(clip_resnet_shapes(resnet.blocks, 8, 16, 7))
    state = text | {f"visual.{k}": v for k, v in visual.items()}
    torch.save(state, tmp_path / "RN101.pt")
    changed = fill(model, "clip", tmp_path / "RN101.pt")
    own = {k for k in model.state_dict() if k.startswith("clip.")}
    assert own - changed == {k for k in own if ".connect." in k}
    assert torch.equal(
        model.state_dict()["clip.visual.layer2.0.downsample.1.running_var"],
        visual["layer2.0.downsample.1.running_var"],
    )
    assert model.state_dict()["clip.visual.attnpool.positional_embedding"].shape == (10, 256)


def test_a_clip_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    clip_archive(tmp_path / "clip.pt", TinyCLIP())
    error = refused(CMMaskSD(CLIP), "clip", tmp_path / "clip.pt")
    assert error.code == "checkpoint-mismatch"
    assert "of another shape" in error.why


# Darknet ------------------------------------------------------------------------------------------


def darknet_numbers(network: Darknet) -> np.ndarray:
    """In the order of Darknet's own files: bias, scale, mean, variance, kernel."""
    parts = []
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            norm = name.replace("conv.weight", "bn.")
            order = ("bias", "weight", "running_mean", "running_var")
            parts += [network.state_dict()[norm + k] for k in order] + [tensor]
    return np.concatenate([p.numpy().ravel() for p in parts]).astype("<f4")


def write_darknet(path: Path, numbers: np.ndarray, version: tuple[int, int] = (0, 2)) -> Path:
    seen = struct.pack("<q", 32013312) if version >= (0, 2) else struct.pack("<i", 32013312)
    path.write_bytes(struct.pack("<3i", *version, 0) + seen + numbers.tobytes())
    return path


def darknet() -> Darknet:
    network = Darknet((4, 6, 8, 8, 12, 16), (1, 1, 1, 2, 1))
    network.load_state_dict(random_like(network.state_dict(), seed=5))
    return network


HEADS = {
    "darknet53.conv.74": lambda: 0,
    "darknet53.weights": lambda: 16 * 1000 + 1000,
    "yolov3.weights of 80 classes": lambda: yolo_heads(8, 12, 16) + 3 * 85 * (8 + 12 + 16 + 3),
    "yolov3.weights of 1 class": lambda: yolo_heads(8, 12, 16) + 3 * 6 * (8 + 12 + 16 + 3),
}


@pytest.mark.parametrize("rest", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("version", [(0, 1), (0, 2)])
def test_darknet(rest: Callable[[], int], version: tuple[int, int], tmp_path: Path) -> None:
    wanted = darknet()
    numbers = np.concatenate([darknet_numbers(wanted), np.ones(rest(), "<f4")])
    path = write_darknet(tmp_path / "x.weights", numbers, version)
    found = read_darknet(path, Darknet((4, 6, 8, 8, 12, 16), (1, 1, 1, 2, 1)))
    state = wanted.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(found[k], state[k]) for k in state if "batches" not in k)


def test_the_published_files_have_the_right_size() -> None:
    """162,482,580 bytes of darknet53.conv.74 and 248,007,048 of yolov3.weights."""
    with torch.device("meta"):
        state = Darknet().state_dict()
    trunk = sum(t.numel() for k, t in state.items() if "batches" not in k)
    assert 20 + 4 * trunk == 162_482_580
    heads = yolo_heads(256, 512, 1024) + 255 * (256 + 512 + 1024 + 3)
    assert 20 + 4 * (trunk + heads) == 248_007_048


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda raw: raw[:-5000], "checkpoint-mismatch"),
        (lambda raw: raw[:-2], "weights-damaged"),
        (lambda raw: raw[:11], "weights-damaged"),
        (lambda raw: b"", "weights-damaged"),
        (lambda raw: b"\x7fELF" + raw[4:], "weights-damaged"),
        (lambda raw: raw + bytes(4), "weights-layout"),
        (lambda raw: raw[:20] + raw[24:] + raw[20:24], "weights-layout"),
        (lambda raw: raw[:20] + np.float32("nan").tobytes() + raw[24:], "weights-layout"),
    ],
)
def test_other_darknets(change: Callable[[bytes], bytes], code: str, tmp_path: Path) -> None:
    path = write_darknet(tmp_path / "x.weights", darknet_numbers(darknet()))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        read_darknet(path, Darknet((4, 6, 8, 8, 12, 16), (1, 1, 1, 2, 1)))
    assert caught.value.code == code


def test_darknet_in_the_models(tmp_path: Path) -> None:
    for model in (LTS(LTS_TINY), M3Att(M3ATT_TINY)):
        network = model.get_submodule("backbone")
        assert isinstance(network, Darknet)
        source = Darknet(
            tuple(layer.conv.out_channels for layer in _firsts(network)),
            tuple(len(stage) - 1 for stage in network.stages),
        )
        source.load_state_dict(random_like(source.state_dict(), seed=6))
        path = write_darknet(tmp_path / "x.weights", darknet_numbers(source))
        changed = fill(model, "darknet", path)
        own = {k for k in model.state_dict() if k.startswith("backbone.")}
        assert {k for k in own if "batches" not in k} == changed


def _firsts(network: Darknet) -> list[torch.nn.Module]:
    return [network.stem, *(stage[0] for stage in network.stages)]


# DeepLab ------------------------------------------------------------------------------------------


def test_torchvisions_deeplab(tmp_path: Path) -> None:
    model = STEP(STEP_TINY)
    c = STEP_TINY.backbone
    norm = ("weight", "bias", "running_mean", "running_var")
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (c.stem, 3, c.kernel, c.kernel)}
    shapes |= {f"bn1.{k}": (c.stem,) for k in norm} | {"bn1.num_batches_tracked": ()}
    before = c.stem
    for i, (width, depth) in enumerate(zip(c.widths, c.depths, strict=True), 1):
        out = c.expansion * width
        for j in range(depth):
            block = f"layer{i}.{j}"
            convs = {
                "conv1": (width, before, 1, 1),
                "conv2": (width, width, 3, 3),
                "conv3": (out, width, 1, 1),
            }
            if f"backbone.{block}.downsample.0.weight" in model.state_dict():
                convs["downsample.0"] = (out, before, 1, 1)
            for name, weight in convs.items():
                after = name.replace("conv", "bn").replace("downsample.0", "downsample.1")
                shapes[f"{block}.{name}.weight"] = weight
                shapes |= {f"{block}.{after}.{k}": weight[:1] for k in norm}
                shapes[f"{block}.{after}.num_batches_tracked"] = ()
            before = out
    state = shaped({f"backbone.{k}": v for k, v in shapes.items()})
    heads = {"classifier.0.convs.0.0.weight": torch.ones(1), "aux_classifier.4.bias": torch.ones(1)}
    torch.save(state | heads, tmp_path / "deeplabv3_resnet101_coco.pth")
    changed = fill(model, "deeplab", tmp_path / "deeplabv3_resnet101_coco.pth")
    assert changed == set(state)
    torch.save(state | heads | {"backbone.fc.weight": torch.ones(1)}, tmp_path / "x.pth")
    assert "backbone.fc.weight" in refused(model, "deeplab", tmp_path / "x.pth").why


# GloVe --------------------------------------------------------------------------------------------


def glove(path: Path, lines: dict[str, float] | list[tuple[str, float]], width: int = 4) -> Path:
    pairs = lines.items() if isinstance(lines, dict) else lines
    rows = (f"{w} {' '.join(f'{v + i:.4f}' for i in range(width))}\n" for w, v in pairs)
    path.write_bytes("".join(rows).encode())
    return path


def test_glove_for_a_vocabulary(tmp_path: Path) -> None:
    path = glove(
        tmp_path / "glove.txt",
        [("the", 0.5), ("Red", 9), ("red", 1), (". . .", 3), ("left", 2), ("red", 7), ("café", 4)],
    )
    found = read_glove(path, 6, 4, ["red", "zebra", "café", "red"])
    assert found.words == ("red", "zebra", "café")
    assert found.absent == ("zebra",)
    assert found.table[2].tolist() == [1, 2, 3, 4]  # the first one counts
    assert found.table[4].tolist() == [4, 5, 6, 7]
    assert not found.table[[0, 1, 3, 5]].any()


def test_the_first_words_of_glove(tmp_path: Path) -> None:
    lines = [(",", 1.0), ("the", 2), ("The", 3), (". .", 4), ("of", 5), ("the", 6), ("to", 7)]
    found = read_glove(glove(tmp_path / "glove.txt", lines), 5, 4, None)
    assert found.words == (",", "the", "of")
    assert found.table[:, 0].tolist() == [0, 0, 1, 2, 5]
    rubbish = b"\xff\xfe 1 2 3 4\nred 1 2 3 4\n"
    (tmp_path / "glove.txt").write_bytes(rubbish)
    with pytest.raises(CheckpointError) as caught:
        read_glove(tmp_path / "glove.txt", 5, 3, None)
    assert caught.value.code == "weights-layout"
    assert read_glove(tmp_path / "glove.txt", 5, 4, None).words == ("red",)


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b"400000 4\nred 1 2 3 4\n", "weights-layout", "line 1 has 1 numbers"),
        (b"red 1 2 3 4 5\n", "weights-layout", "line 1 has 5 numbers"),
        (b"the 1 2 3 4\nred 1 2 3\n", "weights-layout", "line 2 has 3 numbers"),
        (b"the 1 2 3 4\n\n", "weights-layout", "line 2"),
        (b"the 1 2 3 4\nred 1 2 3 x\n", "weights-damaged", "line 2"),
        (b"the 1 2 3 4\nred 1 2 3 nan\n", "weights-damaged", "line 2"),
        (b"the 1 2 3 4\nred 1 2 3 4", "weights-damaged", "cut short"),
        (b"the 1 2 3 4\n", "weights-vocabulary", "none of these words"),
        (b"", "weights-vocabulary", "none of these words"),
        (b"a" * 3_000_000, "weights-damaged", "cut short"),
    ],
)
def test_word_vectors_of_another_kind(content: bytes, code: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "glove.txt").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_glove(tmp_path / "glove.txt", 9, 4, WORDS)
    assert caught.value.code == code
    assert said in caught.value.why


def test_too_many_words(tmp_path: Path) -> None:
    path = glove(tmp_path / "glove.txt", {"red": 1})
    with pytest.raises(CheckpointError) as caught:
        read_glove(path, 4, 4, WORDS)
    assert caught.value.code == "weights-vocabulary"


@pytest.mark.parametrize("kind", [LTS, STEP, M3Att])
def test_glove_in_the_models(kind: type[Network], tmp_path: Path) -> None:
    from refedge.models.m3att_config import GruConfig

    config = {
        LTS: LTS_TINY,
        STEP: STEP_TINY,
        M3Att: replace(M3ATT_TINY, bert=None, gru=GruConfig(64, 48, 32)),
    }[kind]
    model = kind(config)
    path = glove(tmp_path / "glove.txt", {"red": 1, "left": 2, "of": 3}, width=48)
    filling = read_layout("glove", path, model, WORDS)
    assert filling.notes == {"words": 3, "absent": ["circle"]}
    assert filling.tokenizer is not None
    assert filling.tokenizer.encode("Red Circle").ids == [2, 3]
    (name,) = fill(model, "glove", path, WORDS)
    assert re.fullmatch(r"(embeddings?|text\.vectors)\.weight", name)
    assert model.state_dict()[name][4, 0] == 2


def test_layouts_that_do_not_exist(tmp_path: Path) -> None:
    error = refused(SLViT(TINY), "vgg", tmp_path)
    assert error.code == "convert-layout"
    assert "mscan" in error.why


def test_safetensors_of_any_layout(tmp_path: Path) -> None:
    state = shaped(mscan_shapes())
    save_file(state, tmp_path / "mscan.safetensors")
    assert fill(SLViT(TINY), "mscan", tmp_path / "mscan.safetensors")


def test_every_file_may_be_for_another_configuration() -> None:
    """What a darknet needs of M3Att depends on its configuration."""
    model = M3Att(replace(M3ATT_TINY, darknet=None, swin=LAVT_TINY.swin))
    assert isinstance(model.config, M3AttConfig)
    error = refused(model, "darknet", Path("x.weights"))
    assert error.code == "convert-part"
    assert TextConfig().layers == 12
