"""The committed kernels on torch's GPU, launched as the TensorRT plugins launch them.

Cubins as the plugin library does, PTX as TensorRT does for the ahead-of-time plugins.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...plugins import compile as compiling
from ...plugins import native
from ...plugins.quick import CHAINS, FLOAT32
from ..plugins.emulated import OPERATORS, TYPES, Call, Plan, library

Step = tuple[ctypes.c_void_p, tuple[int, int, int], int, Any]  # with grid and shared memory


class Kernels:
    """The kernels for the current device; torch's context has to be there."""

    device = "cuda"

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")
        self.cuda = ctypes.CDLL("libcuda.so.1")
        major, minor = torch.cuda.get_device_capability()
        self.ptx = native.ptx(10 * major + minor)
        if json.loads(compiling.TABLE.read_text())["source"] != compiling.source_hash():
            raise RuntimeError("the cubins are of another source: make cubins")
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
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(call))
            steps.append((function, tuple(launch.grid), launch.shared, arguments))
        return partial(self._launch, steps, (work, call)), len(steps)

    def prepare_chain(
        self, operator: str, given: list[Any]
    ) -> tuple[Callable[[], None], list[Any]]:
        """What launches the operator's passes from PTX, and its outputs, which are NaN before."""
        chain, kind = CHAINS[operator], given[0].dtype
        tensors = dict(zip(chain.inputs, given, strict=True))
        tensors["epsilon"] = torch.tensor([1e-5], device=self.device)
        steps: list[Step] = []
        kept: list[Any] = [tensors]
        for one in chain.passes.values():
            lengths = one.lengths({n: tuple(tensors[n].shape) for n in one.inputs})
            grid, shared = one.launch(lengths, kind.itemsize)
            for name, letters in one.outputs.items():
                shape = [lengths[letter] for letter in letters]
                dtype = torch.float32 if name in FLOAT32 else kind
                tensors[name] = torch.full(shape, float("nan"), dtype=dtype, device=self.device)
            values: list[Any] = [ctypes.c_void_p(tensors[n].data_ptr()) for n in one.inputs]
            values += [ctypes.c_int(lengths[letter]) for letter in one.integers]
            values += [ctypes.c_void_p(tensors[n].data_ptr()) for n in one.outputs]
            entry = f"{one.kernel}_{str(kind).removeprefix('torch.')}"
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            text = self.ptx[entry].encode() + b"\0"
            self._call("cuModuleLoadData", ctypes.byref(module), text)
            self._call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
            arguments = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            steps.append((function, grid, shared, arguments))
            kept += [values, text]
        return partial(self._launch, steps, kept), [tensors[name] for name in chain.outputs]

    def _launch(self, steps: list[Step], kept: Any) -> None:
        """``kept``: what has to live as long as the function that launches."""
        stream = self._stream()
        for function, grid, shared, arguments in steps:
            self._call(
                "cuLaunchKernel", function, *grid, 256, 1, 1, shared, stream, arguments, None
            )

    def _stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.cuda, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} returned {status}")
