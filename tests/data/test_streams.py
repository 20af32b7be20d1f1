from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from refedge.data.streams import Stream, key_of


def test_the_stream_is_splitmix64() -> None:
    # first outputs for state 0 from the reference implementation (Vigna, splitmix64.c)
    stream = Stream()
    stream._state = 0
    assert [stream.bits() for _ in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_names_make_streams() -> None:
    assert Stream("a", 1).bits() == Stream("a", 1).bits()
    assert Stream("a", 1).bits() != Stream("a", 2).bits()
    assert key_of("ab", "c") != key_of("a", "bc")


@given(st.text(max_size=5), st.integers(1, 1000))
def test_below_stays_below(name: str, limit: int) -> None:
    stream = Stream(name)
    assert all(0 <= stream.below(limit) < limit for _ in range(20))


def test_draws_are_even() -> None:
    stream = Stream("even")
    counts = np.bincount([stream.below(8) for _ in range(8000)], minlength=8)
    # 1000 each, standard deviation 30: six of them
    assert np.abs(counts - 1000).max() < 180


def test_shuffle_keeps_the_items_and_the_source() -> None:
    items = list(range(20))
    assert sorted(Stream("s").shuffled(items)) == items == list(range(20))


def test_fields_are_fixed_and_even() -> None:
    field = Stream("f").field(64, 64)
    assert field.dtype == np.uint8
    assert np.array_equal(field, Stream("f").field(64, 64))
    # mean of 4096 bytes: 127.5 with a standard error of 1.15
    assert abs(float(field.mean()) - 127.5) < 6
    assert field.ravel()[:4].tolist() == [151, 106, 66, 52]
