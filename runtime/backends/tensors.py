"""Tensors on the device: those that travel between parts, and the places where a part has its own.

A ``DeviceArray`` is what one part gave and another takes. NumPy sees an array: asked for values, it
copies them to the host, and ``np.concatenate`` along the batch joins without moving anything. So
the segmenter and its cache handle the results of every backend alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import EngineError
from ..manifest import TensorSpec
from .cuda import Block, Cuda, Pinned


class DeviceArray:
    """A tensor on the device, in pieces along its first axis.

    pieces: block, offset and size in bytes of each; the blocks live as long as this does.
    """

    def __init__(
        self,
        cuda: Cuda,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        pieces: tuple[tuple[Block, int, int], ...],
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._cuda, self._pieces = cuda, pieces

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(size for _, _, size in self._pieces)

    def copy_to(self, cuda: Cuda, address: int) -> None:
        """Put the pieces one after another to a place on the device, in the order of its stream.

        They are written by now: a part waits for its stream before it hands anything out.
        """
        for block, offset, size in self._pieces:
            cuda.copy(address, block.address + offset, size)
            address += size

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("what lies on the device cannot be seen without a copy")
        host, done = np.empty(self.nbytes, np.uint8), 0
        with self._cuda.current("read an array"):
            for block, offset, size in self._pieces:
                self._cuda.download(host[done : done + size], block.address + offset)
                done += size
            self._cuda.wait()
        array = host.view(self.dtype).reshape(self.shape)
        return array if dtype is None else array.astype(dtype, copy=False)

    def __array_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if function is np.concatenate and not kwargs and len(args) == 1:
            arrays = tuple(args[0])
            if all(isinstance(a, DeviceArray) and a._cuda is self._cuda for a in arrays):
                return _join(arrays)
        return function(*_on_host(args), **_on_host(kwargs))


def _join(arrays: tuple[DeviceArray, ...]) -> DeviceArray:
    first = arrays[0]
    if any(a.dtype != first.dtype or a.shape[1:] != first.shape[1:] for a in arrays):
        raise ValueError(f"arrays of {[(a.shape, a.dtype.name) for a in arrays]} cannot be joined")
    shape = (sum(a.shape[0] for a in arrays), *first.shape[1:])
    pieces = tuple(piece for a in arrays for piece in a._pieces)
    return DeviceArray(first._cuda, shape, first.dtype, pieces)


def _on_host(value: Any) -> Any:
    if isinstance(value, DeviceArray):
        return np.asarray(value)
    if isinstance(value, dict):
        return {key: _on_host(v) for key, v in value.items()}
    return type(value)(_on_host(v) for v in value) if isinstance(value, (list, tuple)) else value


class Place:
    """Where a tensor of a part lies: device memory for the largest sizes, and its host side.

    sizes: the largest of each dynamic dimension, by its symbol.
    On a board with integrated memory what the host writes or reads is one and the same memory.
    """

    def __init__(self, cuda: Cuda, spec: TensorSpec, sizes: Mapping[str, int], host: bool) -> None:
        self.name, self.dtype = spec.name, np.dtype(spec.dtype)
        self._cuda, self._spec, self._sizes = cuda, spec, sizes
        size = self.nbytes(tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape))
        self._size, self._mapped = size, host and cuda.device.integrated
        self._block = None if self._mapped else cuda.take(size)

    @cached_property
    def _pinned(self) -> Pinned:
        return self._cuda.pinned(self._size, mapped=self._mapped)

    @property
    def address(self) -> int:
        """On the device; never changes."""
        block = self._pinned if self._block is None else self._block
        return block.address

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of that shape."""
        return int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize

    def write(self, value: Any, part: str) -> tuple[int, ...]:
        """Put an input there, in the stream's order; its shape. EngineError ``engine-shape``."""
        shape = tuple(int(d) for d in value.shape)
        pairs = zip(shape, self._spec.shape, strict=False)
        fits = len(shape) == len(self._spec.shape) and all(
            1 <= d <= self._sizes[s] if isinstance(s, str) else d == s for d, s in pairs
        )
        if not fits or value.dtype != self.dtype:
            raise EngineError(
                "engine-shape",
                f"{self.name} of the part {part!r} was given as {value.dtype} {list(shape)}",
                why=f"the engine takes {self.dtype} {list(self._spec.shape)}, "
                + ", ".join(f"{d} of 1 to {n}" for d, n in self._sizes.items()),
                fix="give fewer at once, or build the engines for larger batches",
            )
        if isinstance(value, DeviceArray):
            value.copy_to(self._cuda, self.address)
        else:
            host = self._pinned.array[: value.nbytes]
            host[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            if not self._mapped:
                self._cuda.upload(self.address, host)
        return shape

    def fetch(self, shape: tuple[int, ...]) -> None:
        """Ask for an output of that shape, in the stream's order."""
        if not self._mapped:
            self._cuda.download(self._pinned.array[: self.nbytes(shape)], self.address)

    def read(self, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
        """A copy of what was fetched, once the stream has come that far."""
        host = self._pinned.array[: self.nbytes(shape)].copy()
        return host.view(self.dtype).reshape(shape)
