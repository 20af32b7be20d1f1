"""CLIP's towers against transformers' own forward, OpenAI's residual network against torch."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from refedge.models.clip import (
    MEAN,
    MEAN_COLOUR,
    ClipText,
    ClipVision,
    embed_words,
    encode_patches,
    encode_words,
    last_word,
    resize_positions,
    text_tower,
    vision_tower,
)
from refedge.models.clip_resnet import AttentionPool, Bottleneck, ClipResNet, ModifiedResNet
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

TEXT = ClipText(vocabulary=40, width=32, layers=2, heads=4, positions=12)
VISION = ClipVision(patch=8, width=48, layers=2, heads=4)
EOS = 39


@cache
def reference(size: int = 32) -> CLIPModel:
    """A small CLIPModel with weights that matter."""
    torch.manual_seed(0)
    towers = text_tower(TEXT), vision_tower(VISION, size)
    text, vision = (t.config.to_dict() for t in towers)
    text["eos_token_id"] = EOS
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model


def expressions() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, EOS, (3, 10), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([10, 6, 2])[:, None]
    numbers = torch.arange(10)[None]
    ids = torch.where(numbers == lengths - 1, EOS, ids) * (numbers < lengths)
    return ids.to(torch.int32), numbers < lengths


@torch.no_grad()
def test_the_text_tower_is_transformers() -> None:
    model = reference()
    tower = text_tower(TEXT).eval()
    tower.load_state_dict(model.text_model.state_dict())
    ids, words = expressions()
    features = encode_words(tower, embed_words(tower, ids), words)
    expected = model.text_model(ids, attention_mask=words)
    torch.testing.assert_close(features[words], expected.last_hidden_state[words])
    state = F.linear(last_word(words, features), model.text_projection.weight)
    torch.testing.assert_close(state, model.get_text_features(ids, words).pooler_output)


@torch.no_grad()
def test_a_word_knows_those_before_it_only() -> None:
    tower = text_tower(TEXT).eval()
    ids, words = expressions()
    other = ids.clone()
    other[:, 4] = 7
    a, b = (encode_words(tower, embed_words(tower, i), words) for i in (ids, other))
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.allclose(a[0, 4:], b[0, 4:])


@torch.no_grad()
def test_the_visual_transformer_is_transformers() -> None:
    model = reference()
    tower = vision_tower(VISION, 32).eval()
    tower.load_state_dict(model.vision_model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    states = model.vision_model(x).last_hidden_state
    expected = model.vision_model.post_layernorm(states[:, 1:])
    torch.testing.assert_close(encode_patches(tower, x), expected)


@torch.no_grad()
def test_positions_are_resized_as_transformers_does() -> None:
    model = reference()
    state = dict(model.vision_model.state_dict())
    key = "embeddings.position_embedding.weight"
    state[key] = resize_positions(state[key], 6)
    tower = vision_tower(VISION, 48).eval()
    tower.load_state_dict(state)
    x = torch.randn(1, 3, 48, 48)
    states = model.vision_model(x, interpolate_pos_encoding=True).last_hidden_state
    expected = model.vision_model.post_layernorm(states[:, 1:])
    torch.testing.assert_close(encode_patches(tower, x), expected)
    assert resize_positions(state[key], 6) is state[key]


def test_the_last_word_is_exact() -> None:
    _, words = expressions()
    features = torch.randn(3, 10, 8)
    expected = features[torch.arange(3), words.sum(1) - 1]
    assert torch.equal(last_word(words, features), expected)


def test_parameter_counts_are_openais() -> None:
    """ViT-B/16 has 149.62 M parameters, one of them the scale of the logits, which has no use here;
    RN101's visual tower 56.26 M (Radford et al., 2021, and the published archives)."""
    with torch.device("meta"):
        text, vision = text_tower(ClipText()), vision_tower(ClipVision(), 224)
        resnet = ModifiedResNet(ClipResNet(), 224, 512)
    projections = 512 * 512 + 768 * 512
    total = sum(p.numel() for tower in (text, vision) for p in tower.parameters())
    assert total + projections == 149_620_737 - 1
    shared = {n: p.numel() for n, p in resnet.named_parameters() if "connect" not in n}
    assert sum(shared.values()) == pytest.approx(56.26e6, rel=1e-4)


def test_names_are_those_of_openais_archive() -> None:
    with torch.device("meta"):
        state = ModifiedResNet(ClipResNet(), 224, 512).state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    assert shapes["conv1.weight"] == (32, 3, 3, 3)
    assert shapes["bn3.running_var"] == (64,)
    assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["layer3.22.conv2.weight"] == (256, 256, 3, 3)
    assert shapes["layer4.0.downsample.1.bias"] == (2048,)
    assert shapes["attnpool.positional_embedding"] == (50, 2048)
    assert shapes["attnpool.c_proj.weight"] == (512, 2048)
    assert ClipResNet().heads == 32


@torch.no_grad()
def test_the_attention_pool_is_torchs_attention_at_every_place() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(3, 32, 4, 20).eval()
    x = torch.randn(2, 32, 3, 3)
    tokens = x.flatten(2).permute(2, 0, 1) + pool.positional_embedding[1:, None]
    attended, _ = F.multi_head_attention_forward(
        tokens, tokens, tokens, 32, 4, None,
        torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False, 0.0,
        pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=False,
        use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
    )  # fmt: skip
    expected = F.relu(attended.permute(1, 2, 0).reshape(2, 20, 3, 3) + pool.connect(x))
    torch.testing.assert_close(pool(x), expected)


@torch.no_grad()
def test_strides_are_average_pools() -> None:
    """The shortcut does not see the order of pixels that are pooled."""
    torch.manual_seed(0)
    block = Bottleneck(8, 4, 2).eval()
    nn.init.zeros_(block.conv3.weight)
    x = torch.randn(1, 8, 6, 6)
    swapped = x.unflatten(3, (3, 2)).flip(4).flatten(3)
    assert block(x).shape == (1, 16, 3, 3)
    torch.testing.assert_close(block(x), block(swapped))
    assert not torch.allclose(block(x), block(x.roll(1, 3)))


def test_the_residual_network_gives_three_strides() -> None:
    model = ModifiedResNet(ClipResNet((1, 1, 2, 1), 8), 64, 12).eval()
    with torch.no_grad():
        maps = model(torch.randn(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 64, 8, 8), (2, 128, 4, 4), (2, 12, 2, 2)]


def test_a_conv_stem_gives_as_many_patches() -> None:
    config = ClipVision(patch=8, width=48, layers=1, heads=4, stem="conv")
    tower = vision_tower(config, 32)
    assert encode_patches(tower, torch.randn(2, 3, 32, 32)).shape == (2, 16, 48)
    convs = [m for m in tower.embeddings.patch_embedding if isinstance(m, nn.Conv2d)]
    assert [c.stride for c in convs] == [(2, 2)] * 3


def test_the_mean_colour_is_the_mean() -> None:
    assert tuple(round(255 * m) for m in MEAN) == MEAN_COLOUR


@pytest.mark.parametrize("wrong", [{"stem": "pool"}, {"patch": 12}])
def test_impossible_towers(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not known"):
        ClipVision(**wrong)  # type: ignore[arg-type]
