"""One part's engine, built or filled in a process of its own.

The builder takes several times the memory of what it builds, and gives it back for certain only
when its process ends; what kills that process, on a board mostly the kernel for want of memory,
becomes an error of the process that waits (``build.py``). Only numpy's neighbours are needed here:
TensorRT, msgspec.

    python -m refedge.engines.part task.json result.json
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import EngineError, RefedgeError
from ..runtime.backends.bindings import last_words, new_log, new_runtime, open_tensorrt
from ..runtime.files import write_atomically
from .progress import new_progress
from .refit import filled
from .refusals import not_built, not_parsed
from .tensorrt import load_plugins

if TYPE_CHECKING:
    import tensorrt as trt

Say = Callable[[str], None]
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Options:
    """What a user may ask of the builder; None and False leave TensorRT's own choice.

    workspace: MiB that a layer may use while it runs.
    level:     builder optimisation level, 0 to 5.
    hardware:  ``ampere+`` or ``same-cc``: run on other GPUs too.
    versions:  run on later TensorRT of the same major version too.
    refit, strip: weights can be replaced; weights are left out.
    quick:     ahead-of-time plugins for the nodes of the dialect ``trt10-quick``.
    """

    workspace: int | None = None
    level: int | None = None
    hardware: str | None = None
    versions: bool = False
    refit: bool = False
    strip: bool = False
    quick: bool = False


@dataclass(frozen=True)
class PartTask:
    """What to build.

    graph, engine, cache: paths of the dialect file, of what to write, of the timing cache.
    rest, int8: the plan's precision outside the integers, and whether there are integers.
    pinned: names of ONNX nodes that stay in float32; for a TensorRT that chooses types itself.
    shapes: input to its least, usual and largest shape; inputs of one shape are not there.
    plugins: libraries to load first: path to SHA-256.
    stripped: an engine of this graph without weights, which is filled in place of a build; or ''.
    sm: compute capability times ten of the GPU that builds.
    """

    part: str
    graph: str
    engine: str
    cache: str
    rest: str
    int8: bool
    pinned: tuple[str, ...]
    shapes: Shapes
    plugins: dict[str, str] = field(default_factory=dict)
    sm: int = 0
    options: Options = field(default_factory=Options)
    stripped: str = ""


@dataclass(frozen=True)
class PartResult:
    """What was built: bytes a context takes, the inspector's JSON ('' where it has none)."""

    memory: int = 0
    inspector: str = ""
    error: tuple[str, str, str, str] | None = None  # code, what, why, fix


def build_part(trt: Any, task: PartTask, say: Say) -> PartResult:
    """Build or fill, write the engine, ask the inspector; raises EngineError."""
    logger = new_log(trt)
    load_plugins(trt, logger, task.plugins)
    if task.options.quick:
        from ..plugins.quick import register

        register(trt, task.sm)
    if task.stripped:
        data = filled(
            trt,
            logger,
            Path(task.stripped),
            task.graph,
            task.part,
            keep=task.options.refit,
            host_code=task.options.versions,
        )
    else:
        data = _built(trt, logger, task, say)  # its memory is free again
    write_atomically(Path(task.engine), data)
    return PartResult(*_inspect(trt, logger, data, task))


def _built(trt: Any, logger: Any, task: PartTask, say: Say) -> bytes:
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # the bindings' word for a null pointer
        raise EngineError(
            "engine-builder",
            f"TensorRT {trt.__version__} makes no builder here",
            why=last_words(logger.lines),
            fix="refedge doctor: the driver must be new enough for this TensorRT's CUDA",
        ) from error
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if hasattr(trt, "OnnxParserFlag"):  # the wheel of 8.6.0 has none, and its parser no choice
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
    if not parser.parse_from_file(task.graph):
        raise not_parsed(trt, parser, task.part, logger.lines)
    config = builder.create_builder_config()
    _set_options(trt, config, task.options)
    _set_precision(trt, config, network, task)
    if task.shapes:
        profile = builder.create_optimization_profile()
        for name, (least, usual, largest) in task.shapes.items():
            profile.set_shape(name, least, usual, largest)
        config.add_optimization_profile(profile)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = new_progress(trt, task.part, say)
    cache = _timing_cache(config, Path(task.cache))
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        raise not_built(trt, task.part, logger.lines)
    write_atomically(Path(task.cache), bytes(cache.serialize()))
    return bytes(blob)


def _network_flags(trt: Any) -> int:
    """Types come from the graph where TensorRT can take them from there (10 and later)."""
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)


def _set_options(trt: Any, config: trt.IBuilderConfig, options: Options) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspection
    if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
        # 8.6 lends a profile to one context only, and the runtime has one for every shape
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        # as later versions have it: 8.6 makes handles of cuBLAS and cuDNN for plugins, which ours
        # do not take, though its own kernels do not use those libraries
        kept = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
        config.set_tactic_sources(sum(1 << int(source) for source in kept))
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.versions:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.strip:
        if not hasattr(trt.BuilderFlag, "STRIP_PLAN"):
            raise _unsupported(trt, "leaves no weights out")
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if options.hardware == "ampere+":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.hardware == "same-cc":
        if not hasattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY"):
            raise _unsupported(trt, "knows no compatibility within a compute capability")
        level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
        config.hardware_compatibility_level = level


def _set_precision(
    trt: Any, config: trt.IBuilderConfig, network: trt.INetworkDefinition, task: PartTask
) -> None:
    """Flags and pinned layers for a TensorRT that chooses types; TF32 never in a plan of fp32."""
    if task.rest == "fp32" and not task.int8:
        config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return
    if task.int8:
        config.set_flag(trt.BuilderFlag.INT8)
    if task.rest == "fp16":
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        pinned = frozenset(task.pinned)
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            # the parser of 8.6 names no LayerNormalization; all that it makes are norms
            norm = pinned and layer.type == trt.LayerType.NORMALIZATION
            if norm or _node_of(layer.name, pinned):
                _pin(trt, layer)


def _node_of(layer: str, nodes: frozenset[str]) -> bool:
    """The parser names a node's layers after it, further ones with a number behind.

    The pieces that a node was lowered to are called after it too: ``<node>/Erf``.
    """
    stem, _, number = layer.rpartition("_")
    names = (layer, stem) if number.isdigit() else (layer,)
    return any(name in nodes or name.rpartition("/")[0] in nodes for name in names)


def _pin(trt: Any, layer: trt.ILayer) -> None:
    """float32 for a layer that computes in floats; shapes, indices and booleans stay."""
    floats = (trt.DataType.FLOAT, trt.DataType.HALF)
    tensors = [layer.get_output(i) for i in range(layer.num_outputs)]
    if any(tensor.is_shape_tensor for tensor in tensors) or layer.precision not in floats:
        return
    layer.precision = trt.DataType.FLOAT
    for i, tensor in enumerate(tensors):
        if tensor.dtype in floats:
            layer.set_output_type(i, trt.DataType.FLOAT)


def _timing_cache(config: trt.IBuilderConfig, path: Path) -> trt.ITimingCache:
    """The kept measurements; none where there are none, or they are of another machine."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _inspect(trt: Any, logger: Any, data: bytes, task: PartTask) -> tuple[int, str]:
    """Device memory of a context, and the inspector's JSON at the usual shapes."""
    runtime = new_runtime(trt, logger)
    if task.options.versions:
        runtime.engine_host_code_allowed = True  # written by ourselves a moment ago
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise not_built(trt, task.part, logger.lines)
    if hasattr(engine, "device_memory_size_v2"):
        memory = int(engine.device_memory_size_v2)
    else:
        memory = int(engine.device_memory_size)
    if task.options.strip:
        return memory, ""  # no weights, no context
    context = engine.create_execution_context()
    if context is None:
        raise not_built(trt, task.part, logger.lines)
    for name, (_, usual, _) in task.shapes.items():
        context.set_input_shape(name, usual)
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context  # types of dynamic shapes are known only with it
    return memory, str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _unsupported(trt: Any, what: str) -> EngineError:
    return EngineError(
        "engine-option",
        f"TensorRT {trt.__version__} {what}",
        why="the option came with a later version",
        fix="build without it",
    )


def main(task_file: str, result_file: str) -> None:
    """Build what a file describes and write what became of it."""
    task = msgspec.json.decode(Path(task_file).read_bytes(), type=PartTask)
    try:
        result = build_part(open_tensorrt(), task, lambda line: print(line, flush=True))
    except RefedgeError as error:
        result = PartResult(error=(error.code, error.what, error.why, error.fix))
    write_atomically(Path(result_file), msgspec.json.encode(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is written: what TensorRT does while a process ends says nothing of it
