"""The operators as ahead-of-time plugins of TensorRT 10.9 and later: nothing to compile on a board.

Such a plugin is declared in Python while an engine is built and then lies in the engine, as PTX:
whoever runs that needs neither this module nor Python. It launches one kernel, has no workspace and
no numbers but integers that follow from shapes. So each pass of an operator is a plugin of its own
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
# float32 whatever the operator's type; words are boolean, all else is of that type
FLOAT32 = frozenset({"relevance", "weights", "moments", "mean", "epsilon", "tops", "sums", "told"})
_THREADS, _TILE, _GROUP, _CHUNKS = 256, 64, 32, 128  # as in kernels/call.h
_MOST = {
    "C": (1024, "channels"),
    "D": (1024, "channels"),
    "H": (1024, "heads"),
    "T": (128, "words"),
}

# By letter: B expressions, N pixels, C channels, T words, H heads, D channels of values; W words
# padded to 32, P tiles of pixels, M moments of a tile, Q words of all heads; digits are themselves.
# These are symbols of TensorRT's, or integers: nothing but + - * // is there.
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
        found["2"] = 2
        if "T" in found:
            found["W"] = _parts(found["T"], _GROUP) * _GROUP
            found["M"] = found["T"] + found["T"] * (found["T"] + 1) // 2
        if "N" in found:
            found["P"] = _parts(found["N"], _TILE)
        if "H" in found:
            found["Q"] = found["H"] * found["T"]
        return found


def _parts(whole: Any, part: Any) -> Any:
    return (whole + (part - 1)) // part


def _tile(rows: int, columns: int, size: int) -> int:
    return rows * (columns * size + 16)


def _by_word(size: int) -> int:
    depth = 128 // size
    return _tile(_GROUP, depth, size) + _tile(depth, _TILE, size)


def _by_pixel(size: int) -> int:
    depth = 128 // size
    return _tile(_TILE, depth, size) + _tile(depth, _GROUP, size)


def _cross_weights(x: Lengths, size: int) -> Launch:
    return (x["H"], x["P"], x["B"]), (x["W"] * 4 + 16) * _TILE + _by_pixel(size)


def _cross_output(x: Lengths, size: int) -> Launch:
    stages = _tile(_TILE, _GROUP, size) + _tile(_GROUP, _TILE, size)
    return (_parts(x["D"], _TILE), x["P"], x["B"]), stages + _tile(_TILE, _TILE, 4)


def _norm_scores(x: Lengths, size: int) -> Launch:
    chunks = _parts(x["P"], _parts(x["P"], _CHUNKS))
    return (chunks, 1, x["B"]), x["W"] * _tile(1, _TILE, 4) + x["T"] * 4 + _by_word(size)


def _norm_columns(x: Lengths, size: int) -> Launch:
    return (_parts(x["C"], _THREADS // 32), 1, x["B"]), (x["M"] + x["W"] * (_THREADS // 32)) * 4


def _norm_thin(x: Lengths, size: int) -> Launch:
    grid = _parts(x["C"], _TILE), x["W"] // _GROUP, x["B"]
    return grid, _by_pixel(size) + _tile(_TILE, _GROUP, 4)


def _norm_output(x: Lengths, size: int) -> Launch:
    depth = 128 // size
    stages = _tile(_TILE, depth, size) + _tile(_GROUP, _TILE, size) + _tile(depth, _TILE, size)
    return (_parts(x["C"], _TILE), x["P"], x["B"]), stages + _tile(_TILE, _TILE, 4)


def _mutual_seen(x: Lengths, size: int) -> Launch:
    stages = _tile(_GROUP, _TILE, 4) + _tile(_GROUP, _TILE, size) + _by_word(size)
    return (x["P"], x["H"] * (x["W"] // _GROUP), x["B"]), stages


def _mutual_pairs(x: Lengths, size: int) -> Launch:
    return (_parts(x["T"], _THREADS // 32), x["H"], x["B"]), x["D"] * (_THREADS // 32 * 4)


def _mutual_product(x: Lengths, size: int) -> Launch:
    grid = x["P"], x["W"] // _GROUP, x["B"]
    return grid, x["W"] * _tile(1, _TILE, 4) + _by_word(size)


@dataclass(frozen=True)
class Chain:
    """An operator of ``reference.py`` as passes. Tensors of one name are the same tensor."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    passes: Mapping[str, Pass]


CHAINS = {
    "CrossAttention": Chain(
        ("x", "keys", "values", "words", "offset"),
        ("y",),
        {
            "CrossWeights": Pass(
                "quick_cross_weights",
                {"x": "BNC", "keys": "BCHT", "words": "BT", "offset": "BHT"},
                "NCTH",
                {"shares": "BNQ"},
                _cross_weights,
            ),
            "CrossOutput": Pass(
                "quick_cross_output",
                {"shares": "BNQ", "values": "BHTD"},
                "NTHD",
                {"y": "BND"},
                _cross_output,
            ),
        },
    ),
    "NormAttention": Chain(
        ("query", "keys", "values", "words", "first", "second"),
        ("y", "relevance"),
        {
            "NormScores": Pass(
                "quick_norm_scores",
                {"query": "BCN", "keys": "BTC", "words": "BT"},
                "NCT",
                {"relevance": "BN", "weights": "BTN", "moments": "BPM"},
                _norm_scores,
            ),
            "NormColumns": Pass(
                "quick_norm_columns",
                {"values": "BCT", "words": "BT", "weights": "BTN", "moments": "BPM",
                 "epsilon": "1"},
                "NCT",
                {"columns": "BCW", "mean": "BT"},
                _norm_columns,
            ),
            "NormThin": Pass(
                "quick_norm_thin",
                {"first": "CC", "columns": "BCW"},
                "CW",
                {"thin": "BCW"},
                _norm_thin,
            ),
            "NormOutput": Pass(
                "quick_norm_output",
                {"weights": "BTN", "mean": "BT", "columns": "BCW", "thin": "BCW", "second": "CC"},
                "NCT",
                {"y": "BCN"},
                _norm_output,
            ),
        },
    ),
    "MutualAttention": Chain(
        ("keys", "values", "words", "seen_keys", "seen_values"),
        ("y", "told"),
        {
            "MutualSeen": Pass(
                "quick_mutual_seen",
                {"keys": "BHTD", "seen_keys": "BHDN", "seen_values": "BHND"},
                "NTHD",
                {"tops": "BHPT2", "sums": "BHPTD"},
                _mutual_seen,
            ),
            "MutualPairs": Pass(
                "quick_mutual_pairs",
                {"values": "BHTD", "words": "BT", "tops": "BHPT2", "sums": "BHPTD"},
                "PTHD",
                {"pairs": "BHTW"},
                _mutual_pairs,
            ),
            "MutualProduct": Pass(
                "quick_mutual_product",
                {"keys": "BHTD", "words": "BT", "seen_keys": "BHDN", "pairs": "BHTW"},
                "NTHD",
                {"y": "BTN", "told": "BTN"},
                _mutual_product,
            ),
        },
    ),
}  # fmt: skip
PASSES = {name: one for chain in CHAINS.values() for name, one in chain.passes.items()}


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
        for letter, (most, unit) in _MOST.items():
            if letter in found and found[letter].is_constant:
                _require(name, found[letter].constant_value(), most, unit)
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


def _require(name: str, length: int, most: int, unit: str) -> None:
    if length > most:
        raise EngineError(
            "plugin-quick",
            f"{name} cannot take {length} {unit}",
            why=f"its kernel takes up to {most}",
            fix="build without --quick",
        )
