"""Smoke of TensorRT's builder: the forms that the models need and that are easily got wrong.

    python -m refedge.benchmarks.gpu.operators OUT.json [--dry]

One graph of opset 17: uint8 pixels, channels last (Cast, then Transpose), InstanceNormalization,
group norm as Reshape, InstanceNormalization, Reshape, int32 ids into Gather, boolean words into
Where, TopK and GatherElements; and the same with the layer norms that the dialect ``trt8`` has in
place of instance norms, since 8.6.0 makes a plugin of those, which needs cuDNN. For 8.6 the bars
are those of the second; how the first fares is recorded. ``operators.npz`` beside this file holds
inputs and what ONNX Runtime gave for them on a CPU; ``make`` writes all three where onnx is
installed. Engines are built in float32 and float16, run through the runtime's own buffers, and once
more as a CUDA graph.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime.files import write_json

HERE = Path(__file__).parent
DATA = HERE / "operators.npz"
INSTANCE, LAYER = "instance norms", "layer norms"
GRAPHS = {INSTANCE: HERE / "operators.onnx", LAYER: HERE / "operators-layer.onnx"}
SCHEMA = "refedge-gpu-operators-2"
# relative error in the 2-norm; float16 rounds a sum of 72 products and two norms
BARS = {"float32": 1e-4, "float16": 1e-2}

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
operators (uint8[1, 24, 24, 3] pixels, int32[1, 6] ids, bool[1, 6] words)
  => (float[1, 8, 24, 24] features, float[1, 8, 4] regions, float[1, 6, 8] text)
<float[8, 3, 3, 3] kernel, float[8] gain, float[8] shift, float[2] one, float[2] none,
 float[8, 1, 1] wide_gain, float[8, 1, 1] wide_shift, float[32, 8] table,
 int64[3] grouped = {1, 2, -1}, int64[4] whole = {1, 8, 24, 24}, int64[3] flat = {1, 8, 576},
 int64[1] four = {4}, int64[1] last = {2}, int64[1] channels = {1},
 int64[3] spread = {1, 8, 4}, float zero = {0}>
{
  floats = Cast <to = 1> (pixels)
  image = Transpose <perm = [0, 3, 1, 2]> (floats)
  local = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, kernel)
  normed = InstanceNormalization <epsilon = 0.00001> (local, gain, shift)
  bent = Relu (normed)
  groups = Reshape (bent, grouped)
  even = InstanceNormalization <epsilon = 0.00001> (groups, one, none)
  back = Reshape (even, whole)
  scaled = Mul (back, wide_gain)
  features = Add (scaled, wide_shift)
  rows = Reshape (features, flat)
  scores = ReduceSum <keepdims = 1> (rows, channels)
  best, where = TopK <axis = 2> (scores, four)
  index = Expand (where, spread)
  regions = GatherElements <axis = 2> (rows, index)
  vectors = Gather (table, ids)
  valid = Unsqueeze (words, last)
  text = Where (valid, vectors, zero)
}
"""


# layer norms over pixels in place of the two instance norms
LOWERED = (
    (
        "normed = InstanceNormalization <epsilon = 0.00001> (local, gain, shift)",
        "alike = LayerNormalization <axis = 2, epsilon = 0.00001> (local, ones, zeros)\n"
        "  sized = Mul (alike, first_gain)\n  normed = Add (sized, first_shift)",
    ),
    (
        "even = InstanceNormalization <epsilon = 0.00001> (groups, one, none)",
        "even = LayerNormalization <axis = 2, epsilon = 0.00001> (groups, wide_ones, wide_zeros)",
    ),
    (
        "float[8] gain, float[8] shift, float[2] one, float[2] none,",
        "float[8, 1, 1] first_gain, float[8, 1, 1] first_shift, float[24, 24] ones,\n"
        " float[24, 24] zeros, float[2304] wide_ones, float[2304] wide_zeros,",
    ),
)


def make(folder: Path) -> None:
    """Write the graphs and their references; needs onnx and ONNX Runtime.

    Of several seeds that one is taken whose regions are chosen by the widest margin.
    """
    drawn = [_draw(seed) for seed in range(40)]
    _, graphs, feeds, expected = max(drawn, key=lambda d: d[0])
    for name, raw in graphs.items():
        (folder / GRAPHS[name].name).write_bytes(raw)
    with (folder / DATA.name).open("wb") as file:
        np.savez_compressed(file, **feeds, **{f"expect_{n}": v for n, v in expected.items()})


def _draw(seed: int) -> tuple[float, dict[str, bytes], dict[str, Any], dict[str, Any]]:
    import onnxruntime

    rng = np.random.default_rng(seed)
    values = {
        "kernel": rng.normal(0, 0.02, (8, 3, 3, 3)),
        "gain": rng.uniform(0.5, 1.5, 8),
        "shift": rng.normal(0, 0.5, 8),
        "one": np.ones(2),
        "none": np.zeros(2),
        "wide_gain": rng.uniform(0.5, 1.5, (8, 1, 1)),
        "wide_shift": rng.normal(0, 0.5, (8, 1, 1)),
        "table": rng.normal(0, 1, (32, 8)),
    }
    lowered = TEXT
    for before, after in LOWERED:
        lowered = lowered.replace(before, after)
    shaped = {name: values[name].reshape(8, 1, 1) for name in ("gain", "shift")}
    plain = {"ones": np.ones((24, 24)), "zeros": np.zeros((24, 24)),
             "wide_ones": np.ones(2304), "wide_zeros": np.zeros(2304)}  # fmt: skip
    layer = {**values, **plain, "first_gain": shaped["gain"], "first_shift": shaped["shift"]}
    for name in ("gain", "shift", "one", "none"):
        del layer[name]
    graphs = {INSTANCE: _graph(TEXT, values), LAYER: _graph(lowered, layer)}
    feeds = {
        "pixels": rng.integers(0, 256, (1, 24, 24, 3), np.uint8),
        "ids": np.array([[3, 31, 0, 7, 1, 1]], np.int32),
        "words": np.array([[True, True, True, True, False, False]]),
    }
    session = onnxruntime.InferenceSession(graphs[INSTANCE], providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    expected = dict(zip(names, session.run(names, feeds), strict=True))
    scores = np.sort(expected["features"].sum(axis=1).ravel())[-5:]
    return float(np.diff(scores).min()), graphs, feeds, expected


def _graph(text: str, values: dict[str, npt.NDArray[Any]]) -> bytes:
    import onnx
    from onnx import numpy_helper, parser

    model = parser.parse_model(text)
    tensors = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in values.items()]
    kept = [t for t in model.graph.initializer if t.name not in values]
    del model.graph.initializer[:], model.graph.value_info[:]
    model.graph.initializer.extend([*kept, *tensors])
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def build(graph: Path, precision: str) -> bytes:
    """The engine as TensorRT writes it; 8.6 by flags, 10 and later as the graph is typed."""
    from ...runtime.backends.tensorrt import tensorrt

    trt, logger = tensorrt()
    flags = trt.NetworkDefinitionCreationFlag
    old = not hasattr(flags, "STRONGLY_TYPED")
    builder = trt.Builder(logger)
    flag = flags.EXPLICIT_BATCH if old else flags.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph.read_bytes()):
        raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    if old:
        own = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
        config.set_tactic_sources(sum(1 << int(s) for s in own))  # the kit stubs cuBLAS, cuDNN
        if precision == "float16":
            config.set_flag(trt.BuilderFlag.FP16)
    config.clear_flag(trt.BuilderFlag.TF32)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise RuntimeError(logger.take())
    return bytes(made)


def run(engine: bytes, data: dict[str, npt.NDArray[Any]]) -> list[dict[str, npt.NDArray[Any]]]:
    """Outputs of a plain run and of a CUDA graph of it; every output is poisoned before each."""
    from ...runtime.backends.cuda import Cuda, Graph
    from ...runtime.backends.tensorrt import tensorrt
    from ...runtime.backends.tensors import Place
    from ...runtime.manifest import TensorSpec

    trt, logger = tensorrt()
    cuda = Cuda()
    with cuda.current("run the operators"):
        runtime = trt.Runtime(logger)
        loaded = runtime.deserialize_cuda_engine(engine)
        context = None if loaded is None else loaded.create_execution_context()
        if context is None:
            raise RuntimeError(logger.take())
        names = [loaded.get_tensor_name(i) for i in range(loaded.num_io_tensors)]
        places = {}
        for name in names:
            array = data[name] if name in data else data[f"expect_{name}"]
            spec = TensorSpec(name, array.dtype.name, array.shape)
            places[name] = Place(cuda, spec, {}, host=True)
            if not context.set_tensor_address(name, places[name].address):
                raise RuntimeError(logger.take())
        outputs = [n for n in names if n not in data]

        def enqueue() -> None:
            if not context.execute_async_v3(cuda.stream):
                raise RuntimeError(logger.take())

        def round_of(launch: Any) -> dict[str, npt.NDArray[Any]]:
            for name in names:
                poison = np.full_like(data.get(f"expect_{name}", np.empty(0)), np.nan)
                places[name].write(data.get(name, poison), "operators")
            launch()
            for name in outputs:
                places[name].fetch(data[f"expect_{name}"].shape)
            cuda.wait()
            return {name: places[name].read(data[f"expect_{name}"].shape) for name in outputs}

        return [round_of(enqueue), round_of(Graph(cuda.stream, enqueue).launch)]


def compare(found: dict[str, npt.NDArray[Any]], data: dict[str, npt.NDArray[Any]]) -> float:
    """The largest relative error of an output in the 2-norm; infinite where it is not finite."""
    worst = 0.0
    for name, value in found.items():
        wanted = data[f"expect_{name}"].astype(np.float64)
        error = float(np.linalg.norm(value.astype(np.float64) - wanted) / np.linalg.norm(wanted))
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst


def main(out: str, *options: str) -> int:
    """Exit code 1 where a bar is missed; dry: the references alone, on ONNX Runtime."""
    with np.load(DATA) as file:
        data = dict(file)
    record: dict[str, Any] = {"schema": SCHEMA, "dry": "--dry" in options, "engines": {}}
    held = tuple(GRAPHS)
    if "--dry" in options:
        import onnxruntime

        for name, graph in GRAPHS.items():
            session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
            names = [o.name for o in session.get_outputs()]
            feeds = {i.name: data[i.name] for i in session.get_inputs()}
            error = compare(dict(zip(names, session.run(names, feeds), strict=True)), data)
            row = {"errors": [error], "bar": BARS["float32"]}
            record["engines"][f"onnxruntime, {name}"] = row
    else:
        from ...runtime.backends.tensorrt import this_target

        target = this_target()
        record["target"] = target.name
        held = (LAYER,) if target.tensorrt.startswith("8.") else held
        for name in sorted(GRAPHS, key=lambda n: n not in held):
            for precision, bar in BARS.items():
                record["engines"][f"{precision}, {name}"] = _measured(name, precision, bar, data)
                write_json(record, Path(out))
    missed = [
        what
        for what, row in record["engines"].items()
        if what.endswith(held) and not max(row.get("errors", [np.inf])) <= row["bar"]
    ]
    print(f"{len(record['engines'])} engines, missed: {', '.join(missed) or 'none'}")
    if "--dry" in options and not missed:
        write_json(record, Path(out))
    return int(bool(missed))


def _measured(name: str, precision: str, bar: float, data: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    try:
        engine = build(GRAPHS[name], precision)
        seconds = time.monotonic() - started
        errors = [compare(found, data) for found in run(engine, data)]
    except Exception as error:  # what TensorRT refuses is a result
        return {"error": str(error)[:1500] or type(error).__name__, "bar": bar}
    return {"build_s": seconds, "errors": errors, "bar": bar}


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written: what TensorRT does while a process ends says nothing of it
