from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from refedge.runtime.cache import ArrayCache


def arrays(size: int) -> dict[str, np.ndarray]:
    return {"a": np.zeros(size, np.uint8)}


def test_the_oldest_goes_first() -> None:
    cache = ArrayCache(30)
    for key in (b"1", b"2", b"3"):
        cache.put(key, arrays(10))
    assert cache.get(b"1") is not None  # now the newest
    cache.put(b"4", arrays(10))
    assert cache.get(b"2") is None
    assert cache.get(b"1") is not None
    assert cache.bytes == 30


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = ArrayCache(5)
    cache.put(b"k", arrays(6))
    assert len(cache) == 0


def test_replacing_does_not_count_twice() -> None:
    cache = ArrayCache(30)
    cache.put(b"k", arrays(10))
    cache.put(b"k", arrays(20))
    assert (len(cache), cache.bytes) == (1, 20)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 40)), max_size=60))
def test_never_more_than_the_limit(puts: list[tuple[int, int]]) -> None:
    cache = ArrayCache(64)
    for key, size in puts:
        cache.put(bytes([key]), arrays(size))
        assert cache.bytes <= 64
        assert cache.bytes == sum(
            a.nbytes for k in range(9) for a in (cache.get(bytes([k])) or {}).values()
        )
