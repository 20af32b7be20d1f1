"""What of TensorRT's own interface is decided before an engine runs, by its real names."""

from __future__ import annotations

import ctypes
import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from refedge.errors import BackendError, EngineError, RefedgeWarning
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
        self.context = context

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

    made = refused = 0

    def __init__(self, stream: int, enqueue: Callable[[], None]) -> None:
        if HostGraph.refused:
            HostGraph.refused -= 1
            raise BackendError("cuda-failed", "no", why="another thread", fix="so")
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
    monkeypatch.setattr(HostGraph, "refused", 0)
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


def test_a_capture_that_failed_is_tried_once_more(doubling: Doubling) -> None:
    part, one = opened(), np.ones((1, 3), np.float32)
    HostGraph.refused = 1
    for _ in range(3):
        part.run({"x": one})
    assert HostGraph.made == 1
    HostGraph.refused = 2
    two = np.ones((2, 3), np.float32)
    part.run({"x": two})
    with pytest.warns(RefedgeWarning, match="without a CUDA graph: another thread"):
        part.run({"x": two})
    assert np.array_equal(part.run({"x": two})["y"], 2 * two)
    assert HostGraph.made == 1


def test_a_second_context_takes_the_profile_that_is_shared(doubling: Doubling) -> None:
    part, name = opened(), "IExecutionContext.set_optimization_profile_async"
    part.run({"x": np.ones((1, 3), np.float32)})
    doubling.context["active_optimization_profile"] = -1  # as 8.6 does of itself
    part.run({"x": np.ones((2, 3), np.float32)})
    assert (name, (0, HostCuda.stream)) in doubling.world.calls
    assert len(part._held) == 2


def test_a_profile_that_is_not_shared_goes_to_the_next_context(doubling: Doubling) -> None:
    part = opened()
    doubling.world.results["IExecutionContext.set_optimization_profile_async"] = False
    part.run({"x": np.ones((1, 3), np.float32)})
    doubling.context["active_optimization_profile"] = -1
    assert part.run({"x": np.ones((2, 3), np.float32)})["y"].shape == (2, 3)
    assert len(part._held) == 1


def test_what_is_free_is_given_back_before_an_engine_is_refused(
    doubling: Doubling, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[bool] = []
    monkeypatch.setattr(module, "trim", lambda: trimmed.append(True))
    load = doubling.world.results["Runtime.deserialize_cuda_engine"]
    doubling.world.results["Runtime.deserialize_cuda_engine"] = lambda data: (
        load(data) if trimmed else None
    )
    assert opened().run({"x": np.ones((1, 3), np.float32)})["y"].shape == (1, 3)
    doubling.world.results["Runtime.deserialize_cuda_engine"] = lambda data: None
    monkeypatch.setattr(module, "_engines", {})
    with pytest.raises(EngineError) as caught:
        opened()
    assert caught.value.code == "engine-refused"


def test_a_runtime_that_cannot_start(doubling: Doubling) -> None:
    doubling.world.results["Runtime"] = None
    with pytest.raises(BackendError) as caught:
        opened()
    assert caught.value.code == "backend-refused"
    assert "driver" in caught.value.fix


def test_libraries_are_loaded_once_whoever_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT refuses a library whose plugins are registered already."""
    loaded: list[str] = []

    class Registry:
        def load_library(self, path: str) -> object:
            time.sleep(0.02)  # where other threads come in
            if path in loaded:
                return None
            loaded.append(path)
            return object()

    trt = SimpleNamespace(__version__="10.3", get_plugin_registry=Registry)
    logger = SimpleNamespace(lines=[], take=lambda: "")
    monkeypatch.setattr(module, "tensorrt", lambda: (trt, logger))
    monkeypatch.setattr(module, "_plugins", {})
    (tmp_path / "p.so").write_bytes(b"p")
    (tmp_path / "q.so").write_bytes(b"q")
    sha256 = {tmp_path / n: hashlib.sha256(n[:1].encode()).hexdigest() for n in ("p.so", "q.so")}
    failed: list[Exception] = []

    def load() -> None:
        try:
            module._load_plugins(sha256)
        except EngineError as error:
            failed.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [Path(path).name for path in loaded] == ["p.so", "q.so"]
