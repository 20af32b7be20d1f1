"""Our TensorRT code uses only names that the real bindings have: 8.6.0 to 11.4."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import conformance
from .conformance import MODULES, ROOT

PART = ROOT / "engines" / "part.py"
BACKEND = ROOT / "runtime" / "backends" / "tensorrt.py"
BINDINGS = ROOT / "runtime" / "backends" / "bindings.py"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_name_is_in_every_version_or_guarded_and_none_is_unresolved(path: Path) -> None:
    assert conformance.faults(path) == []


def test_the_builder_is_seen() -> None:
    seen = conformance.uses(PART)
    for name in (
        ("Builder", "build_serialized_network"),
        ("IBuilderConfig", "set_memory_pool_limit"),
        ("BuilderFlag", "OBEY_PRECISION_CONSTRAINTS"),
        ("ILayer", "set_output_type"),
        ("ITensor", "is_shape_tensor"),
        ("ITimingCache", "serialize"),
        ("IOptimizationProfile", "set_shape"),
        ("OnnxParser", "parse_from_file"),
        ("EngineInspector", "get_engine_information"),
        ("ICudaEngine", "device_memory_size"),
        ("ICudaEngine", "device_memory_size_v2"),
        ("", "OnnxParser"),
    ):
        assert name in seen


def test_the_backend_is_seen() -> None:
    seen = conformance.uses(BACKEND)
    assert ("", "Runtime") in conformance.uses(BINDINGS)
    for name in (
        ("", "init_libnvinfer_plugins"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ICudaEngine", "create_execution_context"),
        ("ICudaEngine", "create_execution_context_without_device_memory"),
        ("ICudaEngine", "device_memory_size_v2"),
        ("ICudaEngine", "get_tensor_mode"),
        ("DataType", "name"),
        ("ExecutionContextAllocationStrategy", "USER_MANAGED"),
        ("IExecutionContext", "active_optimization_profile"),
        ("IExecutionContext", "device_memory"),
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "set_device_memory"),
        ("IExecutionContext", "set_optimization_profile_async"),
        ("IExecutionContext", "set_tensor_address"),
    ):
        assert name in seen


def test_the_ahead_of_time_plugins_are_seen() -> None:
    quick = ROOT / "plugins" / "quick.py"
    source, seen = quick.read_text(), conformance.uses(quick)
    for name in ("register", "aot_impl", "from_shape_expr", "KernelLaunchParams", "SymIntExprs"):
        assert ("plugin", name) in seen
    assert conformance.faults(quick, source.replace("trtp.aot_impl(", "trtp.aot(")) != []
    assert conformance.faults(quick, source.replace("shared_mem=", "shared=")) != []
    assert conformance.faults(quick, source.replace("not hasattr(trt,", "trt and (trt,")) != []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("parser.parse_from_file(", "parser.parse_file("),
        ("engine.device_memory_size_v2)", "engine.device_memory_size_v3)"),
        ("trt.MemoryPoolType.WORKSPACE", "trt.MemoryPoolType.WORK"),
        ("layer.set_output_type(", "layer.set_out_type("),
        ("cache.serialize()", "cache.dump()"),
        ("tensor.is_shape_tensor", "tensor.is_shape"),
        ("create_network(_network_flags(trt))", "create_network(flag=_network_flags(trt))"),
        ('if hasattr(config, "progress_monitor")', "if config"),
        (
            'if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):\n        return\n',
            "if trt:\n        pass\n",
        ),
        ('if hasattr(engine, "device_memory_size_v2")', "if engine"),
        ('if not hasattr(trt.BuilderFlag, "STRIP_PLAN")', "if not trt"),
        ("def _pin(trt: Any, layer: trt.ILayer)", "def _pin(trt: Any, layer: Any)"),
        ("def _pin(trt: Any, layer: trt.ILayer)", "def _pin(trt: Any, layer)"),
        ("return bytes(blob)", "return blob.tobytes()"),
    ],
)
def test_a_wrong_name_or_a_missing_guard_is_found(right: str, wrong: str) -> None:
    source = PART.read_text()
    assert right in source
    assert conformance.faults(PART, source.replace(right, wrong)) != []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (".execute_async_v3(", ".execute_async_v4("),
        (".set_tensor_address(", ".set_address("),
        ("self._engine.context()", "self._engine.engine.create_context()"),
        ("strategies.USER_MANAGED", "strategies.MANAGED"),
        ('if hasattr(context, "set_device_memory"):', "if context:"),
        ("if strategies is None:", "if strategies:"),
        ("engine.get_tensor_dtype(name).name", "engine.get_tensor_dtype(name).label"),
        ("def _enqueue(self, context: trt.IExecutionContext)", "def _enqueue(self, context)"),
        ("-> trt.IExecutionContext | None:", "-> Any:"),
        ("def _check(engine: trt.ICudaEngine,", "def _check(engine,"),
        ("tensorrt()[0].TensorIOMode", "tensorrt()[0].IOMode"),
    ],
)
def test_the_backends_faults_are_found_too(right: str, wrong: str) -> None:
    source = BACKEND.read_text()
    assert right in source
    assert conformance.faults(BACKEND, source.replace(right, wrong)) != []
