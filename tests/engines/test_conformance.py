"""Our TensorRT code uses only names that the real bindings have: 8.6, 10.3, 10.13 and 11.4."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import conformance

ROOT = Path(__file__).parents[2]
MODULES = [
    *sorted((ROOT / "engines").glob("*.py")),
    ROOT / "plugins" / "quick.py",
    ROOT / "runtime" / "backends" / "bindings.py",
    *sorted((ROOT / "runtime" / "backends").glob("tensorrt*.py")),
]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_name_is_in_every_version_or_guarded(path: Path) -> None:
    assert conformance.faults(path.read_text()) == []


def test_the_builder_is_seen() -> None:
    seen = conformance.uses((ROOT / "engines" / "part.py").read_text())
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


def test_the_ahead_of_time_plugins_are_seen() -> None:
    source = (ROOT / "plugins" / "quick.py").read_text()
    seen = conformance.uses(source)
    for name in ("register", "aot_impl", "from_shape_expr", "KernelLaunchParams", "SymIntExprs"):
        assert ("plugin", name) in seen
    assert conformance.faults(source.replace("trtp.aot_impl(", "trtp.aot(")) != []
    assert conformance.faults(source.replace("shared_mem=", "shared=")) != []
    assert conformance.faults(source.replace("not hasattr(trt,", "trt and (trt,")) != []


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
        ("def _pin(trt: Any, layer: Any)", "def _pin(trt: Any, thing: Any)"),
    ],
)
def test_a_wrong_name_or_a_missing_guard_is_found(right: str, wrong: str) -> None:
    source = (ROOT / "engines" / "part.py").read_text()
    assert right in source
    assert conformance.faults(source.replace(right, wrong)) != []
