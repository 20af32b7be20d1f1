"""The ahead-of-time plugins: their PTX, their launches, their kernels, and TensorRT's own word."""

from __future__ import annotations

import ctypes
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from refedge.errors import EngineError
from refedge.plugins import compile as compiling
from refedge.plugins import native
from refedge.plugins.quick import CHAINS, FLOAT32, PASSES, register

from ..gpu.driver import Kernels
from .emulated import (
    BARS,
    OPERATORS,
    TYPES,
    Call,
    Feeds,
    Fences,
    Plan,
    emulate,
    from_bits,
    library,
    make,
    placed,
    run_pass,
    to_bits,
    wanted,
)

KERNELS = {f"{one.kernel}_{dtype}" for one in PASSES.values() for dtype in TYPES}
SIZES = [
    {"B": b, "N": n, "C": c, "T": t, "H": h, "D": d}
    for b, n in ((1, 1), (3, 64), (16, 900), (1, 8192), (2, 8193), (1, 14400), (1, 65535 * 64))
    for c, t, h, d in ((1, 1, 1, 1), (64, 20, 8, 32), (320, 32, 2, 65), (1024, 128, 1024, 1024),
                       (1000, 33, 5, 512))
]  # fmt: skip


@pytest.mark.parametrize("sm", [75, 80, 87, 120])
def test_a_kernel_is_a_module_of_its_own(sm: int) -> None:
    """With the arguments of its pass, for a driver of CUDA 12.5, and nothing left outside."""
    code = native.ptx(sm)
    assert set(code) == KERNELS
    for one in PASSES.values():
        arguments = ["u64"] * len(one.inputs) + ["u32"] * len(one.integers)
        arguments += ["u64"] * len(one.outputs)
        for dtype in TYPES:
            text = code[f"{one.kernel}_{dtype}"]
            assert re.findall(r"^\.visible \.entry (\w+)", text, re.M) == [f"{one.kernel}_{dtype}"]
            assert re.findall(r"\.param \.(\w+) ", text) == arguments
            assert re.findall(r"^\.version (.*)", text, re.M) == ["8.5"]
            assert re.findall(r"^\.target (.*)", text, re.M) == [f"sm_{max(75, min(sm, 80))}"]
            assert ".maxntid 256, 1, 1" in text
            assert set(re.findall(r"\b_Z\w+", text)) == {"_ZN7refedge6memoryE"}


def test_half_types_use_tensor_cores() -> None:
    for sm, dtypes in ((75, {"float16"}), (80, {"float16", "bfloat16"})):
        code = native.ptx(sm)
        found = {name.rsplit("_", 1)[1] for name, text in code.items() if "mma.sync" in text}
        assert found == dtypes


def test_ptx_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"7\.2"):
        native.ptx(72)
    copy = tmp_path / "kernels"
    shutil.copytree(compiling.KERNELS, copy)
    monkeypatch.setattr(native, "_TABLE", copy / "cubins.json")
    packed = copy / "cubins" / "compute_80.ptx.xz"
    packed.write_bytes(lzma.compress(lzma.decompress(packed.read_bytes()) + b" "))
    with pytest.raises(EngineError) as error:
        native.ptx(87)
    assert error.value.code == "plugin-kernels"
    assert native.ptx(75)


def test_a_tensorrt_without_such_plugins_is_refused() -> None:
    with pytest.raises(EngineError) as error:
        register(SimpleNamespace(__version__="10.3.0"), 87)
    assert error.value.code == "plugin-quick"


def lengths_of(x: dict[str, int]) -> dict[str, int]:
    """The letters that follow from B, N, C, T, H and D, as ``kernels/call.h`` has it."""
    sizes = {"batch": x["B"], "pixels": x["N"], "channels": x["C"], "words": x["T"]}
    call, plan = Call(**sizes, heads=1, width=1), Plan()
    library().refedge_plan(1, 0, ctypes.byref(call), ctypes.byref(plan))
    padded, strips = -(-x["T"] // 32) * 32, -(-x["N"] // 32)
    moments = -(-(x["T"] + x["T"] * (x["T"] + 1) // 2) // 4) * 4
    known = {"W": padded, "K": padded * 32, "S": strips, "R": -(-strips // 8), "P": call.chunks}
    return {**x, **known, "M": moments, "1": 1, "V": 2 * x["T"]}


def shapes_of(one: Any, x: dict[str, int]) -> dict[str, tuple[int, ...]]:
    known = lengths_of(x)
    return {n: tuple(known[letter] for letter in dims) for n, dims in one.inputs.items()}


def planned(operator: str, x: dict[str, int], dtype: str) -> list[tuple[list[int], int]]:
    """Grids and shared memory that ``kernels/call.h`` decides."""
    sizes = {"batch": x["B"], "pixels": x["N"], "words": x["T"], "channels": x["C"]}
    plan, heads = Plan(), operator != "NormAttention"
    call = Call(**sizes, heads=x["H"] if heads else 1, width=x["D"] if heads else 1)
    which = OPERATORS.index(operator), TYPES.index(dtype)
    count = library().refedge_plan(*which, ctypes.byref(call), ctypes.byref(plan))
    assert count == len(CHAINS[operator].passes)
    return [(list(launch.grid), launch.shared) for launch in plan.launch[:count]]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("operator", list(CHAINS))
def test_launches_are_those_of_the_library(operator: str, dtype: str) -> None:
    for x in SIZES:
        found = []
        for one in CHAINS[operator].passes.values():
            lengths = one.lengths(shapes_of(one, x))
            grid, shared = one.launch(lengths, 4 if dtype == "float32" else 2)
            found.append((list(grid), shared))
        assert found == planned(operator, x, dtype), x


def run(
    operator: str, feeds: Feeds, dtype: str, *, order: int = 0, shift: int = 0
) -> list[np.ndarray]:
    """The chain on this machine; TensorRT aligns what passes leave to each other."""
    chain, inner = CHAINS[operator], Fences()
    outer = Fences(shift)
    given = [v if v.dtype == bool else to_bits(v, dtype) for v in feeds]
    tensors = {n: placed(v, outer.place) for n, v in zip(chain.inputs, given, strict=True)}
    tensors["epsilon"] = np.float32([1e-5])

    def place(name: str, size: int, item: int) -> np.ndarray:
        return (outer if name in chain.outputs else inner).place(size, item)

    for one in chain.passes.values():
        tensors |= run_pass(one, tensors, dtype, place, order=order)
    outer.check()
    inner.check()
    return [from_bits(tensors[name]) for name in chain.outputs]


CASES = [
    (2, 100, 40, 20, 2, 24),
    (1, 3, 33, 1, 1, 33),
    (2, 65, 96, 32, 1, 72),
    (1, 9, 36, 33, 1, 16),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("operator", list(CHAINS))
@pytest.mark.parametrize("sizes", CASES)
def test_the_chain_computes_the_operator(operator: str, sizes: tuple[int, ...], dtype: str) -> None:
    """Against float64, and to the bit what the library's kernels give."""
    feeds = make(operator, sizes)
    for one, value, bits in zip(
        run(operator, feeds, dtype),
        wanted(operator, feeds, dtype),
        emulate(operator, feeds, dtype),
        strict=True,
    ):
        assert np.isfinite(one).all()
        scale = max(np.linalg.norm(value), 0.1 * value.size**0.5)
        assert np.linalg.norm(one - value) <= BARS[dtype] * scale
        np.testing.assert_array_equal(one, bits)


def test_moments_of_several_tiles_meet() -> None:
    feeds = make("NormAttention", (1, 8 * 32 * 130 + 5, 8, 3, 1, 1))
    value = wanted("NormAttention", feeds, "float32")[0]
    found = run("NormAttention", feeds, "float32")[0]
    assert np.linalg.norm(found - value) <= BARS["float32"] * np.linalg.norm(value)


class Emulated(Kernels):
    """The GPU checks' launcher, with this machine in the driver's place."""

    device = "cpu"

    def __init__(self) -> None:
        self.ptx = native.ptx(90)
        self.entries: list[bytes] = []

    def _stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p()

    def _call(self, name: str, *given: Any) -> None:
        if name == "cuModuleLoadData":
            assert given[1].endswith(b"}\n\0")
        elif name == "cuModuleGetFunction":
            assert f".entry {given[2].decode()}(" in self.ptx[given[2].decode()]
            self.entries.append(given[2])
            given[0]._obj.value = len(self.entries)
        else:
            function, x, y, z, threads, *_, shared, _, arguments, _ = given
            assert (name, threads) == ("cuLaunchKernel", 256)
            grid, entry = (ctypes.c_int * 3)(x, y, z), self.entries[function.value - 1]
            assert library().refedge_quick(entry, arguments, grid, shared, 0) == 0


@pytest.mark.parametrize("operator", list(CHAINS))
def test_the_checks_on_a_gpu_launch_the_chain_so(operator: str) -> None:
    feeds = make(operator, (2, 72, 40, 8, 2, 24))
    given = [torch.from_numpy(v) for v in feeds]
    given = [v if v.dtype == torch.bool else v.half() for v in given]
    run_there, found = Emulated().prepare_chain(operator, given)
    run_there()
    for one, other in zip(found, run(operator, feeds, "float16"), strict=True):
        np.testing.assert_array_equal(one.numpy(), other)


@pytest.mark.parametrize("options", [{"shift": 1}, {"order": 1}, {"order": 2}])
@pytest.mark.parametrize("operator", list(CHAINS))
def test_alignment_and_order_change_nothing(operator: str, options: dict[str, int]) -> None:
    feeds = make(operator, (2, 72, 40, 8, 2, 24))
    straight, found = run(operator, feeds, "float16"), run(operator, feeds, "float16", **options)
    for one, other in zip(found, straight, strict=True):
        np.testing.assert_array_equal(one, other)


BINDINGS = os.environ.get("REFEDGE_TENSORRT_BINDINGS", "")
LEAN = os.environ.get("REFEDGE_TENSORRT_LEAN", "")
FOUND = (
    sorted(p.parent.name for p in Path(BINDINGS).glob("*/tensorrt_bindings")) if BINDINGS else []
)
EMPTY = """
createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL
createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getBuilderPluginRegistry
getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins
"""


def libraries(folder: Path, version: str) -> Path:
    """What the bindings link: empty functions, in 11 in front of NVIDIA's own lean runtime."""
    major, lean = version.split(".")[0], Path(LEAN)
    names, links = EMPTY.split(), []
    if major == "11":
        names = [n for n in names if n not in ("createInferRuntime_INTERNAL", "getPluginRegistry")]
        names.remove("createInferRefitter_INTERNAL")
        links = ["-Wl,--no-as-needed", f"-L{lean.parent}", f"-l:{lean.name}"]
        links.append(f"-Wl,-rpath,{lean.parent}")
    source = "\n".join(f"void* {name}(void) {{ return 0; }}" for name in names)
    for stem in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        file = f"lib{stem}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", str(folder / file)]
        body = source if stem == "nvinfer" else ""
        subprocess.run([*command, "-x", "c", "-", *links], input=body, text=True, check=True)
    return folder


@pytest.mark.skipif(not FOUND, reason="TensorRT's bindings are not here: make plugins")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler for what the bindings link")
@pytest.mark.parametrize("version", FOUND)
def test_tensorrt_s_own_code_takes_the_plugins(version: str, tmp_path: Path) -> None:
    """Registered, described and launched for lengths that are open, by NVIDIA's ``plugin``."""
    if version.startswith("11") and not LEAN:
        pytest.skip("TensorRT's lean runtime is not here: make plugins")
    linked = {"LD_LIBRARY_PATH": str(libraries(tmp_path, version))}
    linked["PYTHONPATH"] = f"{Path(BINDINGS) / version}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("declared.py")),
         json.dumps([lengths_of(x) for x in SIZES])],
        env={**os.environ, **linked},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["version"].startswith(version)
    assert answer["refused"] == ["plugin-quick", "plugin-quick", ""]
    code = native.ptx(87)
    names = {"DataType.FLOAT": "float32", "DataType.HALF": "float16", "DataType.BF16": "bfloat16"}
    assert set(answer["declared"]) == set(names)
    for kind, dtype in names.items():
        for operator, chain in CHAINS.items():
            launches = [planned(operator, x, dtype) for x in SIZES]
            for i, (name, one) in enumerate(chain.passes.items()):
                said = answer["declared"][kind][name]
                assert said["kernel"] == f"{one.kernel}_{dtype}"
                assert said["code"] == hashlib.sha256(code[said["kernel"]].encode()).hexdigest()
                types = ["DataType.FLOAT" if tensor in FLOAT32 else kind for tensor in one.outputs]
                assert said["types"] == types
                for x, plans, case in zip(SIZES, launches, said["cases"], strict=True):
                    assert (case["grid"], case["shared"]) == plans[i]
                    assert case["block"] == [256, 1, 1]
                    lengths = one.lengths(shapes_of(one, x))
                    assert case["integers"] == [lengths[letter] for letter in one.integers]
                    made = [[lengths[letter] for letter in dims] for dims in one.outputs.values()]
                    assert case["shapes"] == made
