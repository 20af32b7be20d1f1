"""Does a table beat a Gelu between integers? Two exact forms on ONNX Runtime, in turns.

    python -m refedge.benchmarks.gelu -o benchmarks/results/gelu.json [--rounds 20]

Between two integer convolutions, an activation is DequantizeLinear, Gelu, QuantizeLinear: a
function of 256 values. ``table`` casts the bytes to indices and gathers from these 256; ONNX
Runtime has no operator that looks up bytes by bytes. Shapes are the feed-forward maps of SLViT at
paper size; one thread. Both forms give the same bytes, which is checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from ..runtime.files import write_json
from .device import describe
from .folding import in_turns, session_of

SCHEMA = "refedge-gelu-1"
SHAPES = ((512, 120, 120), (1024, 60, 60), (1280, 30, 30), (2048, 15, 15))
IN, OUT = np.float32(0.04), np.float32(0.03)  # scales
Bytes = npt.NDArray[np.uint8]
Run = Callable[[list[str], dict[str, Any]], list[npt.NDArray[Any]]]


def forms(shape: tuple[int, ...]) -> dict[str, bytes]:
    """Both graphs, from ``x`` to ``y``, uint8 [1, *shape], by name."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    zero = np.uint8(128)
    constants = {"in": IN, "out": OUT, "zero": zero}
    pieces = [
        helper.make_node("DequantizeLinear", ["x", "in", "zero"], ["real"]),
        helper.make_node("Gelu", ["real"], ["curved"]),
        helper.make_node("QuantizeLinear", ["curved", "out", "zero"], ["y"]),
    ]
    looked = [
        helper.make_node("Cast", ["x"], ["place"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "place"], ["y"]),
    ]

    def model(nodes: list[Any], size: tuple[int, ...], tensors: dict[str, Any]) -> bytes:
        graph = helper.make_graph(
            nodes,
            "gelu",
            [helper.make_tensor_value_info("x", TensorProto.UINT8, size)],
            [helper.make_tensor_value_info("y", TensorProto.UINT8, size)],
            [numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items()],
        )
        opsets = [onnx.helper.make_opsetid("", 20)]
        made = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return bytes(made.SerializeToString())

    every = np.arange(256, dtype=np.uint8)
    (table,) = session_of(model(pieces, (256,), constants), 1)(["y"], {"x": every})
    size = (1, *shape)
    return {
        "pieces": model(pieces, size, constants),
        "table": model(looked, size, {"table": table}),
    }


def measure(rounds: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> dict[str, Any]:
    """Everything; a record for the result file."""
    rows = []
    for shape in shapes:
        x = np.random.default_rng(0).integers(0, 256, (1, *shape), np.uint8)
        runs: dict[str, Run] = {n: session_of(raw, 1) for n, raw in forms(shape).items()}
        found = [run(["y"], {"x": x})[0] for run in runs.values()]
        times = in_turns({n: partial(run, ["y"], {"x": x}) for n, run in runs.items()}, rounds)
        rows.append({"shape": shape, "same": bool(np.array_equal(found[0], found[1])), "ms": times})
    return {
        "schema": SCHEMA,
        "threads": 1,
        "rounds": rounds,
        "load_average": list(os.getloadavg()),
        "device": describe(),
        "rows": rows,
    }


@click.command()
@click.option("-o", "output", type=click.Path(path_type=Path), required=True)
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True)
def main(output: Path, rounds: int) -> None:
    """Time both forms at every shape."""
    record = measure(rounds)
    write_json(record, output)
    for row in record["rows"]:
        pieces, table = (row["ms"][n]["cpu"]["median"] for n in ("pieces", "table"))
        click.echo(f"{row['shape']}: pieces {pieces:.2f} ms, table {table:.2f} ms")


if __name__ == "__main__":
    main()
