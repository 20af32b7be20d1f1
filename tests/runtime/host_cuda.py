"""The buffer layer on the host's own memory: what moves where can be seen without a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from refedge.runtime.backends.cuda import Block, Device, Pinned


class HostCuda:
    """As ``runtime.backends.cuda.Cuda``; ``moved`` counts bytes by direction."""

    stream = 7

    def __init__(self, *, integrated: bool = False) -> None:
        self.device = Device("Host", 0, "0.0", 1 << 30, integrated)
        self.moved = {"up": 0, "down": 0, "copy": 0}
        self.pool: list[Any] = []
        self.memory: dict[int, Any] = {}

    @contextmanager
    def current(self, doing: str) -> Iterator[None]:
        yield

    def take(self, nbytes: int) -> Block:
        if self.pool:
            return Block(self.pool.pop(), nbytes, self.pool)
        raw = (ctypes.c_uint8 * 65536)()
        self.memory[ctypes.addressof(raw)] = raw
        return Block(ctypes.addressof(raw), nbytes, self.pool)

    def pinned(self, nbytes: int, *, mapped: bool = False) -> Pinned:
        array = np.zeros(nbytes, np.uint8)
        return Pinned(array, nbytes, array.ctypes.data if mapped else 0, [])

    def upload(self, address: int, host: np.ndarray) -> None:
        self.moved["up"] += host.nbytes
        ctypes.memmove(address, host.ctypes.data, host.nbytes)

    def download(self, host: np.ndarray, address: int) -> None:
        self.moved["down"] += host.nbytes
        ctypes.memmove(host.ctypes.data, address, host.nbytes)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        self.moved["copy"] += nbytes
        ctypes.memmove(to, source, nbytes)

    def wait(self) -> None:
        pass

    def array(self, values: np.ndarray) -> Any:
        """A DeviceArray of these values."""
        from refedge.runtime.backends.tensors import DeviceArray

        block = self.take(values.nbytes)
        ctypes.memmove(block.address, np.ascontiguousarray(values).ctypes.data, values.nbytes)
        return DeviceArray(self, values.shape, values.dtype, ((block, 0, values.nbytes),))  # type: ignore[arg-type]
