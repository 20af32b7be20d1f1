"""In which order the builder is called, for each TensorRT, against its real names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from refedge.engines.part import Options, PartTask, build_part
from refedge.engines.tensorrt import dialect_of, load_plugins
from refedge.errors import EngineError
from refedge.runtime.backends.bindings import new_log

from .stand_in import Bindings, Member, Thing

SHAPES = {"pixels": ((1, 96, 96, 3), (1, 96, 96, 3), (16, 96, 96, 3))}
NEW = ("10.3", "10.13", "11.4")


def task(folder: Path, **changes: Any) -> PartTask:
    said: dict[str, Any] = {
        "part": "mask",
        "graph": "mask.onnx",
        "engine": str(folder / "mask.engine"),
        "cache": str(folder / "timing.cache"),
        "rest": "fp16",
        "int8": True,
        "pinned": ("head/Softmax:s", "head/Gelu:g"),
        "shapes": SHAPES,
    }
    return PartTask(**{**said, **changes})


def layer(world: Bindings, name: str, kind: str = "FLOAT", shape: bool = False) -> Thing:
    output = {"dtype": Member("DataType", kind), "is_shape_tensor": shape}
    values = {"name": name, "num_outputs": 1, "precision": Member("DataType", kind)}
    values["get_output"] = lambda i: Thing(world, "ITensor", dict(output))
    return Thing(world, "ILayer", values)


def bindings(version: str, **changes: Any) -> Bindings:
    results: dict[str, Any] = {
        "OnnxParser.parse_from_file": True,
        "Builder.build_serialized_network": b"engine",
        "ITimingCache.serialize": b"timings",
        "EngineInspector.get_engine_information": '{"Layers": []}',
    }
    world = Bindings(version, results)
    layers = [
        layer(world, "head/Softmax:s"),
        layer(world, "head/Softmax:s_3"),
        layer(world, "head/Gelu:g/Erf"),
        layer(world, "stem/Conv:c"),
        layer(world, "stem/Conv:c_3"),
    ]
    memory = "device_memory_size" if version == "8.6" else "device_memory_size_v2"
    results["Builder.create_network"] = lambda flags: Thing(
        world, "INetworkDefinition", {"num_layers": len(layers), "get_layer": layers.__getitem__}
    )
    results["Runtime.deserialize_cuda_engine"] = lambda data: Thing(
        world, "ICudaEngine", {memory: 4096}
    )
    results.update(changes)
    return world


def named(world: Bindings, name: str) -> list[tuple[Any, ...]]:
    return [given for what, given in world.calls if what == name]


@pytest.mark.parametrize("version", ["8.6", *NEW])
def test_a_part_is_parsed_built_written_and_inspected(version: str, tmp_path: Path) -> None:
    world = bindings(version)
    result = build_part(world, task(tmp_path), print)
    assert (result.memory, result.inspector) == (4096, '{"Layers": []}')
    assert (tmp_path / "mask.engine").read_bytes() == b"engine"
    assert (tmp_path / "timing.cache").read_bytes() == b"timings"
    order = [what for what, _ in world.calls]
    wanted = [
        "OnnxParser.parse_from_file",
        "Builder.create_builder_config",
        "IOptimizationProfile.set_shape",
        "IBuilderConfig.add_optimization_profile",
        "IBuilderConfig.set_timing_cache",
        "Builder.build_serialized_network",
        "ITimingCache.serialize",
        "Runtime.deserialize_cuda_engine",
        "IExecutionContext.set_input_shape",
        "EngineInspector.execution_context =",
        "EngineInspector.get_engine_information",
    ]
    assert [what for what in order if what in wanted] == wanted
    assert named(world, "IOptimizationProfile.set_shape") == [("pixels", *SHAPES["pixels"])]
    assert named(world, "OnnxParser.set_flag") == [
        (Member("OnnxParserFlag", "NATIVE_INSTANCENORM"),)
    ]
    verbosity = named(world, "IBuilderConfig.profiling_verbosity =")
    assert verbosity == [(Member("ProfilingVerbosity", "DETAILED"),)]
    assert bool(named(world, "IBuilderConfig.progress_monitor =")) == (version != "8.6")


def flags(world: Bindings) -> set[str]:
    return {given[0].name for given in named(world, "IBuilderConfig.set_flag")}


def test_8_6_is_told_the_types_and_what_stays_in_float32(tmp_path: Path) -> None:
    world = bindings("8.6")
    build_part(world, task(tmp_path), print)
    assert flags(world) == {"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"}
    float32 = Member("DataType", "FLOAT")
    # the softmax, its further layer, the piece of the Gelu; not the convolution's
    assert named(world, "ILayer.precision =") == [(float32,)] * 3
    assert named(world, "ILayer.set_output_type") == [(0, float32)] * 3


@pytest.mark.parametrize("version", ["8.6", "10.3", "10.13", "11.4"])
def test_no_handles_of_other_libraries_are_made(version: str, tmp_path: Path) -> None:
    """8.6 is told so; later versions make none by themselves. Sources 3 and 4 are its own."""
    world = bindings(version)
    build_part(world, task(tmp_path), print)
    told = named(world, "IBuilderConfig.set_tactic_sources")
    assert len(told) == version.startswith("8.6")
    kept = {"EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"}
    values = (int(Member("TacticSource", name)) for name in kept)
    assert told == [(sum(1 << v for v in values),)] * len(told)


def test_8_6_leaves_shapes_and_integers_alone(tmp_path: Path) -> None:
    world = bindings("8.6")
    layers = [
        layer(world, "head/Softmax:s", shape=True),
        layer(world, "head/Softmax:s_1", kind="INT32"),
    ]
    world.results["Builder.create_network"] = lambda flags: Thing(
        world, "INetworkDefinition", {"num_layers": 2, "get_layer": layers.__getitem__}
    )
    build_part(world, task(tmp_path), print)
    assert named(world, "ILayer.precision =") == []


@pytest.mark.parametrize("version", NEW)
def test_later_ones_take_types_from_the_graph(version: str, tmp_path: Path) -> None:
    world = bindings(version)
    made = []
    create = world.results["Builder.create_network"]
    world.results["Builder.create_network"] = lambda flags: made.append(flags) or create(flags)
    build_part(world, task(tmp_path), print)
    typed = 1 << int(Member("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"))
    assert made == [typed]
    assert flags(world) == set()
    assert named(world, "IBuilderConfig.clear_flag") == []


@pytest.mark.parametrize("version", ["8.6", *NEW])
def test_fp32_is_no_tf32(version: str, tmp_path: Path) -> None:
    world = bindings(version)
    build_part(world, task(tmp_path, rest="fp32", int8=False), print)
    assert named(world, "IBuilderConfig.clear_flag") == [(Member("BuilderFlag", "TF32"),)]
    assert flags(world) == set()


def test_options(tmp_path: Path) -> None:
    world = bindings("10.13")
    options = Options(512, 1, "same-cc", versions=True, refit=True)
    build_part(world, task(tmp_path, options=options), print)
    assert flags(world) == {"VERSION_COMPATIBLE", "REFIT"}
    limit = named(world, "IBuilderConfig.set_memory_pool_limit")
    assert limit == [(Member("MemoryPoolType", "WORKSPACE"), 512 << 20)]
    assert named(world, "IBuilderConfig.builder_optimization_level =") == [(1,)]
    assert named(world, "Runtime.engine_host_code_allowed =") == [(True,)]


def test_an_engine_without_weights_is_not_inspected(tmp_path: Path) -> None:
    world = bindings("11.4")
    result = build_part(world, task(tmp_path, options=Options(strip=True)), print)
    assert flags(world) == {"STRIP_PLAN"}
    assert result.inspector == ""
    assert named(world, "ICudaEngine.create_execution_context") == []


def filling(version: str, **changes: Any) -> Bindings:
    results = {
        "OnnxParserRefitter": {"num_errors": 0},
        "OnnxParserRefitter.refit_from_file": True,
        "Refitter.get_missing_weights": [],
        "ICudaEngine.serialize_with_config": b"whole",
    }
    return bindings(version, **{**results, **changes})


def stripped(folder: Path, **options: Any) -> PartTask:
    (folder / "old.engine").write_bytes(b"no weights")
    return task(folder, stripped=str(folder / "old.engine"), options=Options(**options))


@pytest.mark.parametrize("version", NEW)
def test_an_engine_without_weights_is_filled_from_the_graph(version: str, tmp_path: Path) -> None:
    world = filling(version)
    result = build_part(world, stripped(tmp_path), print)
    assert (tmp_path / "mask.engine").read_bytes() == b"whole"
    assert result.inspector == '{"Layers": []}'
    assert named(world, "OnnxParserRefitter.refit_from_file") == [("mask.onnx",)]
    assert named(world, "Runtime.deserialize_cuda_engine") == [(b"no weights",), (b"whole",)]
    order = [what for what, _ in world.calls]
    wanted = [
        "OnnxParserRefitter.refit_from_file",
        "Refitter.get_missing_weights",
        "Refitter.refit_cuda_engine",
        "ISerializationConfig.clear_flag",
        "ICudaEngine.serialize_with_config",
        "EngineInspector.get_engine_information",
    ]
    assert [what for what in order if what in wanted] == wanted
    excluded = Member("SerializationFlag", "EXCLUDE_WEIGHTS")
    assert named(world, "ISerializationConfig.clear_flag") == [(excluded,)]
    assert not any(what.startswith("Builder.") for what in order)


@pytest.mark.parametrize("version", NEW)
def test_a_filled_engine_stays_refittable_where_that_can_be_said(
    version: str, tmp_path: Path
) -> None:
    world = filling(version)
    build_part(world, stripped(tmp_path, refit=True), print)
    kept = [(Member("SerializationFlag", "INCLUDE_REFIT"),)] if version == "11.4" else []
    assert named(world, "ISerializationConfig.set_flag") == kept


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    world = filling("10.3", **{"OnnxParserRefitter.refit_from_file": False})
    world.results["Refitter.get_missing_weights"] = ["head.conv.weight"]
    world.results["OnnxParserRefitter"] = refused(world, desc="Failed to refit all the weights.")
    with pytest.raises(EngineError) as caught:
        build_part(world, stripped(tmp_path), print)
    assert caught.value.code == "engine-refit"
    assert "Failed to refit all the weights." in caught.value.why
    assert "head.conv.weight" in caught.value.why
    assert named(world, "Refitter.refit_cuda_engine") == []
    assert not (tmp_path / "mask.engine").exists()


@pytest.mark.parametrize(
    ("version", "changes", "code"),
    [
        ("8.6", {}, "engine-option"),
        ("10.13", {"Refitter": None}, "engine-refit"),
        ("11.4", {"Refitter.refit_cuda_engine": False}, "engine-refit"),
        ("11.4", {"ICudaEngine.serialize_with_config": None}, "engine-refit"),
        ("11.4", {"Runtime.deserialize_cuda_engine": None}, "engine-build"),
    ],
)
def test_an_engine_that_cannot_be_filled(
    version: str, changes: dict[str, Any], code: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineError) as caught:
        build_part(filling(version, **changes), stripped(tmp_path), print)
    assert caught.value.code == code
    assert not (tmp_path / "mask.engine").exists()


@pytest.mark.parametrize("options", [Options(strip=True), Options(hardware="same-cc")])
def test_what_a_version_cannot_do_is_said(options: Options, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        build_part(bindings("8.6"), task(tmp_path, options=options), print)
    assert caught.value.code == "engine-option"


def test_a_cache_of_another_machine_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "timing.cache").write_bytes(b"foreign")
    taken = iter([False, True])
    world = bindings("10.3", **{"IBuilderConfig.set_timing_cache": lambda *_: next(taken)})
    build_part(world, task(tmp_path), print)
    made = named(world, "IBuilderConfig.create_timing_cache")
    assert made == [(b"foreign",), (b"",)]


def refused(world: Bindings, **said: str) -> dict[str, Any]:
    error = Thing(world, "ParserError", {k: (lambda v=v: v) for k, v in said.items()})
    return {"num_errors": 1, "get_error": lambda i: error}


@pytest.mark.parametrize("version", NEW)
def test_the_parsers_refusal_names_the_node(version: str, tmp_path: Path) -> None:
    world = bindings(version, **{"OnnxParser.parse_from_file": False})
    world.results["OnnxParser"] = refused(
        world, desc="unsupported mode", node_name="head.up/Resize:r", node_operator="Resize"
    )
    with pytest.raises(EngineError) as caught:
        build_part(world, task(tmp_path), print)
    assert caught.value.code == "engine-parse"
    assert "head.up/Resize:r (Resize)" in caught.value.what
    assert "unsupported mode" in caught.value.why


@pytest.mark.parametrize("version", ["8.6", "10.3"])
def test_a_tensorrt_without_ahead_of_time_plugins(version: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        build_part(bindings(version), task(tmp_path, options=Options(quick=True), sm=87), print)
    assert caught.value.code == "plugin-quick"


def test_a_missing_plugin_is_called_so(tmp_path: Path) -> None:
    world = bindings("10.3", **{"OnnxParser.parse_from_file": False})
    world.results["OnnxParser"] = refused(
        world,
        desc="Plugin not found, are the plugin name, version, and namespace correct?",
        node_name="head/CrossAttention:a",
        node_operator="CrossAttention",
    )
    with pytest.raises(EngineError) as caught:
        build_part(world, task(tmp_path), print)
    assert caught.value.code == "engine-plugin"
    assert "head/CrossAttention:a" in caught.value.what


def test_a_library_that_registers_nothing_is_refused(tmp_path: Path) -> None:
    world = bindings("10.3", **{"IPluginRegistry.load_library": None})
    library = tmp_path / "librefedge.so"
    library.write_bytes(b"code")
    with pytest.raises(EngineError) as caught:
        load_plugins(world, new_log(world), {str(library): hashlib.sha256(b"code").hexdigest()})
    assert caught.value.code == "plugin-refused"
    assert "librefedge.so" in caught.value.what


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory", "memory"),
        ("[defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)", "memory"),
        ("Error Code 10: Could not find any implementation for node head/Conv:c", "build"),
    ],
)
def test_why_nothing_was_built(line: str, code: str, tmp_path: Path) -> None:
    world = bindings("10.3")
    world.results["Builder.create_network"] = _log_first(world, line)
    world.results["Builder.build_serialized_network"] = None
    with pytest.raises(EngineError) as caught:
        build_part(world, task(tmp_path), print)
    assert caught.value.code == f"engine-{code}"
    assert line in caught.value.why
    assert not (tmp_path / "mask.engine").exists()


def _log_first(world: Bindings, line: str) -> Any:
    """create_network, with an error in the log first."""
    create = world.results["Builder.create_network"]
    base = world._own["ILogger"]
    made: list[Any] = []
    base.__new__ = lambda cls: made.append(object.__new__(cls)) or made[-1]  # type: ignore[assignment]

    def start(flags: int) -> Any:
        made[0].log(base.ERROR, line)
        made[0].log(Member("ILogger", "INFO"), "of no interest")
        return create(flags)

    return start


@pytest.mark.parametrize(
    ("version", "dialect"),
    [("8.6.1", "trt8"), ("10.3.0.30", "trt10"), ("10.13.3.9", "trt10"), ("11.4.0.106", "trt10")],
)
def test_the_dialect_of_a_version(version: str, dialect: str) -> None:
    assert dialect_of(version) == dialect


@pytest.mark.parametrize("version", ["8.5.2", "9.1.0", "10.0.1", "unknown"])
def test_a_version_without_dialect(version: str) -> None:
    with pytest.raises(EngineError) as caught:
        dialect_of(version)
    assert caught.value.code == "engine-version"
