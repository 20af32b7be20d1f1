"""What of TensorRT's own interface is decided before an engine runs, by its real names."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from refedge.errors import EngineError
from refedge.runtime.backends import tensorrt as module
from refedge.runtime.backends.bindings import new_log
from refedge.runtime.engine import EngineSpec
from refedge.runtime.manifest import PartSpec, TensorSpec

from ..engines.stand_in import Bindings, Member, Thing
from .host_cuda import HostCuda


@pytest.mark.parametrize("host_code", [False, True])
@pytest.mark.parametrize("version", ["8.6", "10.3", "10.13", "11.4"])
def test_host_code_is_taken_only_of_engines_for_later_versions(
    version: str, host_code: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Bindings(version, {})
    memory = "device_memory_size" if version == "8.6" else "device_memory_size_v2"
    world.results["Runtime.deserialize_cuda_engine"] = lambda data: Thing(
        world, "ICudaEngine", {memory: 4096}
    )
    monkeypatch.setattr(module, "tensorrt", lambda: (world, new_log(world)))
    spec = EngineSpec("mask.engine", "a" * 64, 1, f"{version} {host_code}", (1, 1, 4), 0)
    held: Any = module._deserialise(b"e", spec, host_code=host_code)
    assert held.scratch == 4096
    assert [c for c in world.calls if c[0].startswith("Runtime.")] == [
        ("Runtime.engine_host_code_allowed =", (host_code,)),
        ("Runtime.deserialize_cuda_engine", (b"e",)),
    ]


class Doubling:
    """An engine that doubles ``x`` [batch, 3] where the runtime said that it lies."""

    def __init__(self, version: str) -> None:
        self.world = world = Bindings(version, {})
        self.shape, self.addresses = (0, 0), dict[str, int]()
        self.refuses = ""
        newer = version != "8.6"
        memory = "device_memory_size_v2" if newer else "device_memory_size"
        engine = {memory: 4096, "num_io_tensors": 2}
        world.results |= {
            "Runtime.deserialize_cuda_engine": lambda data: Thing(world, "ICudaEngine", engine),
            "ICudaEngine.get_tensor_name": lambda i: "xy"[i],
            "ICudaEngine.get_tensor_mode": lambda name: Member(
                "TensorIOMode", "INPUT" if name == "x" else "OUTPUT"
            ),
            "ICudaEngine.get_tensor_dtype": lambda name: Member("DataType", "FLOAT"),
            "ICudaEngine.get_tensor_shape": lambda name: (-1, 3),
            "IExecutionContext.set_input_shape": self.take_shape,
            "IExecutionContext.set_tensor_address": self.take_address,
            "IExecutionContext.get_tensor_shape": lambda name: self.shape,
            "IExecutionContext.execute_async_v3": self.execute,
        }
        made = "create_execution_context" + "_without_device_memory" * (not newer)
        context = {"active_optimization_profile": 0, "device_memory": 0}
        world.results[f"ICudaEngine.{made}"] = lambda *_: Thing(
            world, "IExecutionContext", dict(context)
        )

    def take_shape(self, name: str, shape: tuple[int, int]) -> bool:
        self.shape = shape
        return self.refuses != "shape"

    def take_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute(self, stream: int) -> bool:
        assert stream == HostCuda.stream
        x, y = (
            np.ctypeslib.as_array((ctypes.c_float * (self.shape[0] * 3)).from_address(a))
            for a in (self.addresses["x"], self.addresses["y"])
        )
        y[:] = 2 * x
        return self.refuses != "run"


class HostGraph:
    """A capture does not execute."""

    made = 0

    def __init__(self, stream: int, enqueue: Callable[[], None]) -> None:
        self.launch = enqueue
        HostGraph.made += 1


@pytest.fixture(params=["8.6", "10.3", "10.13", "11.4"])
def doubling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Doubling:
    made = Doubling(request.param)
    logger = new_log(made.world)
    monkeypatch.setattr(module, "tensorrt", lambda: (made.world, logger))
    monkeypatch.setattr(module, "Cuda", HostCuda)
    monkeypatch.setattr(module, "Graph", HostGraph)
    monkeypatch.setattr(HostGraph, "made", 0)
    monkeypatch.setattr(module, "_engines", {})
    return made


X, Y = (TensorSpec(name, "float32", ("batch", 3)) for name in "xy")


def opened(name: str = "mask") -> Any:
    spec = EngineSpec(f"{name}.engine", "a" * 64, 1, "b" * 64, (1, 1, 4), 0)
    part = PartSpec(name, (X,), (Y,), (1, 1, 4))
    return module.open_part(b"e", spec, part, set(), plugins={}, host_code=False)


def test_a_part_runs_on_the_places_it_named(doubling: Doubling) -> None:
    part = opened()
    one, four = np.ones((1, 3), np.float32), np.arange(12, dtype=np.float32).reshape(4, 3)
    for values in (one, four, one + 1, four + 1):
        assert np.array_equal(part.run({"x": values})["y"], 2 * values)
    assert HostGraph.made == 2  # one a shape
    y = doubling.addresses["y"]
    ctypes.memset(y, 0, 48)
    part.again()  # the last shape, on what still lies there
    found = np.ctypeslib.as_array((ctypes.c_float * 12).from_address(y))
    assert np.array_equal(found.reshape(4, 3), 2 * (four + 1))


def test_what_other_parts_read_stays_on_the_device(doubling: Doubling) -> None:
    part = opened("text")
    first = part.run({"x": np.ones((1, 3), np.float32)})["y"]
    second = part.run({"x": np.full((1, 3), 5, np.float32)})["y"]
    assert isinstance(first, module.DeviceArray)
    assert np.array_equal(np.asarray(first), np.full((1, 3), 2))
    assert np.array_equal(np.asarray(second), np.full((1, 3), 10))


@pytest.mark.parametrize("refuses", ["shape", "run"])
def test_what_tensorrt_refuses_is_said(refuses: str, doubling: Doubling) -> None:
    part = opened()
    doubling.refuses = refuses
    with pytest.raises(EngineError) as caught:
        part.run({"x": np.ones((1, 3), np.float32)})
    assert caught.value.code == "engine-refused"
    with pytest.raises(EngineError) as caught:
        part.run({"x": np.ones((5, 3), np.float32)})
    assert caught.value.code == "engine-shape"
