from __future__ import annotations

import re

import pytest
import torch
from refedge.models.swin import Swin, SwinConfig, Windows
from torch import Tensor, nn
from transformers import SwinConfig as PublicConfig
from transformers import SwinModel

SMALL = SwinConfig(
    width=8, depths=(2, 3, 2, 1), heads=(1, 2, 4, 4), window=5, ratio=3, drop_path=0.0
)


def public(config: SwinConfig, size: int) -> SwinModel:
    """transformers' Swin of the same sizes, with random weights."""
    torch.manual_seed(0)
    made = SwinModel(
        PublicConfig(
            image_size=size,
            embed_dim=config.width,
            depths=list(config.depths),
            num_heads=list(config.heads),
            window_size=config.window,
            mlp_ratio=config.ratio,
            drop_path_rate=0.0,
        ),
        add_pooling_layer=False,
    ).eval()
    for parameter in made.parameters():
        # large enough that attention is far from uniform
        nn.init.normal_(parameter, std=0.3)
    return made


def renamed(state: dict[str, Tensor], config: SwinConfig) -> dict[str, Tensor]:
    """transformers' weights under the names of the public checkpoints."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("encoder.")
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("embeddings.norm", "patch_embed.norm")
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        name = re.sub(r"attention\.(self\.)?relative_position_bias\.", "attn.", name)
        name = name.replace("attention.o_proj", "attn.proj")
        found[name] = value
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            for end in ("weight", "bias"):
                stem = f"layers.{i}.blocks.{j}"
                rows = [found.pop(f"{stem}.attention.{n}_proj.{end}") for n in "qkv"]
                found[f"{stem}.attn.qkv.{end}"] = torch.cat(rows)
    found["norm3.weight"] = found.pop("layernorm.weight")
    found["norm3.bias"] = found.pop("layernorm.bias")
    return found


@pytest.mark.parametrize("size", [160, 224])
def test_swin_is_transformers_swin(size: int) -> None:
    """160: grids of 40, 20, 10, 5 without padding, the last one window. 224: 56, 28, 14, 7 padded
    to 60, 30, 15, 10. Both with shifted blocks."""
    theirs = public(SMALL, size)
    ours = Swin(SMALL, size).eval()
    left, unknown = ours.load_state_dict(renamed(theirs.state_dict(), SMALL), strict=False)
    assert unknown == []
    assert sorted(left) == [f"norm{i}.{end}" for i in range(3) for end in ("bias", "weight")]
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = theirs(x, output_hidden_states=True)
        tokens = ours.embed(x)
        for i in range(3):
            tokens = ours.downsample(i, ours.stage(i, tokens))
            wanted = expected.reshaped_hidden_states[i + 1]
            torch.testing.assert_close(ours.to_map(i + 1, tokens), wanted, atol=1e-4, rtol=1e-4)
        last = ours(x)[3].flatten(2).transpose(1, 2)
    assert float(last.std()) > 0.1
    torch.testing.assert_close(last, expected.last_hidden_state, atol=1e-4, rtol=1e-4)


def test_maps_have_the_sides_and_widths_of_their_stages() -> None:
    model = Swin(SMALL, 96).eval()
    with torch.no_grad():
        maps = model(torch.randn(2, 3, 96, 96))
    expected = [(2, 8, 24, 24), (2, 16, 12, 12), (2, 32, 6, 6), (2, 64, 3, 3)]
    assert [tuple(m.shape) for m in maps] == expected
    # fresh output norms: every pixel has mean 0
    assert all(float(m.mean(1).abs().max()) < 1e-4 for m in maps)


def test_swin_b_has_the_published_number_of_weights() -> None:
    """86.9 M without a head; three output norms more than the classifier has."""
    with torch.device("meta"):
        model = Swin(SwinConfig(), 480)
    assert model.grids == (120, 60, 30, 15)
    assert sum(p.numel() for p in model.parameters()) == 86_878_584 + 2 * (128 + 256 + 512)
    names = set(model.state_dict())
    assert "layers.2.blocks.17.attn.relative_position_bias_table" in names
    assert model.state_dict()["layers.0.downsample.reduction.weight"].shape == (256, 512)
    assert not any("windows" in name for name in names)


@pytest.mark.parametrize(("grid", "window", "shift"), [(24, 6, 3), (7, 4, 2), (3, 6, 3), (6, 6, 3)])
def test_every_token_has_one_place(grid: int, window: int, shift: int) -> None:
    windows = Windows(grid, window, shift)
    take = windows.take.long()
    assert torch.equal(take[windows.back.long()], torch.arange(grid**2))
    assert int((take < grid**2).sum()) == grid**2
    assert (windows.same is None) == (grid <= window)
    assert windows.padding == bool(grid % min(window, grid))


def test_a_shifted_window_holds_only_neighbours() -> None:
    """Two places that may attend to each other are less than a window apart in the picture."""
    grid, window = 10, 4
    windows = Windows(grid, window, 2)
    take = windows.take.view(windows.count, windows.length).long()
    real = take < grid**2
    rows, columns = take // grid, take % grid
    may = windows.same[:, 0] & real[:, :, None] & real[:, None, :]
    for line in (rows, columns):
        apart = (line[:, :, None] - line[:, None, :]).abs()
        assert int(apart[may].max()) < window


def test_what_a_window_cannot_see_does_not_matter() -> None:
    """One block per stage, none shifted: a pixel changes its own window of stage 0 only."""
    model = Swin(SMALL, 160).eval()
    x = torch.randn(1, 3, 160, 160)
    changed = x.clone()
    changed[:, :, 2, 2] += 5
    with torch.no_grad():
        block, windows = model.layers[0].blocks[0], model.layers[0].windows
        difference = block(model.embed(x), windows[0]) - block(model.embed(changed), windows[0])
    touched = model.to_map(0, difference.abs().amax(2, keepdim=True))[0, 0] > 0
    assert touched[:5, :5].all()
    assert int(touched.sum()) == 25


def test_stochastic_depth_keeps_the_mean() -> None:
    torch.manual_seed(0)
    config = SwinConfig(8, (1, 1, 1, 1), (1, 1, 1, 1), 3, 2, drop_path=0.5)
    block = Swin(config, 32).train().layers[3].blocks[0]
    thinned = block._thin(torch.ones(4000, 2, 3))
    assert set(thinned.unique().tolist()) == {0.0, 2.0}
    assert float(thinned.mean()) == pytest.approx(1.0, abs=0.1)  # 6 sigma
    assert torch.equal(block.eval()._thin(torch.ones(4, 2, 3)), torch.ones(4, 2, 3))


@pytest.mark.parametrize(
    "wrong", [{"heads": (3, 6, 12, 24)}, {"window": 0}, {"depths": (2, 0, 1, 1)}]
)
def test_impossible_configurations(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        SwinConfig(**wrong)  # type: ignore[arg-type]


def test_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="100"):
        Swin(SMALL, 100)
