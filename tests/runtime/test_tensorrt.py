"""What of TensorRT's own interface is decided before an engine runs, by its real names."""

from __future__ import annotations

from typing import Any

import pytest
from refedge.runtime.backends import tensorrt as module
from refedge.runtime.backends.bindings import new_log
from refedge.runtime.engine import EngineSpec

from ..engines.stand_in import Bindings, Thing


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
