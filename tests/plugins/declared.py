"""What TensorRT's own ``tensorrt.plugin`` makes of ``plugins/quick.py``, as JSON on stdout.

    python declared.py '[{"B": 1, "N": 900, "C": 64, "T": 20, "H": 8, "D": 32, "W": 32, ...}, ...]'

Runs beside NVIDIA's bindings without a GPU. Registration, the reading of signatures, descriptors,
the arithmetic on shapes and the plugin class are theirs. Ours are what only a builder has:
expressions of dimensions, traced once with all lengths open and evaluated for every case, and,
where the library behind the bindings is empty, the registry.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import tensorrt_bindings as trt

sys.modules["tensorrt"] = trt

import tensorrt.plugin._tensor as tensors  # noqa: E402
from refedge.errors import EngineError  # noqa: E402
from refedge.plugins import quick  # noqa: E402

OPERATIONS: dict[Any, Callable[[int, int], int]] = {
    trt.DimensionOperation.SUM: lambda a, b: a + b,
    trt.DimensionOperation.SUB: lambda a, b: a - b,
    trt.DimensionOperation.PROD: lambda a, b: a * b,
    trt.DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
    trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
    trt.DimensionOperation.LESS: lambda a, b: int(a < b),
}


class Expression(trt.IDimensionExpr):  # type: ignore[misc]
    """A dimension as a function of the open lengths; a number where none is open."""

    value: Callable[[dict[str, int]], int]
    number: int | None = None

    def is_constant(self) -> bool:
        return self.number is not None

    def get_constant_value(self) -> int:
        assert self.number is not None
        return self.number


def expression(value: Callable[[dict[str, int]], int], number: int | None = None) -> Expression:
    made = Expression.__new__(Expression)  # the bindings have no constructor for it
    made.value, made.number = value, number
    return made


class Builder:
    """``IExprBuilder``; it lives while TensorRT asks for expressions, and no longer."""

    def __init__(self) -> None:
        self.alive = True

    def constant(self, number: int) -> Expression:
        assert self.alive, "TensorRT has ended this builder"
        return expression(lambda _: number, number)

    def operation(self, what: Any, first: Expression, second: Expression) -> Expression:
        assert self.alive, "TensorRT has ended this builder"
        run = OPERATIONS[what]
        return expression(lambda x: run(first.value(x), second.value(x)))


class Registry:
    """Stands in where the bindings have an empty library behind them."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


def written(symbol: Any) -> Expression:
    """In place of ``SymExprImpl``, whose expression cannot be read back."""
    assert isinstance(symbol, tensors.SymInt32)
    return symbol._expr  # type: ignore[no-any-return]


def description(kind: Any, rank: int) -> Any:
    made = trt.DynamicPluginTensorDesc()
    inner = trt.PluginTensorDesc()
    inner.dims, inner.type, inner.format = trt.Dims([-1] * rank), kind, trt.TensorFormat.LINEAR
    made.desc = inner
    return made


def of(tensor: str, kind: Any) -> Any:
    return {"words": trt.bool}.get(tensor, trt.float32 if tensor in quick.FLOAT32 else kind)


def declared(name: str, kind: Any, cases: list[dict[str, int]], known: dict[str, int]) -> Any:
    """One plugin from its creation to the kernel, in the order in which a builder asks."""
    one, builder = quick.PASSES[name], Builder()
    creator = trt.get_plugin_registry().get_creator(name, "1", "refedge")
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    fields, phase = trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD
    plugin = creator.create_plugin(name, "refedge", fields, phase, request)
    types = [of(tensor, kind) for tensor in one.inputs]
    made = plugin.get_output_data_types(types, [len(dims) for dims in one.inputs.values()])

    def symbol(letter: str) -> Expression:
        if letter in known:
            return builder.constant(known[letter])
        return expression(lambda x: x[letter])

    given = [[symbol(letter) for letter in dims] for dims in one.inputs.values()]
    shapes = plugin.get_output_shapes(given, [], builder)
    every = [*one.inputs.values(), *one.outputs.values()]
    all_types = [*types, *made]
    descriptions = [description(t, len(d)) for t, d in zip(all_types, every, strict=True)]
    count = len(types)
    offered = plugin.get_supported_format_combinations(descriptions, count)
    assert [d.type for d in offered] == all_types
    assert {d.format for d in offered} == {trt.TensorFormat.LINEAR}
    plugin = plugin.clone()
    plugin.configure_plugin(descriptions[:count], descriptions[count:])
    assert plugin.get_valid_tactics() == []
    plugin.set_tactic(0)
    launch, extra = SimpleNamespace(), Extra()
    plugin.get_launch_params(given, descriptions, count, launch, extra, builder)
    builder.alive = False
    plain = [d.desc for d in descriptions]
    entry, code = plugin.get_kernel(plain[:count], plain[count:])
    assert plugin.get_num_outputs() == len(one.outputs)
    return {
        "kernel": entry,
        "code": hashlib.sha256(code).hexdigest(),
        "types": [str(t) for t in made],
        "cases": [
            {
                "grid": [getattr(launch, f"grid_{axis}").value(x) for axis in "xyz"],
                "block": [getattr(launch, f"block_{axis}").value(x) for axis in "xyz"],
                "shared": launch.shared_mem.value(x),
                "integers": [e.value(x) for e in extra],
                "shapes": [[d.value(x) for d in shape] for shape in shapes],
            }
            for x in cases
        ],
    }


class Extra(list[Any]):
    """``ISymExprs``."""

    @property
    def nbSymExprs(self) -> int:  # noqa: N802
        return len(self)

    @nbSymExprs.setter
    def nbSymExprs(self, count: int) -> None:  # noqa: N802
        self[:] = [None] * count


def main(cases: list[dict[str, int]]) -> None:
    if trt.get_plugin_registry() is None:
        registry = Registry()
        trt.get_plugin_registry = lambda: registry
    trt.DimsExprs = lambda count: [None] * count
    tensors.SymExprImpl = written
    quick.register(trt, 87)
    kinds = (trt.float32, trt.float16, trt.bfloat16)
    found = {
        str(kind): {name: declared(name, kind, cases, {}) for name in quick.PASSES}
        for kind in kinds
    }
    # lengths that are known when an engine is built change nothing
    some = {letter: cases[0][letter] for letter in "CTHDWMK"}
    few = [x for x in cases if {**x, **some} == x]
    for name in quick.PASSES:
        closed = declared(name, trt.float16, few, some)["cases"]
        opened = found[str(trt.float16)][name]["cases"]
        assert closed == [c for c, x in zip(opened, cases, strict=True) if x in few]
    refused = [code_of({"C": 1025}), code_of({"T": 129}), code_of({"C": 1024, "T": 128})]
    print(json.dumps({"version": trt.__version__, "declared": found, "refused": refused}))


def code_of(known: dict[str, int]) -> str:
    """The error of lengths that are known when an engine is built."""
    try:
        declared("NormScores", trt.float16, [], known)
    except EngineError as error:
        return error.code
    return ""


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
