"""The target that engines are built for here: this machine's TensorRT, GPU and driver."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from typing import Any

from ..errors import BackendError
from ..runtime.engine import Target

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: compute capability
_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """The first GPU: its name, compute capability times ten, the driver's CUDA, bytes of memory."""

    name: str
    sm: int
    cuda: str
    memory: int


def this_gpu(library: str = "libcuda.so.1") -> Gpu:
    """Ask the driver, without creating a context; raises BackendError ``cuda-missing``."""
    try:
        driver: Any = ctypes.CDLL(library)
    except OSError as error:
        raise _no_gpu(str(error)) from error
    value, memory, device = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_int()
    name = ctypes.create_string_buffer(_BYTES)

    def ask(function: str, *arguments: Any) -> int:
        status: int = getattr(driver, function)(*arguments)
        if status:
            raise _no_gpu(f"{function} failed with CUDA error {status}")
        return value.value

    ask("cuInit", 0)
    cuda = ask("cuDriverGetVersion", ctypes.byref(value))
    ask("cuDeviceGet", ctypes.byref(device), 0)
    ask("cuDeviceGetName", name, _BYTES, device)
    ask("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    sm = 10 * ask("cuDeviceGetAttribute", ctypes.byref(value), _MAJOR, device)
    sm += ask("cuDeviceGetAttribute", ctypes.byref(value), _MINOR, device)
    return Gpu(name.value.decode(), sm, f"{cuda // 1000}.{cuda % 1000 // 10}", memory.value)


def this_target(tensorrt: str) -> Target:
    """What engines that a TensorRT of this version builds here are bound to."""
    gpu = this_gpu()
    system, machine = platform.system().lower(), platform.machine()
    return Target(tensorrt, gpu.sm, gpu.name, gpu.cuda, system, machine)


def _no_gpu(why: str) -> BackendError:
    return BackendError(
        "cuda-missing",
        "there is no CUDA driver with a GPU here",
        why=why,
        fix="build on the machine that will run the engines; refedge doctor says what it has",
    )
