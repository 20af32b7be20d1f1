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
FLOAT32 = frozenset({"relevance", "means", "moments", "mean", "epsilon", "tops", "sums", "told"})
# as in kernels/call.h
_THREADS, _WARPS, _PIECE, _CHUNKS, _REACH, _ROOM, _SQUARE = 256, 8, 32, 128, 512, 32768, 32 * 33
_MOST = {
    "C": (1024, "channels"),
    "D": (1024, "channels"),
    "H": (1024, "heads"),
    "T": (128, "words"),
}

# A plain number among the dimensions would be a constant of an expression builder, which bindings
# before 10.15 ask after TensorRT has ended it: all follow from the inputs' lengths.
# By letter: B expressions, N pixels, C channels, T words, H heads, D channels of values; W words
# padded to 32, K weights of a strip of 32 pixels, S strips, P runs of strips of NormAttention, R of
# MutualAttention, M moments of a run, V two numbers a word; 1 is itself, in inputs alone.
# These are symbols of TensorRT's, or integers: + - * // < are there, with numbers on the right.
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
            found["V"] = found["T"] * 2
            found["W"] = _parts(found["T"], _PIECE) * _PIECE
            found["K"] = found["W"] * _PIECE
            found["M"] = _parts(found["T"] + found["T"] * (found["T"] + 1) // 2, 4) * 4
        if "N" in found:
            found["S"] = _parts(found["N"], _PIECE)
            found["R"] = _parts(found["S"], _WARPS)
        if "N" in found and "C" in found and "T" in found:
            each = _strips(found)
            turns = _parts(found["S"], each * _CHUNKS)
            found["P"] = _parts(found["S"], each * turns)
        return found


def _parts(whole: Any, part: Any) -> Any:
    return (whole + (part - 1)) // part


def _strips(x: Lengths) -> Any:
    """Strips of a block that reads them: 8, 4, 2, 1, and 1 where words are streamed."""
    more = (x["C"] < 65) * 4 + (x["C"] < 129) * 2 + (x["C"] < 385)
    return more * (x["T"] < 33) + 1


def _cross_attention(x: Lengths, size: int) -> Launch:
    return (x["S"], _parts(x["D"], _REACH), x["B"]), _ROOM


def _norm_scores(x: Lengths, size: int) -> Launch:
    means = (_strips(x) + 2) * x["W"] * 4
    return (x["P"], 1, x["B"]), means + _WARPS * _SQUARE * 4


def _norm_columns(x: Lengths, size: int) -> Launch:
    shared = x["M"] * 4 + x["W"] * (4 + _WARPS * 8) + _THREADS * 16
    return (_parts(x["C"], _PIECE), 1, x["B"]), shared


def _norm_thin(x: Lengths, size: int) -> Launch:
    return (_parts(x["C"], _PIECE), x["W"] // _PIECE, x["B"]), _ROOM


def _norm_output(x: Lengths, size: int) -> Launch:
    each = ((x["C"] < 129) * 2 + (x["C"] < 257)) * (x["T"] < 33) + 1
    grid = _parts(x["S"], each), _parts(x["C"], _REACH), x["B"]
    return grid, each * x["W"] * (_PIECE * size) + _ROOM


def _mutual_seen(x: Lengths, size: int) -> Launch:
    return (x["R"], x["H"] * (x["W"] // _PIECE), x["B"]), _ROOM + _WARPS * _PIECE * 8


def _mutual_pairs(x: Lengths, size: int) -> Launch:
    return (_parts(x["T"], _WARPS), x["H"], x["B"]), x["D"] * (_WARPS * 4)


def _mutual_product(x: Lengths, size: int) -> Launch:
    return (x["S"], x["W"] // _PIECE, x["B"]), _ROOM


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
            "CrossWhole": Pass(
                "quick_cross_attention",
                {"x": "BNC", "keys": "BCHT", "values": "BHTD", "words": "BT", "offset": "BHT"},
                "NCTHD",
                {"y": "BND"},
                _cross_attention,
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
                {"relevance": "BN", "weights": "BSK", "means": "BST", "moments": "BPM"},
                _norm_scores,
            ),
            "NormColumns": Pass(
                "quick_norm_columns",
                {"values": "BCT", "words": "BT", "moments": "BPM", "epsilon": "1",
                 "relevance": "BN"},
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
                {"weights": "BSK", "means": "BST", "mean": "BT", "columns": "BCW", "thin": "BCW",
                 "second": "CC", "relevance": "BN"},
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
                {"tops": "BHRV", "sums": "BHRTD"},
                _mutual_seen,
            ),
            "MutualPairs": Pass(
                "quick_mutual_pairs",
                {"values": "BHTD", "words": "BT", "tops": "BHRV", "sums": "BHRTD"},
                "RTHD",
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
