"""TensorRT: engines that ``refedge build`` made on this machine, run by CUDA graphs.

Every tensor of a part has a place of its own that never moves, so what is captured stays valid:
inputs are written there from page-locked memory, or copied from what another part left on the
device. For each shape there is one execution context and one graph (NVIDIA's rule: a context that
has been captured is left alone); all contexts of a backend share one piece of scratch memory,
because they run one after another on its stream. Segmenters of one bundle share its weights.

TensorRT's interface from 8.6 to 11; ``hasattr`` where the versions differ.
"""

from __future__ import annotations

import functools
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from ...errors import BackendError, EngineError, RefedgeWarning
from ...plugins.native import register
from ..bundle import Bundle
from ..engine import EngineSpec, Target
from ..manifest import PartSpec
from . import probe
from .bindings import new_log, new_runtime, open_tensorrt
from .cuda import Block, Cuda, Graph, target_for, trim
from .engine_files import find_engines
from .protocol import Arrays
from .tensors import DeviceArray, Place

if TYPE_CHECKING:
    import tensorrt as trt

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "UINT8": "uint8",
    "INT8": "int8",
    "INT32": "int32",
    "BOOL": "bool",
}
_ALIGNED = 256  # bytes, as cuMemAlloc aligns
_SHAPES = 16  # that a part keeps a context and a graph for
_TRIES = 2  # to capture a graph: what another thread does may end a capture
_LOCK = threading.RLock()  # of what all segmenters of a process share
_NO_PLUGIN = re.compile(r"plugin.*not found|(could not|cannot) find plugin", re.I | re.S)

Shapes = tuple[tuple[int, ...], ...]


def tensorrt() -> tuple[Any, Any]:
    """The module and this process's logger, which keeps warnings and errors for our own.

    Raises BackendError ``backend-missing``.
    """
    with _LOCK:  # TensorRT keeps the first logger: there must not be two
        return _opened()


@functools.cache
def _opened() -> tuple[Any, Any]:
    trt = open_tensorrt()
    logger = new_log(trt)
    trt.init_libnvinfer_plugins(logger, "")
    return trt, logger


def this_target() -> Target:
    """What engines that run here are bound to; raises BackendError without TensorRT or a GPU."""
    return target_for(tensorrt()[0].__version__)


class TensorRTBackend:
    """The engines of one plan of a bundle, on the first device.

    trusted: do not try engines in a child process first (the child itself says so).
    Raises EngineError ``engine-missing``, ``engine-target``, ``engine-damaged``, ``engine-crash``;
    BackendError ``backend-missing``, ``cuda-missing``.
    """

    name = "tensorrt"

    def __init__(self, bundle: Bundle, plan: str, *, trusted: bool = False) -> None:
        self._engines = find_engines(bundle, plan, this_target())
        self._bundle = bundle
        if not trusted:
            trim()  # the child needs room, too
            probe.require(bundle.path, plan, self._engines.record.digest)
        self._cuda = Cuda()
        self._scratch = _Scratch(self._cuda)
        plugins = self._engines.record.plugins
        _load_plugins({self._engines.plugin(n): sha256 for n, sha256 in plugins.items()})
        self._made = {t.name for part in bundle.manifest.parts for t in part.outputs}

    def dialects(self, plan: str) -> Sequence[str]:
        """The one that the engines were built from; single parts may be of another."""
        return [self._engines.record.dialect]

    def load(self, graph: Path, part: PartSpec) -> TensorRTPart:
        """Deserialise the engine of a part and check it against the part's specification.

        The graph is that of the dialect or of another one, as the record says.
        """
        data = self._engines.read(part.name, self._engines.graph(self._bundle, part.name))
        spec = self._engines.record.parts[part.name]
        with self._cuda.current(f"load the part {part.name}"):
            versions = bool(self._engines.record.flags.get("versions"))
            engine = _deserialise(data, spec, host_code=versions)
            return TensorRTPart(self._cuda, self._scratch, engine, part, spec, self._made)


def open_part(
    data: bytes,
    spec: EngineSpec,
    part: PartSpec,
    made: set[str],
    *,
    plugins: Mapping[Path, str],
    host_code: bool,
) -> TensorRTPart:
    """An engine that no record names yet, for whoever built it; arguments as below."""
    _load_plugins(plugins)
    cuda = Cuda()
    with cuda.current(f"load the part {part.name}"):
        engine = _deserialise(data, spec, host_code=host_code)
        return TensorRTPart(cuda, _Scratch(cuda), engine, part, spec, made)


class TensorRTPart:
    """An engine with its tensors' places, contexts and graphs.

    made: names of tensors that parts give; all others come from the host.
    """

    def __init__(
        self,
        cuda: Cuda,
        scratch: _Scratch,
        engine: _Engine,
        part: PartSpec,
        spec: EngineSpec,
        made: set[str],
    ) -> None:
        _check(engine.engine, part, spec)
        self.largest = spec.profile[2]
        self._cuda, self._scratch, self._engine, self._name = cuda, scratch, engine, part.name
        named = {d for t in (*part.inputs, *part.outputs) for d in t.shape if isinstance(d, str)}
        sizes = {**dict.fromkeys(named, self.largest), **spec.largest}
        self._inputs = [Place(cuda, t, sizes, t.name not in made) for t in part.inputs]
        self._to_host = part.name == "mask"  # the last part; what the others give stays
        self._outputs = [Place(cuda, t, sizes, self._to_host) for t in part.outputs]
        self._held: OrderedDict[Shapes, _Ready] = OrderedDict()
        scratch.reserve(engine.scratch)

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[np.generic]]:
        """Outputs by name: arrays of the last part, device arrays of the others."""
        with self._cuda.current(f"run the part {self._name}"):
            shapes = tuple(place.write(inputs[place.name], self._name) for place in self._inputs)
            ready = self._ready(shapes)
            self._launch(ready)
            found = self._leave(ready.outputs) if not self._to_host else {}
            for place, shape in zip(self._outputs, ready.outputs, strict=True):
                if self._to_host:
                    place.fetch(shape)
            self._cuda.wait()
            if self._to_host:
                pairs = zip(self._outputs, ready.outputs, strict=True)
                found = {place.name: place.read(shape) for place, shape in pairs}
            if ready.graph is None and ready.tries < _TRIES:
                self._capture(ready)
        return found

    def again(self) -> None:
        """What ran last once more, on what still lies there: the engine's own share of a run."""
        ready = next(reversed(self._held.values()))
        with self._cuda.current(f"run the part {self._name} again"):
            self._launch(ready)
            self._cuda.wait()

    def _launch(self, ready: _Ready) -> None:
        if ready.graph is None:
            self._enqueue(ready.context)
        else:
            ready.graph.launch()

    def _ready(self, shapes: Shapes) -> _Ready:
        if shapes not in self._held:
            while len(self._held) >= _SHAPES:
                self._held.popitem(last=False)
            self._held[shapes] = self._prepare(shapes)
        self._held.move_to_end(shapes)
        return self._held[shapes]

    def _prepare(self, shapes: Shapes) -> _Ready:
        """A context of its own for these shapes."""
        context = self._engine.context()
        if context is None:
            trim()
            context = self._engine.context()
        if context is not None and context.active_optimization_profile < 0:
            # 8.6 lends a profile to one context only, unless it was built to share
            if context.set_optimization_profile_async(0, self._cuda.stream):
                self._cuda.wait()
            else:
                del context
                self._held.clear()
                context = self._engine.context()
        if context is None:
            raise _refused(self._name, "make an execution context")
        self._scratch.give(context)
        for place, shape in zip(self._inputs, shapes, strict=True):
            if not context.set_input_shape(place.name, shape):
                raise _refused(self._name, f"take {place.name} of shape {shape}")
        for place in (*self._inputs, *self._outputs):
            if not context.set_tensor_address(place.name, place.address):
                raise _refused(self._name, f"take the address of {place.name}")
        outputs = tuple(tuple(context.get_tensor_shape(p.name)) for p in self._outputs)
        if any(size < 0 for shape in outputs for size in shape):
            raise _refused(self._name, f"tell its outputs' shapes for {shapes}")
        return _Ready(context, outputs)

    def _enqueue(self, context: trt.IExecutionContext) -> None:
        if not context.execute_async_v3(self._cuda.stream):
            raise _refused(self._name, "run")

    def _capture(self, ready: _Ready) -> None:
        """A graph of what has just run; where that fails, runs stay as they are."""
        ready.tries += 1
        try:
            ready.graph = Graph(self._cuda.stream, lambda: self._enqueue(ready.context))
        except (BackendError, EngineError) as error:
            if ready.tries == _TRIES:
                message = f"the part {self._name} runs without a CUDA graph: {error.why}"
                warnings.warn(message, RefedgeWarning, stacklevel=3)

    def _leave(self, shapes: Shapes) -> dict[str, npt.NDArray[np.generic]]:
        """Outputs copied to device memory of their own, since the next run writes over them."""
        sizes = [p.nbytes(s) for p, s in zip(self._outputs, shapes, strict=True)]
        room = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
        block, offset, found = self._cuda.take(sum(room)), 0, {}
        for place, shape, size, step in zip(self._outputs, shapes, sizes, room, strict=True):
            self._cuda.copy(block.address + offset, place.address, size)
            array = DeviceArray(self._cuda, shape, place.dtype, ((block, offset, size),))
            found[place.name] = cast("npt.NDArray[np.generic]", array)  # numpy sees an array
            offset += step
        return found


@dataclass
class _Ready:
    """A context for one set of shapes, its outputs' shapes, and its graph."""

    context: trt.IExecutionContext
    outputs: Shapes
    graph: Graph | None = None
    tries: int = 0


class _Scratch:
    """Device memory in which all contexts of a backend compute, one after another."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._size = cuda, 0
        self._blocks: list[Block] = []  # contexts may still use the smaller ones

    def reserve(self, size: int) -> None:
        """At least so many bytes for contexts from now on."""
        if size > self._size or not self._blocks:
            self._size = max(size, _ALIGNED)
            self._blocks.append(self._cuda.take(self._size))

    def give(self, context: trt.IExecutionContext) -> None:
        address = self._blocks[-1].address
        if hasattr(context, "set_device_memory"):  # 10.1
            context.set_device_memory(address, self._size)
        else:
            context.device_memory = address


class _Engine:
    """A deserialised engine, and the runtime that must outlive it."""

    def __init__(self, runtime: trt.Runtime, engine: trt.ICudaEngine) -> None:
        self._runtime, self.engine = runtime, engine
        newer = hasattr(engine, "device_memory_size_v2")
        self.scratch = int(engine.device_memory_size_v2 if newer else engine.device_memory_size)

    def context(self) -> trt.IExecutionContext | None:
        """A new context without memory of its own, or None."""
        strategies = getattr(tensorrt()[0], "ExecutionContextAllocationStrategy", None)
        if strategies is None:  # 8.6
            return self.engine.create_execution_context_without_device_memory()
        return self.engine.create_execution_context(strategies.USER_MANAGED)


_engines: WeakValueDictionary[str, _Engine] = WeakValueDictionary()
_plugins: dict[str, Any] = {}  # SHA-256 to library; one that is loaded twice is refused


def _deserialise(data: bytes, spec: EngineSpec, *, host_code: bool) -> _Engine:
    """host_code: the engine was built for later versions too, and brings code of its own."""
    trt, logger = tensorrt()
    # 8.6 lends an engine's profile to one context only
    shared = hasattr(trt, "ExecutionContextAllocationStrategy")
    with _LOCK:
        held = _engines.get(spec.sha256) if shared else None
        if held is None:
            logger.take()
            runtime = new_runtime(trt, logger)
            runtime.engine_host_code_allowed = host_code
            engine = runtime.deserialize_cuda_engine(data)
            if engine is None:  # for want of memory, perhaps
                trim()
                engine = runtime.deserialize_cuda_engine(data)
            if engine is None:
                raise _not_loaded(trt, spec, logger.take())
            held = _engines[spec.sha256] = _Engine(runtime, engine)
        return held


def _not_loaded(trt: Any, spec: EngineSpec, why: str) -> EngineError:
    plugin = _NO_PLUGIN.search(why) is not None
    return EngineError(
        "engine-plugin" if plugin else "engine-refused",
        f"TensorRT {trt.__version__} cannot load {spec.file}",
        why=why,
        fix="build the engines again: refedge build"
        + (", so that the record names the plugin's library" if plugin else ""),
    )


def _load_plugins(libraries: Mapping[Path, str]) -> None:
    trt, logger = tensorrt()
    with _LOCK:
        for path, sha256 in libraries.items():
            if sha256 not in _plugins:
                logger.take()
                (_plugins[sha256],) = register(trt, {path: sha256}, logger.lines)


def _check(engine: trt.ICudaEngine, part: PartSpec, spec: EngineSpec) -> None:
    """The engine's tensors are those of the manifest; EngineError ``engine-io``.

    Sizes that TensorRT leaves open (-1) are checked when it runs.
    """
    inputs = {t.name for t in part.inputs}
    wanted = {t.name: t for t in (*part.inputs, *part.outputs)}
    mode = tensorrt()[0].TensorIOMode.INPUT
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    differ = wanted.keys() ^ set(names)
    for name in wanted.keys() & set(names):
        tensor, shape = wanted[name], tuple(engine.get_tensor_shape(name))
        same = (
            (engine.get_tensor_mode(name) == mode) == (name in inputs)
            and _DTYPES.get(engine.get_tensor_dtype(name).name) == tensor.dtype
            and len(shape) == len(tensor.shape)
            and all(
                isinstance(said, str) or found in (said, -1)
                for said, found in zip(tensor.shape, shape, strict=True)
            )
        )
        differ |= set() if same else {name}
    if differ:
        raise EngineError(
            "engine-io",
            f"{spec.file} does not have the tensors that the manifest lists",
            why=f"they differ in {', '.join(sorted(differ))}",
            fix="build the engines again: refedge build",
        )


def _refused(part: str, doing: str) -> EngineError:
    return EngineError(
        "engine-refused",
        f"the engine of the part {part!r} refuses to {doing}",
        why=tensorrt()[1].take(),
        fix="build the engines again: refedge build",
    )
