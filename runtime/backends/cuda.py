"""The CUDA driver, as much of it as running an engine takes.

pycuda does the context, the stream, device memory and page-locked memory; the context is the
device's primary one, which TensorRT's own CUDA runtime uses too. pycuda has no CUDA graphs, and it
cannot be imported where there is no driver, so graphs and what is said of the device go to libcuda
through ctypes, every return code checked. Nothing is loaded before it is asked for.

Everything of one ``Cuda`` runs in order on its one stream. Managed memory is never used: on boards
with integrated memory, what the host writes and reads is page-locked and mapped instead.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import BackendError
from ..engine import Target

_LIBRARY = "libcuda.so.1"
_OUT_OF_MEMORY = 2
_INTEGRATED, _MAJOR, _MINOR = 18, 75, 76  # CUdevice_attribute
_STEP = 2 << 20  # bytes
_THREAD_LOCAL = 1  # CUstreamCaptureMode: what other threads do is not captured
# while an ordinary stream is captured, no thread may use the legacy stream, and TensorRT's loading
# does (CUDA driver API, cuStreamIsCapturing); what is put on this kind is not bound to that one
_NON_BLOCKING = 1  # CUstream_flags
_LOCK = threading.RLock()
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [ctypes.c_char_p, c_int, c_int],
    "cuDeviceTotalMem_v2": [POINTER(c_size_t), c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuStreamBeginCapture_v2": [c_void_p, c_int],
    "cuStreamEndCapture": [c_void_p, POINTER(c_void_p)],
    "cuGraphInstantiateWithFlags": [POINTER(c_void_p), c_void_p, c_ulonglong],  # CUDA 11.4
    "cuGraphLaunch": [c_void_p, c_void_p],
    "cuGraphDestroy": [c_void_p],
    "cuGraphExecDestroy": [c_void_p],
}


@dataclass(frozen=True)
class Device:
    """The first CUDA device.

    sm:         compute capability times ten: 87 for 8.7.
    cuda:       the newest CUDA that the driver runs, ``12.6``.
    memory:     bytes.
    integrated: shares the host's memory, as on Jetson.
    """

    name: str
    sm: int
    cuda: str
    memory: int
    integrated: bool


@functools.cache
def device() -> Device:
    """Ask the driver; raises BackendError ``cuda-missing`` or ``cuda-failed``."""
    lib, number, value, size = library(), c_int(), c_int(), c_size_t()
    check(lib.cuDriverGetVersion(byref(value)), "tell the driver's version")
    cuda = f"{value.value // 1000}.{value.value % 1000 // 10}"
    check(lib.cuDeviceGet(byref(number), 0), "open the first device")
    name = ctypes.create_string_buffer(256)
    check(lib.cuDeviceGetName(name, len(name), number), "name the device")
    check(lib.cuDeviceTotalMem_v2(byref(size), number), "tell the device's memory")

    def attribute(which: int) -> int:
        check(lib.cuDeviceGetAttribute(byref(value), which, number), "describe the device")
        return value.value

    sm = 10 * attribute(_MAJOR) + attribute(_MINOR)
    return Device(name.value.decode(), sm, cuda, size.value, bool(attribute(_INTEGRATED)))


def target_for(tensorrt: str) -> Target:
    """What engines of a TensorRT of this version are bound to on this machine."""
    here, system, machine = device(), platform.system().lower(), platform.machine()
    return Target(tensorrt, here.sm, here.name, here.cuda, system, machine)


@functools.cache
def library() -> Any:
    """libcuda, initialised; BackendError ``cuda-missing`` where there is no driver or GPU."""
    try:
        lib = ctypes.CDLL(_LIBRARY)
        for name, arguments in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = arguments, c_int
    except (OSError, AttributeError) as error:
        raise BackendError(
            "cuda-missing",
            "there is no CUDA driver that can be used here",
            why=str(error),
            fix="install NVIDIA's driver (CUDA 11.4 or newer), or use backend='onnxruntime'",
        ) from error
    status = lib.cuInit(0)
    if status:
        raise BackendError(
            "cuda-missing",
            "the CUDA driver finds no GPU that it can use",
            why=_reason(lib, status),
            fix="see whether nvidia-smi lists a GPU; in a container, start it with --gpus all",
        )
    return lib


def check(status: int, doing: str) -> None:
    """Raise BackendError ``cuda-memory`` or ``cuda-failed`` unless the driver succeeded."""
    if status:
        raise failed(_reason(library(), status), doing, memory=status == _OUT_OF_MEMORY)


def failed(why: str, doing: str, *, memory: bool) -> BackendError:
    """The error for a call that the driver refused, with its own words."""
    if memory:
        return BackendError(
            "cuda-memory",
            f"there was not enough device memory to {doing}",
            why=why,
            fix="end other programs on the GPU, or build engines for smaller batches",
        )
    return BackendError(
        "cuda-failed",
        f"CUDA could not {doing}",
        why=why,
        fix="run it again; if it stays, run it under compute-sanitizer and report what that says",
    )


def _reason(lib: Any, status: int) -> str:
    name, text = c_char_p(), c_char_p()
    known = lib.cuGetErrorName(status, byref(name)) == 0
    known = lib.cuGetErrorString(status, byref(text)) == 0 and known
    if not known or name.value is None or text.value is None:
        return f"driver error {status}"
    return f"{name.value.decode()} ({status}): {text.value.decode()}"


class Block:
    """Device memory; goes back to its pool when nobody holds it any more."""

    def __init__(self, memory: Any, nbytes: int, pool: list[Any]) -> None:
        self.address, self.nbytes = int(memory), nbytes
        self._memory, self._pool = memory, pool

    def __del__(self) -> None:
        self._pool.append(self._memory)


class Pinned:
    """Page-locked host memory, as bytes, and where the device sees it: 0 if not mapped."""

    def __init__(self, memory: Any, nbytes: int, address: int, pool: list[Any]) -> None:
        self.array: npt.NDArray[np.uint8] = memory[:nbytes]
        self.address = address
        self._memory, self._pool = memory, pool

    def __del__(self) -> None:
        self._pool.append(self._memory)


class _Process:
    """The primary context and what of its memory is free; kept until the process ends.

    pycuda's objects may die only where their context is current, or in the thread that retained
    it. Ours die in any thread, so what they held goes to a pool, which ``current`` may empty.
    """

    def __init__(self) -> None:
        library()  # says more than pycuda's ImportError does
        try:
            import pycuda.driver
        except ImportError as error:
            raise BackendError(
                "backend-missing",
                "pycuda cannot be imported",
                why=str(error),
                fix="pip install 'pycuda>=2024.1'; an undefined symbol means that the driver "
                "is too old for this pycuda",
            ) from error
        self.driver = pycuda.driver
        try:
            self.driver.init()
            self.context = self.driver.Device(0).retain_primary_context()
        except self.driver.Error as error:
            memory = isinstance(error, self.driver.MemoryError)
            raise failed(str(error), "open the GPU", memory=memory) from error
        # never released: TensorRT's objects and graphs may be destroyed at the very end, when the
        # context has to be there. It ends with the process, and so does what the pools hold
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        self.pools: dict[tuple[str, int], list[Any]] = {}

    def free(self, kind: str, size: int, make: Callable[[], Any]) -> tuple[Any, list[Any]]:
        """What is free of a kind and size, or a new one; and the pool that it goes back to."""
        pool = self.pools.setdefault((kind, size), [])
        try:
            return pool.pop(), pool
        except IndexError:  # none is free, or another thread was first
            pass
        try:
            return make(), pool
        except self.driver.MemoryError:
            self.trim()
            return make(), pool

    def trim(self) -> None:
        """Give the driver back what is free; the context must be current."""
        for pool in list(self.pools.values()):  # other threads may add some
            pool.clear()


@functools.cache
def _process() -> _Process:
    return _Process()


def trim() -> None:
    """Give the driver back what this process holds and does not use, for whoever else needs it."""
    if _process.cache_info().currsize:
        process = _process()
        process.context.push()
        try:
            process.trim()
        finally:
            process.driver.Context.pop()


class Cuda:
    """A stream and its memory; one per backend. Enter ``current`` around everything."""

    def __init__(self) -> None:
        with _LOCK:
            self.device = device()
            self._process = _process()
        self._driver = self._process.driver
        make = functools.partial(self._driver.Stream, _NON_BLOCKING)
        with self.current("make a stream"):
            self._stream, self._streams = self._process.free("stream", 0, make)

    def __del__(self) -> None:
        if hasattr(self, "_streams"):
            self._streams.append(self._stream)

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream.handle)

    @contextmanager
    def current(self, doing: str) -> Iterator[None]:
        """Make the context this thread's; the driver's errors become BackendError."""
        self._process.context.push()
        try:
            yield
        except self._driver.Error as error:
            memory = isinstance(error, self._driver.MemoryError)
            raise failed(str(error), doing, memory=memory) from error
        finally:
            self._driver.Context.pop()

    def take(self, nbytes: int) -> Block:
        """Device memory of at least so many bytes."""
        size = _rounded(nbytes)
        make = functools.partial(self._driver.mem_alloc, size)
        memory, pool = self._process.free("device", size, make)
        return Block(memory, nbytes, pool)

    def pinned(self, nbytes: int, *, mapped: bool = False) -> Pinned:
        """Page-locked host memory; ``mapped`` gives it an address on the device."""
        flags = self._driver.host_alloc_flags.DEVICEMAP if mapped else 0
        size = _rounded(nbytes)
        make = functools.partial(self._driver.pagelocked_empty, size, np.uint8, mem_flags=flags)
        memory, pool = self._process.free("mapped" if mapped else "pinned", size, make)
        address = int(memory.base.get_device_pointer()) if mapped else 0
        return Pinned(memory, nbytes, address, pool)

    def upload(self, address: int, host: npt.NDArray[np.uint8]) -> None:
        """Host to device, in the stream's order."""
        self._driver.memcpy_htod_async(address, host, self._stream)

    def download(self, host: npt.NDArray[np.uint8], address: int) -> None:
        """Device to host, in the stream's order."""
        self._driver.memcpy_dtoh_async(host, address, self._stream)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Device to device, in the stream's order."""
        self._driver.memcpy_dtod_async(to, source, nbytes, self._stream)

    def wait(self) -> None:
        """Until all that was asked for is done."""
        self._stream.synchronize()


def _rounded(nbytes: int) -> int:
    """A power of two, or from 2 MiB on a multiple of it, so that pools have few sizes."""
    return (
        max(256, 1 << (nbytes - 1).bit_length()) if nbytes < _STEP else -(-nbytes // _STEP) * _STEP
    )


class Graph:
    """What a call puts on a stream, captured once and launched as a whole.

    The call is not executed by the capture. Addresses and shapes are those of the capture.
    """

    def __init__(self, stream: int, enqueue: Callable[[], None]) -> None:
        self._lib, self._stream, self._exec = library(), stream, c_void_p()
        graph = c_void_p()
        check(self._lib.cuStreamBeginCapture_v2(stream, _THREAD_LOCAL), "begin a graph")
        try:
            enqueue()
        finally:  # whatever happened, the stream has to leave its capture
            status = self._lib.cuStreamEndCapture(stream, byref(graph))
        check(status, "capture a graph")
        try:
            made = self._lib.cuGraphInstantiateWithFlags(byref(self._exec), graph, 0)
            check(made, "instantiate a graph")
        finally:
            self._lib.cuGraphDestroy(graph)

    def launch(self) -> None:
        """Once more."""
        check(self._lib.cuGraphLaunch(self._exec, self._stream), "launch a graph")

    def __del__(self) -> None:
        if getattr(self, "_exec", None):
            self._lib.cuGraphExecDestroy(self._exec)
