"""Two forms of one computation on ONNX Runtime, in turns: which one a graph should hold.

    python -m refedge.benchmarks.forms -o benchmarks/results/forms.json [--rounds 20]

The forms that ``export/ort.py`` chooses between, what ``export/fold.py`` folds, and a form that
nobody takes, at the shapes of SLViT at paper size; one thread. The first form is the plain one.
Each pair computes the same: the largest difference between their outputs is recorded beside the
times.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from ..runtime.files import write_json
from .device import describe
from .folding import session_of
from .timing import clocked, summary

SCHEMA = "refedge-forms-1"
Values = dict[str, Any]  # arrays and scalars of numpy, by name


@dataclass(frozen=True)
class Pair:
    """One computation from inputs to ``y``, in two forms.

    forms:     bodies in ONNX's text format, by name.
    inputs:    an example of every input.
    constants: initializers that either form may read.
    """

    name: str
    forms: dict[str, str]
    inputs: Values
    constants: Values


def gelu(channels: int, height: int, width: int) -> Pair:
    """Between integers it is a function of 256 values; bytes are looked up by way of int32."""
    steps = {"in": np.float32(0.04), "out": np.float32(0.03), "zero": np.uint8(128)}
    every = np.arange(256, dtype=np.uint8)
    body = """real = DequantizeLinear(x, in, zero)
        curved = Gelu(real)
        y = QuantizeLinear(curved, out, zero)"""
    (table,) = _session(body, {"x": every}, steps)(["y"], {"x": every})
    shape = (1, channels, height, width)
    return Pair(
        f"gelu between integers [{channels}, {height}, {width}]",
        {"three nodes": body, "table": "at = Cast<to = 6>(x) y = Gather(table, at)"},
        {"x": np.random.default_rng(0).integers(0, 256, shape, np.uint8)},
        {**steps, "table": table},
    )


def upsampling(channels: int, small: tuple[int, ...], large: int) -> Pair:
    """A sum of square maps, each upsampled bilinearly, outside the blocked layout."""
    rng = np.random.default_rng(0)
    resized, wide = [], []
    constants: Values = {}
    for i, size in enumerate(small):
        resized.append(f'u{i} = Resize<mode = "linear">(x{i}, , by{i})')
        wide.append(f"w{i} = MatMul(x{i}, columns{i})")
        constants[f"by{i}"] = np.array([1, 1, large / size, large / size], np.float32)
        constants[f"columns{i}"] = np.ascontiguousarray(_shares(size, large).T)
    constants["rows"] = np.concatenate([_shares(size, large) for size in small], 1)
    names = [f"u{i}" for i in range(len(small))]
    stacked = f"all = Concat<axis = 2>({', '.join(f'w{i}' for i in range(len(small)))})"
    return Pair(
        f"sum of maps upsampled to [{channels}, {large}, {large}]",
        {
            "resize": "\n".join([*resized, f"y = Sum({', '.join(names)})"]),
            "products": "\n".join([*wide, stacked, "y = MatMul(rows, all)"]),
        },
        {
            f"x{i}": rng.normal(size=(1, channels, size, size)).astype(np.float32)
            for i, size in enumerate(small)
        },
        constants,
    )


def picture(size: int) -> Pair:
    """Its normalisation where the network goes on channels last."""
    scale, mean = np.float32(1 / 255), np.array([0.485, 0.456, 0.406], np.float32)
    return Pair(
        f"normalised picture [{size}, {size}, 3]",
        {
            "by pixels": "real = Cast<to = 1>(x) scaled = Mul(real, scale) y = Sub(scaled, mean)",
            "by rows": """flat = Reshape(x, rows)
                real = Cast<to = 1>(flat)
                scaled = Mul(real, scale)
                moved = Sub(scaled, means)
                y = Reshape(moved, pixels)""",
        },
        {"x": np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)},
        {
            "scale": scale,
            "mean": mean,
            "means": np.tile(mean, size),
            "rows": np.array([-1, size, 3 * size]),
            "pixels": np.array([-1, size, size, 3]),
        },
    )


def affine(channels: int, height: int, width: int) -> Pair:
    """A scale and a shift per channel, as behind a group norm."""
    rng = np.random.default_rng(0)
    scale, shift = rng.normal(size=(2, channels)).astype(np.float32)
    return Pair(
        f"scale and shift of [{channels}, {height}, {width}]",
        {
            "two passes": "scaled = Mul(x, scales) y = Add(scaled, shifts)",
            "one pass": "y = BatchNormalization<epsilon = 0.0>(x, scale, shift, none, one)",
        },
        {"x": rng.normal(size=(1, channels, height, width)).astype(np.float32)},
        {
            "scale": scale,
            "shift": shift,
            "scales": scale[:, None, None],
            "shifts": shift[:, None, None],
            "none": np.zeros(channels, np.float32),
            "one": np.ones(channels, np.float32),
        },
    )


def branch(channels: int, hidden: int, height: int, width: int) -> Pair:
    """A batch norm, two 1x1 convolutions and a layer scale, beside a shortcut."""
    rng = np.random.default_rng(0)
    scale, shift, layer = rng.normal(size=(3, channels)).astype(np.float32)
    wide = (rng.normal(size=(hidden, channels)) / channels**0.5).astype(np.float32)
    narrow = (rng.normal(size=(channels, hidden)) / hidden**0.5).astype(np.float32)
    first, second = (rng.normal(size=n).astype(np.float32) for n in (hidden, channels))
    return Pair(
        f"norm, layer scale of [{channels}, {height}, {width}], hidden {hidden}",
        {
            "apart": """normed = BatchNormalization<epsilon = 0.0>(x, scale, shift, none, one)
                opened = Conv(normed, wide, first) closed = Conv(opened, narrow, second)
                scaled = Mul(closed, layer) y = Add(x, scaled)""",
            "in the weights": """opened = Conv(x, wide_in, first_in)
                closed = Conv(opened, narrow_in, second_in) y = Add(x, closed)""",
        },
        {"x": rng.normal(size=(1, channels, height, width)).astype(np.float32)},
        {
            "scale": scale,
            "shift": shift,
            "none": np.zeros(channels, np.float32),
            "one": np.ones(channels, np.float32),
            "layer": layer[:, None, None],
            "wide": wide[..., None, None],
            "first": first,
            "narrow": narrow[..., None, None],
            "second": second,
            "wide_in": (wide * scale)[..., None, None],
            "first_in": first + wide @ shift,
            "narrow_in": (narrow * layer[:, None])[..., None, None],
            "second_in": second * layer,
        },
    )


def _shares(few: int, many: int) -> npt.NDArray[np.float32]:
    """What each of ``many`` pixels takes of each of ``few``, [many, few]: single pixels resized."""
    alone, by = np.eye(few, dtype=np.float32)[None, None], np.array([1, 1, 1, many / few])
    resize = _session('y = Resize<mode = "linear">(x, , by)', {"x": alone}, {"by": np.float32(by)})
    found: npt.NDArray[np.float32] = resize(["y"], {"x": alone})[0]
    return np.ascontiguousarray(found[0, 0].T)


def _session(body: str, inputs: Values, constants: Values) -> Any:
    from onnx import TensorProto, helper, numpy_helper, parser

    graph = parser.parse_graph(f"form () => () {{ {body} }}")
    for name, value in inputs.items():
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        graph.input.append(helper.make_tensor_value_info(name, kind, value.shape))
    last = TensorProto.UINT8 if "QuantizeLinear(" in body or "Gather" in body else TensorProto.FLOAT
    graph.output.append(helper.make_tensor_value_info("y", last, None))
    used = {name for node in graph.node for name in node.input}
    for name, value in constants.items():
        if name in used:
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return session_of(model.SerializeToString(), 1)


def measure(pairs: tuple[Pair, ...], rounds: int) -> list[dict[str, Any]]:
    """Times of both forms of every pair, and how far they are apart."""
    rows = []
    for pair in pairs:
        runs = {n: _session(body, pair.inputs, pair.constants) for n, body in pair.forms.items()}
        found = [run(["y"], pair.inputs)[0].astype(np.float64) for run in runs.values()]
        spent = clocked({n: partial(run, ["y"], pair.inputs) for n, run in runs.items()}, rounds)
        row = summary(spent)
        differ = float(np.abs(found[0] - found[1]).max())
        rows.append({"name": pair.name, "differ": differ, "ms": row})
    return rows


@click.command()
@click.option("-o", "output", type=click.Path(path_type=Path), required=True)
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True)
def main(output: Path, rounds: int) -> None:
    """Time both forms of every pair."""
    pairs = (
        upsampling(512, (15, 30, 60), 120),
        picture(480),
        affine(512, 120, 120),
        branch(64, 512, 120, 120),
        branch(320, 1280, 30, 30),
        gelu(512, 120, 120),
        gelu(1024, 60, 60),
        gelu(1280, 30, 30),
        gelu(2048, 15, 15),
    )
    rows = measure(pairs, rounds)
    record = {"schema": SCHEMA, "threads": 1, "rounds": rounds, "device": describe(), "rows": rows}
    write_json({**record, "load_average": list(os.getloadavg())}, output)
    for row in rows:
        times = (f"{form} {t['cpu']['median']:.2f} ms" for form, t in row["ms"].items())
        click.echo(f"{row['name']}: {', '.join(times)}")


if __name__ == "__main__":
    main()
