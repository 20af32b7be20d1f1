"""NormAttention as ahead-of-time plugins of TensorRT 10.9 and later: nothing to compile on a board.

Such a plugin is declared in Python while an engine is built and then lies in the engine, as PTX:
whoever runs that needs neither this module nor Python. It launches one kernel, has no workspace and
no numbers but integers that follow from shapes. So each pass of the operator is a plugin of its own
and what passes leave to each other are tensors; ``../export/passes.py`` writes such a chain.
The kernels are ``kernels/quick.cu``; docs/plugins.md tells what is known of the interface.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from types import GenericAlias
from typing import Any

from ..errors import EngineError
from .native import ptx

NAMESPACE = "refedge"
FLOAT32 = frozenset({"relevance", "weights", "moments", "mean", "epsilon"})  # in every type
_THREADS, _TILE, _GROUP, _CHUNKS = 256, 64, 32, 128  # as in kernels/call.h
_MOST = {"C": 1024, "T": 128}

# By letter: B expressions, N pixels, C channels, T words, W words padded to 32, P tiles of pixels,
# M moments of a tile. These are symbols of TensorRT's, or integers: nothing but + - * // is there.
Lengths = Mapping[str, Any]
Launch = tuple[tuple[Any, Any, Any], Any]  # grid, bytes of shared memory


@dataclass(frozen=True)
class Pass:
    """A plugin: one kernel, whose arguments are its inputs, integers and outputs in this order.

    inputs, outputs: tensors, with the letters of their dimensions.
    integers:        letters of lengths.
    launch:          grid and shared memory from all lengths and the bytes of an element.
    """

    kernel: str
    inputs: Mapping[str, str]
    integers: str
    outputs: Mapping[str, str]
    launch: Callable[[Lengths, int], Launch]

    def lengths(self, shapes: Mapping[str, Any]) -> Lengths:
        """What follows from the inputs' shapes."""
        found = {
            letter: shapes[name][axis]
            for name, letters in self.inputs.items()
            for axis, letter in enumerate(letters)
        }
        if "T" in found:
            found["W"] = _parts(found["T"], _GROUP) * _GROUP
            found["M"] = found["T"] + found["T"] * (found["T"] + 1) // 2
        if "N" in found:
            found["P"] = _parts(found["N"], _TILE)
        return found


def _parts(whole: Any, part: Any) -> Any:
    return (whole + (part - 1)) // part


def _tile(rows: int, columns: int, size: int) -> int:
    return rows * (columns * size + 16)


def _scores(x: Lengths, size: int) -> Launch:
    chunks = _parts(x["P"], _parts(x["P"], _CHUNKS))
    depth = 128 // size
    stages = _tile(_GROUP, depth, size) + _tile(depth, _TILE, size)
    return (chunks, 1, x["B"]), x["W"] * _tile(1, _TILE, 4) + x["T"] * 4 + stages


def _columns(x: Lengths, size: int) -> Launch:
    return (_parts(x["C"], _TILE), 1, x["B"]), (x["M"] + x["W"] * (_THREADS // 32)) * 4


def _thin(x: Lengths, size: int) -> Launch:
    depth = 128 // size
    stages = _tile(_TILE, depth, size) + _tile(depth, _GROUP, size)
    grid = _parts(x["C"], _TILE), x["W"] // _GROUP, x["B"]
    return grid, stages + _tile(_TILE, _GROUP, 4)


def _output(x: Lengths, size: int) -> Launch:
    depth = 128 // size
    stages = _tile(_TILE, depth, size) + _tile(_GROUP, _TILE, size) + _tile(depth, _TILE, size)
    return (_parts(x["C"], _TILE), x["P"], x["B"]), stages + _tile(_TILE, _TILE, 4)


# Tensors of one name are the same tensor: the operator's own are those of ``reference.py``.
PASSES = {
    "NormScores": Pass(
        "quick_scores",
        {"query": "BCN", "keys": "BTC", "words": "BT"},
        "NCT",
        {"relevance": "BN", "weights": "BTN", "moments": "BPM"},
        _scores,
    ),
    "NormColumns": Pass(
        "quick_columns",
        {"values": "BCT", "words": "BT", "weights": "BTN", "moments": "BPM", "epsilon": "1"},
        "NCT",
        {"columns": "BCW", "mean": "BT"},
        _columns,
    ),
    "NormThin": Pass("quick_thin", {"first": "CC", "columns": "BCW"}, "CW", {"thin": "BCW"}, _thin),
    "NormOutput": Pass(
        "quick_output",
        {"weights": "BTN", "mean": "BT", "columns": "BCW", "thin": "BCW", "second": "CC"},
        "NCT",
        {"y": "BCN"},
        _output,
    ),
}


def register(trt: Any, sm: int) -> None:
    """Declare the passes to TensorRT, before a graph with them is parsed; once per process.

    trt: the ``tensorrt`` module. sm: compute capability of the GPU that builds, times ten.
    Raises EngineError: ``plugin-quick``, ``plugin-kernels``.
    """
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise EngineError(
            "plugin-quick",
            f"TensorRT {trt.__version__} has no ahead-of-time plugins",
            why="they came with 10.9",
            fix="build the library instead: refedge plugin build, then refedge build --plugin",
        )
    import tensorrt.plugin as trtp

    code = ptx(sm)
    for name, one in PASSES.items():
        _declare(trt, trtp, name, one, code)


def _declare(trt: Any, trtp: Any, name: str, one: Pass, code: Mapping[str, str]) -> None:
    """TensorRT reads the functions' signatures, which are written here from the table."""
    suffix = {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}
    typed = next(i for i, n in enumerate(one.inputs) if n != "words" and n not in FLOAT32)
    count = len(one.inputs)

    def lengths(inputs: tuple[Any, ...]) -> Lengths:
        return one.lengths({n: i.shape_expr for n, i in zip(one.inputs, inputs, strict=True)})

    def describe(*inputs: Any) -> Any:
        found = lengths(inputs)
        return tuple(
            trtp.from_shape_expr(
                tuple(found[letter] for letter in letters),
                trt.float32 if tensor in FLOAT32 else inputs[typed].dtype,
            )
            for tensor, letters in one.outputs.items()
        )

    def compiled(*given: Any) -> Any:
        found, kind = lengths(given[:count]), given[typed].dtype
        for letter, most in _MOST.items():
            if letter in found and found[letter].is_constant:
                _require(name, letter, found[letter].constant_value(), most)
        grid, shared = one.launch(found, 4 if kind == trt.float32 else 2)
        entry = f"{one.kernel}_{suffix[kind]}"
        launch = trtp.KernelLaunchParams(*grid, block_x=_THREADS, shared_mem=shared)
        integers = [trtp.SymInt32(found[letter]) for letter in one.integers]
        return entry, code[entry], launch, trtp.SymIntExprs.from_tuple(integers)

    tensors = [_parameter(n, trtp.TensorDesc) for n in one.inputs]
    made = GenericAlias(tuple, (trtp.TensorDesc,) * len(one.outputs))
    what = GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs))
    given = [*tensors, _parameter("outputs"), _parameter("tactic")]
    _sign(describe, Signature(tensors, return_annotation=made))
    _sign(compiled, Signature(given, return_annotation=what))
    trtp.register(f"{NAMESPACE}::{name}")(describe)
    trtp.aot_impl(f"{NAMESPACE}::{name}")(compiled)


def _sign(function: Any, signature: Signature) -> None:
    function.__signature__ = signature


def _parameter(name: str, annotation: Any = Parameter.empty) -> Parameter:
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _require(name: str, letter: str, length: int, most: int) -> None:
    if length > most:
        raise EngineError(
            "plugin-quick",
            f"{name} cannot take {length} {'words' if letter == 'T' else 'channels'}",
            why=f"its kernel takes up to {most}",
            fix="build without --quick",
        )
