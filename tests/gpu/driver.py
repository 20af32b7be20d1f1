"""The committed cubins on torch's GPU, launched as the TensorRT plugins launch them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from ...plugins import native
from ..plugins.emulated import OPERATORS, TYPES, Call, Plan, library


class Kernels:
    """The kernels for the current device; torch's context has to be there."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")
        self.cuda = ctypes.CDLL("libcuda.so.1")
        major, minor = torch.cuda.get_device_capability()
        images = native.cubins()
        usable = [int(a[3:]) for a in images if int(a[3:]) // 10 == major]
        self.architecture = f"sm_{max(sm for sm in usable if sm % 10 <= minor)}"
        self.module = ctypes.c_void_p()
        self._image = images[self.architecture]
        self._call("cuModuleLoadData", ctypes.byref(self.module), self._image)

    def prepare(
        self, operator: str, sizes: dict[str, int], given: list[Any], made: list[Any],
        epsilon: float = 1e-5,
    ) -> tuple[Callable[[], None], int]:  # fmt: skip
        """What launches the operator on torch's current stream, and how many kernels it has."""
        dtype = str(made[0].dtype).removeprefix("torch.")
        call, plan = Call(**sizes, epsilon=epsilon), Plan()
        for i, tensor in enumerate(given):
            call.inputs[i] = tensor.data_ptr()
        for i, tensor in enumerate(made):
            call.outputs[i] = tensor.data_ptr()
        which = OPERATORS.index(operator), TYPES.index(dtype)
        size = library().refedge_workspace(*which, ctypes.byref(call))
        if size < 0:
            raise ValueError(f"refused: {sizes}")
        work = torch.empty(size, dtype=torch.uint8, device="cuda").fill_(0xFF)
        call.work = work.data_ptr()
        library().refedge_plan(*which, ctypes.byref(call), ctypes.byref(plan))
        steps = []
        for launch in plan.launch[: plan.launches]:
            function = ctypes.c_void_p()
            name = launch.kernel + b"_" + dtype.encode()
            self._call("cuModuleGetFunction", ctypes.byref(function), self.module, name)
            steps.append((function, tuple(launch.grid), launch.shared))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(call))

        def run() -> None:
            _ = work, call  # kept as long as this function
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            for function, grid, shared in steps:
                self._call(
                    "cuLaunchKernel", function, *grid, 256, 1, 1, shared, stream, arguments, None
                )

        return run, len(steps)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.cuda, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} returned {status}")
