"""The CUDA kernels' source on this machine against the float64 definition."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from refedge.plugins import reference

from .emulated import (
    BARS,
    REFERENCES,
    TYPES,
    Call,
    Feeds,
    Plan,
    emulate,
    from_bits,
    library,
    make,
    to_bits,
    wanted,
)


def compare(operator: str, feeds: Feeds, dtype: str = "float32", **options: Any) -> None:
    for found, value in zip(
        emulate(operator, feeds, dtype, **options), wanted(operator, feeds, dtype), strict=True
    ):
        assert np.isfinite(found).all()
        # outputs are of order one or a tenth; less is left where terms cancel
        scale = max(np.linalg.norm(value), 0.1 * value.size**0.5)
        assert np.linalg.norm(found - value) <= BARS[dtype] * scale


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("operator", list(REFERENCES))
@pytest.mark.parametrize(
    "sizes",
    [(2, 100, 40, 20, 2, 24), (1, 64, 64, 17, 3, 64), (1, 3, 33, 1, 1, 33), (2, 65, 96, 32, 1, 72)],
)
def test_the_kernels_compute_the_definition(
    operator: str, sizes: tuple[int, ...], dtype: str
) -> None:
    compare(operator, make(operator, sizes), dtype)


@pytest.mark.parametrize("operator", list(REFERENCES))
def test_words_beyond_32_are_streamed(operator: str) -> None:
    compare(operator, make(operator, (1, 9, 36, 128, 1, 16)), "float16")
    compare(operator, make(operator, (1, 9, 36, 33, 1, 16)), "float32")


def test_moments_of_several_turns_meet() -> None:
    """More runs of strips than records of moments: a block has two, the last one less."""
    feeds = make("NormAttention", (1, 8 * 32 * 130 + 5, 8, 3, 1, 1))
    compare("NormAttention", feeds)


@pytest.mark.parametrize("operator", list(REFERENCES))
@pytest.mark.parametrize("dtype", TYPES)
def test_any_alignment(operator: str, dtype: str) -> None:
    feeds = make(operator, (2, 72, 40, 8, 2, 24))
    straight = emulate(operator, feeds, dtype)
    for found, value in zip(emulate(operator, feeds, dtype, shift=1), straight, strict=True):
        np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("operator", list(REFERENCES))
def test_the_order_of_threads_changes_nothing(operator: str) -> None:
    """A missing barrier would."""
    feeds = make(operator, (1, 70, 40, 35, 2, 24))
    straight = emulate(operator, feeds, "float16")
    for order in (1, 2):
        for found, value in zip(
            emulate(operator, feeds, "float16", order=order), straight, strict=True
        ):
            np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("operator", list(REFERENCES))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_padded_words_take_no_part(operator: str, dtype: str) -> None:
    feeds = make(operator, (2, 70, 40, 20, 2, 24))
    straight = emulate(operator, feeds, dtype)
    words = feeds[2] if operator == "MutualAttention" else feeds[3]
    axes = {"CrossAttention": {1: 3, 2: 2, 4: 2}, "NormAttention": {1: 1, 2: 2}}
    for which, t in axes.get(operator, {0: 2, 1: 2}).items():
        moved = np.moveaxis(feeds[which], t, 1)
        moved[~words] = np.inf if dtype == "float16" else 50.0
    for found, value in zip(emulate(operator, feeds, dtype), straight, strict=True):
        np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("operator", ["CrossAttention", "NormAttention", "MutualAttention"])
def test_words_may_be_whole_numbers(operator: str) -> None:
    """TensorRT 8.6 gives a plugin no booleans."""
    feeds = make(operator, (2, 70, 24, 37, 2, 8), seed=3)
    numbers = [v.astype(np.int32) if v.dtype == bool else v for v in feeds]
    assert sum(v.dtype == np.int32 for v in numbers) == 1
    for one, other in zip(emulate(operator, feeds), emulate(operator, numbers), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("operator", list(REFERENCES))
def test_without_any_word_all_count_alike(operator: str) -> None:
    feeds = make(operator, (2, 70, 40, 5, 2, 24))
    feeds[2 if operator == "MutualAttention" else 3][1] = False
    for found, value in zip(emulate(operator, feeds), wanted(operator, feeds, "float32"),
                            strict=True):  # fmt: skip
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e-5])
def test_a_flat_attention_keeps_its_differences(scale: float) -> None:
    """Weights that differ by a millionth still give the map; epsilon small enough to see it."""
    feeds = make("NormAttention", (1, 200, 40, 6, 1, 1), padded=False)
    feeds[0] *= scale
    value = reference.norm_attention(*feeds, epsilon=1e-14)[0]
    found = emulate("NormAttention", feeds, epsilon=1e-14)[0]
    # a weight near 1/6 has a float32 rounding of 1e-8, the differences are of size `scale` / 6
    assert np.linalg.norm(found - value) <= 1e-6 / scale * np.linalg.norm(value)


def test_half_precision_keeps_a_flat_attention() -> None:
    feeds = make("NormAttention", (1, 200, 40, 6, 1, 1), padded=False)
    feeds[0] *= 1e-3
    rounded = [v if v.dtype == bool else from_bits(to_bits(v, "float16")) for v in feeds]
    value = reference.norm_attention(*rounded)[0]
    found = emulate("NormAttention", feeds, "float16")[0]
    assert np.linalg.norm(found - value) <= 1.5e-3 * np.linalg.norm(value)


def test_one_pixel_that_stands_out() -> None:
    """|mean| far above the spread: all pixels attend alike but one."""
    feeds = make("NormAttention", (1, 130, 40, 6, 1, 1), padded=False)
    feeds[0][:] = feeds[0][:, :, :1] * 3.0
    feeds[0][:, :, 77] *= 1.01
    feeds[2] += 100.0
    value = reference.norm_attention(*feeds)[0]
    found = emulate("NormAttention", feeds)[0]
    # values of 100 carry a rounding of 4e-6 each, of differences of order one; the spread over
    # pixels is a thousandth of that again
    assert np.linalg.norm(found - value) <= 1e-3 * np.linalg.norm(value)


def test_no_variance_is_no_infinity_in_half_precision() -> None:
    """Columns over the root of a tiny epsilon leave half's range; there is nothing to multiply."""
    feeds = make("NormAttention", (1, 200, 64, 6, 1, 1), padded=False)
    feeds[0] *= 0.0
    feeds[2] *= 20.0
    found = emulate("NormAttention", feeds, "float16", epsilon=1e-12)[0]
    assert np.abs(found).max() < 1.0  # 10^6 x 60 x the rounding of a mean of weights


@pytest.mark.parametrize("operator", list(REFERENCES))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_large_scores_do_not_overflow(operator: str, dtype: str) -> None:
    feeds = make(operator, (1, 70, 40, 20, 2, 24))
    feeds[0] *= 50.0
    value, found = wanted(operator, feeds, dtype)[0], emulate(operator, feeds, dtype)[0]
    assert np.linalg.norm(found - value) <= 5 * BARS[dtype] * np.linalg.norm(value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("words", 129), ("words", 0), ("channels", 1025), ("width", 1025), ("pixels", 0),
     ("batch", 0), ("batch", 65536), ("pixels", 65535 * 64 + 1)],
)  # fmt: skip
def test_calls_outside_the_limits_are_refused(field: str, value: int) -> None:
    sizes = {"batch": 1, "pixels": 5, "channels": 8, "words": 3, "heads": 1, "width": 8}
    for operator in range(3):
        good, bad = Call(**sizes), Call(**{**sizes, field: value})
        assert library().refedge_workspace(operator, 0, ctypes.byref(good)) >= 0
        assert library().refedge_workspace(operator, 0, ctypes.byref(bad)) == -1


@pytest.mark.parametrize("words", [1, 32, 128])
@pytest.mark.parametrize("wide", [1, 1024])
def test_launches_fit_every_architecture(words: int, wide: int) -> None:
    """48 KB of shared memory are there without asking; grids stay within their limits."""
    sizes = {"batch": 65535, "pixels": 65535 * 64, "channels": wide, "width": wide}
    for operator in range(3):
        for dtype in range(3):
            call, plan = Call(**sizes, words=words, heads=1024), Plan()
            assert library().refedge_plan(operator, dtype, ctypes.byref(call), ctypes.byref(plan))
            for launch in plan.launch[: plan.launches]:
                assert 0 < launch.shared <= 48 * 1024
                assert max(launch.grid[1:]) <= 65535


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("pixels", "channels", "words"),
    [(300, 64, 20), (300, 128, 32), (100, 256, 5), (70, 320, 20), (68, 416, 9), (70, 96, 40)],
)
def test_strips_are_shared_among_warps(pixels: int, channels: int, words: int, dtype: str) -> None:
    """8, 4, 2 and 1 strips of a block, read and written; all of the gate on chip, or not."""
    compare("NormAttention", make("NormAttention", (2, pixels, channels, words, 1, 1)), dtype)


@pytest.mark.parametrize("words", [15, 17, 30, 31])
@pytest.mark.parametrize("heads", [4, 9])
def test_heads_of_any_number_of_words(words: int, heads: int) -> None:
    """Where rows of all heads are aligned, a head's words are read with some of the head before."""
    feeds = make("CrossAttention", (1, 40, 64, words, heads, 64))
    for dtype in ("float32", "float16"):
        compare("CrossAttention", feeds, dtype)


def test_random_calls_stay_within_their_arrays() -> None:
    """A read or write beyond an array, the workspace or shared memory ends the process."""
    library()  # skips without a compiler
    command = [sys.executable, "-m", "refedge.tests.plugins.guarded", "60", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]


@pytest.mark.parametrize("channels", [512, 1024])
def test_wide_maps(channels: int) -> None:
    compare("NormAttention", make("NormAttention", (1, 6, channels, 20, 1, 1)), "float16")
    compare("CrossAttention", make("CrossAttention", (1, 6, channels, 17, 8, channels)), "float16")
