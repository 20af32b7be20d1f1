from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refedge.data.refshapes.dataset import DIGESTS, RefShapes, digest
from refedge.data.refshapes.expressions import FAMILIES, Expression, words
from refedge.data.refshapes.render import PALETTE, render
from refedge.data.refshapes.scene import (
    COLOURS,
    DIFFICULTIES,
    SPLITS,
    Composition,
    Scene,
    split_of,
)
from refedge.errors import DataError

from .refshapes_checker import UnreadableError, problems, referents


@pytest.mark.parametrize("difficulty", ["lite", "full"])
def test_the_test_split_is_pinned_and_every_expression_proven(difficulty: str) -> None:
    samples = list(RefShapes("test", difficulty=difficulty))
    assert len(samples) == 1000
    assert Counter(len(s.expressions) for s in samples) == {5: 1000}
    assert [p for s in samples for p in problems(s)] == []
    assert digest(samples) == DIGESTS[difficulty]


@pytest.mark.parametrize("difficulty", ["lite", "full"])
@pytest.mark.parametrize("split", ["train", "calibration", "val"])
def test_other_splits_are_proven_too(split: str, difficulty: str) -> None:
    families = (*FAMILIES, "attribute", "extreme", "relation")
    samples = RefShapes(split, difficulty=difficulty, scenes=60, families=families)
    assert [p for s in samples for p in problems(s)] == []


def test_the_checker_notices_a_wrong_target() -> None:
    caught = 0
    samples = RefShapes("val", scenes=40)
    for sample in samples:
        wrong = tuple(
            Expression(e.text, e.family, (e.target + 1) % len(sample.scene.things))
            for e in sample.expressions
        )
        caught += len(problems(replace(sample, expressions=wrong)))
    assert caught == 40 * 5


def test_the_checker_refuses_what_it_cannot_read() -> None:
    with pytest.raises(UnreadableError):
        referents(RefShapes("val")[0], "some red thing or other")


def composition_of(scene: Scene) -> Composition:
    return tuple((t.shape, t.colour, t.pattern, t.size) for t in scene.things)


def test_splits_share_no_composition() -> None:
    seen = {
        split: {tuple(sorted(composition_of(s.scene))) for s in RefShapes(split, scenes=150)}
        for split in SPLITS
    }
    for split, compositions in seen.items():
        assert {split_of(c) for c in compositions} == {split}
        assert all(not compositions & others for name, others in seen.items() if name != split)


def test_a_sample_depends_on_its_index_alone() -> None:
    whole = RefShapes("val", scenes=10)
    assert digest([whole[7]]) == digest([RefShapes("val", scenes=8)[7]])
    assert whole[-1].id == whole[9].id
    with pytest.raises(IndexError):
        whole[10]


def test_size_changes_pixels_not_meaning() -> None:
    small, large = RefShapes("val", size=96)[3], RefShapes("val", size=200)[3]
    assert small.expressions == large.expressions
    assert large.image.shape == (200, 200, 3)
    assert problems(large) == []
    for e in small.expressions:
        share = small.mask(e).mean(), large.mask(e).mean()
        assert share[0] == pytest.approx(share[1], abs=0.01)


def test_masks_are_what_is_seen() -> None:
    for sample in RefShapes("val", scenes=20):
        for e in sample.expressions:
            mask = sample.mask(e)
            assert mask.any() == (e.target >= 0)
            assert np.array_equal(mask, sample.things == e.target + 1) or e.target < 0


def test_a_colour_word_is_the_colour_of_the_pixels() -> None:
    """The nearest palette colour of a plain thing's brightest pixels is the one it is called."""
    right = total = 0
    for sample in RefShapes("val", size=192, scenes=60):
        for i, thing in enumerate(sample.scene.things):
            if thing.pattern != "plain":
                continue
            pixels = sample.image[sample.things == i + 1].astype(float)
            colour = np.median(pixels, axis=0)
            near = min(
                PALETTE,
                key=lambda c: np.abs(
                    colour / colour.max() - np.array(PALETTE[c]) / max(PALETTE[c])
                ).sum(),
            )
            total += 1
            right += near == thing.colour
    assert total > 50
    assert right / total > 0.97  # lighting may shift a few


def test_lite_uses_its_own_words_only() -> None:
    beyond = set(COLOURS[DIFFICULTIES["lite"].colours :]) | {"checkered", "star", "second"}
    said = {
        w for s in RefShapes("train", scenes=100) for e in s.expressions for w in e.text.split()
    }
    assert not said & beyond
    assert said <= set(words())


def test_full_words_are_in_the_vocabulary() -> None:
    samples = RefShapes("train", difficulty="full", scenes=100)
    said = {w for s in samples for e in s.expressions for w in e.text.split()}
    assert said <= set(words())
    assert "second" in said


def test_noise_light_and_texture_are_there() -> None:
    scenes = [s.scene for s in RefShapes("train", scenes=60)]
    assert {s.background for s in scenes} == {"flat", "ramp", "cloud", "weave"}
    assert {s.light.blur for s in scenes} == {True, False}
    assert len({s.light.noise for s in scenes}) > 8
    plain = replace(scenes[0], light=replace(scenes[0].light, noise=0))
    noisy = replace(scenes[0], light=replace(scenes[0].light, noise=12))
    assert not np.array_equal(render(plain, 64).image, render(noisy, 64).image)


@given(st.integers(0, 999_999), st.integers(32, 130))
@settings(max_examples=20, deadline=None)
def test_any_training_scene_renders(index: int, size: int) -> None:
    sample = RefShapes("train", size=size, families=("attribute",))[index]
    assert sample.image.shape == (size, size, 3)
    assert sample.things.max() <= len(sample.scene.things)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"split": "dev"}, "data-split"),
        ({"difficulty": "hard"}, "data-difficulty"),
        ({"families": ("riddle",)}, "data-family"),
        ({"size": 8}, "data-size"),
        ({"scenes": 0}, "data-empty"),
        ({"split": "test", "scenes": 1001}, "data-range"),
    ],
)
def test_what_does_not_exist_is_refused(arguments: dict[str, object], code: str) -> None:
    with pytest.raises(DataError) as caught:
        RefShapes(**arguments)  # type: ignore[arg-type]
    assert caught.value.code == code
