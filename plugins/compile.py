"""Compile the CUDA kernels to cubins, for whoever changes them: ``make cubins``.

CUDA 12.6's NVRTC for sm_75 to sm_90, because the drivers of JetPack 6 refuse images of CUDA 13;
CUDA 13's for sm_100, 110 and 120. Both come from the package index, and no GPU is needed. Those of
the ahead-of-time plugins become PTX of CUDA 12.6, which every later driver and GPU takes. Writes
``kernels/cubins/`` and ``kernels/cubins.json``, which ``native.py`` verifies by.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import lzma
import re
import subprocess
import tempfile
from importlib.metadata import files, version
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parent / "kernels"
TABLE = KERNELS / "cubins.json"
PAGE = KERNELS.parents[1] / "docs" / "plugins.md"
MARK = "<!-- resources: make cubins -->\n"
# architectures, and the packages whose NVRTC and headers compile for them
SETS = (
    (
        (75, 80, 86, 87, 89, 90),
        ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12", "nvidia-cuda-nvcc-cu12"),
    ),
    ((100, 110, 120), ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-crt")),
)
PTX = (75, 80)  # tensor cores take bfloat16 from 8.0 on
_ENTRY = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)


def source_hash() -> str:
    """SHA-256 of the kernels' source, all files by name."""
    digest = hashlib.sha256()
    for path in sorted(p for p in KERNELS.iterdir() if p.suffix in (".cu", ".h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compile_all() -> None:
    """Compile for every architecture and write cubins and table."""
    (KERNELS / "cubins").mkdir(exist_ok=True)
    cubins: dict[str, Any] = {}
    texts = {str(number): _text(number) for number in PTX}
    for architectures, packages in SETS:
        nvrtc, includes = _nvrtc(packages)
        for sm in architectures:
            image, ptx, log = _compile(nvrtc, includes, "kernels.cu", f"sm_{sm}")
            cubins[f"sm_{sm}"] = {
                **_written(f"sm_{sm}.cubin", image),
                "compiler": f"NVRTC {version(packages[0])}",
                "ptx": _version(ptx),
                "kernels": resources(log),
            }
    record = {"source": source_hash(), "shared": shared(), "cubins": cubins, "ptx": texts}
    TABLE.write_text(json.dumps(record, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(MARK)
    PAGE.write_text(before + MARK + table(record) + MARK + rest.partition(MARK)[2])


def shared() -> dict[str, list[int]]:
    """Shared memory of each kernel in bytes for up to 32 words: float32, and the half types."""
    source = """
#include <cstdio>
#include "call.h"
int main() {
  for (int op = 0; op < 3; ++op) {
    refedge::Call a{}, b{};
    a.batch = 1, a.pixels = 900, a.channels = 320, a.words = 20, a.heads = 8, a.width = 64;
    b = a;
    auto const p = refedge::plan(refedge::Operator(op), refedge::kFloat, a);
    auto const q = refedge::plan(refedge::Operator(op), refedge::kHalf, b);
    for (int i = 0; i < p.launches; ++i)
      std::printf("%s %d %d\\n", p.launch[i].kernel, p.launch[i].shared, q.launch[i].shared);
  }
}"""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "plan"
        command = ["g++", "-std=c++17", "-I", str(KERNELS), "-x", "c++", "-", "-o", str(program)]
        subprocess.run(command, input=source, text=True, check=True)
        said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in said.splitlines())
    return {name: [int(whole), int(half)] for name, whole, half in rows}


def table(record: dict[str, Any]) -> str:
    """The resources as a Markdown table: a row a kernel, a column an architecture."""
    architectures = list(record["cubins"])
    lines = ["| kernel | shared memory, KB | " + " | ".join(architectures) + " |"]
    lines.append("|---" * (len(architectures) + 2) + "|")
    for kernel, (whole, half) in record["shared"].items():
        cells = [f"`{kernel}`", f"{whole / 1024:.1f} / {half / 1024:.1f}"]
        for row in record["cubins"].values():
            used = [row["kernels"][f"{kernel}_{t}"] for t in ("float32", "float16", "bfloat16")]
            spilled = max(u["spilled"] for u in used)
            text = " / ".join(str(u["registers"]) for u in used)
            cells.append(text + (f" ({spilled} B spilled)" if spilled else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def resources(log: str) -> dict[str, dict[str, int]]:
    """Registers, spilled bytes and stack of each kernel from ptxas' report."""
    found = {
        name: {"registers": int(used), "spilled": int(stores) + int(loads), "stack": int(stack)}
        for name, stack, stores, loads, used in _ENTRY.findall(log)
    }
    return dict(sorted(found.items()))


def _nvrtc(packages: tuple[str, ...]) -> tuple[ctypes.CDLL, list[Path]]:
    """NVRTC of an installed package, and the folders with CUDA's headers."""
    found = [Path(str(f.locate())) for name in packages for f in files(name) or ()]
    (builtins,) = (p for p in found if p.name.startswith("libnvrtc-builtins.so"))
    ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)  # looked up by its name alone later
    (library,) = (p for p in found if re.fullmatch(r"libnvrtc\.so\.\d+", p.name))
    headers = [p.parent for p in found if p.name == "cuda_fp16.h"]
    headers += [p.parent.parent for p in found if p.parts[-2:] == ("crt", "mma.h")]
    return ctypes.CDLL(str(library)), headers


def _text(number: int) -> dict[str, Any]:
    """PTX of the ahead-of-time plugins' kernels; its row of the table."""
    packages = SETS[0][1]
    _, ptx, _ = _compile(*_nvrtc(packages), "quick.cu", f"compute_{number}")
    written = _written(f"compute_{number}.ptx", ptx)
    return {**written, "compiler": f"NVRTC {version(packages[0])}", "ptx": _version(ptx)}


def _written(name: str, image: bytes) -> dict[str, Any]:
    packed = lzma.compress(image, preset=9)
    (KERNELS / "cubins" / f"{name}.xz").write_bytes(packed)
    print(f"{name}: {len(image)} bytes, {len(packed)} packed")
    return {"sha256": hashlib.sha256(image).hexdigest(), "bytes": len(image)}


def _version(ptx: bytes) -> str:
    stated = re.search(rb"^\.version (\d+\.\d+)", ptx, re.M)
    return stated[1].decode() if stated else ""


def _compile(
    nvrtc: ctypes.CDLL, includes: list[Path], file: str, architecture: str
) -> tuple[bytes, bytes, str]:
    """Image (none for ``compute_80``), the PTX behind it, and ptxas' report."""
    heads = {p.name.encode(): p.read_bytes() for p in KERNELS.glob("*.h")}
    program, count = ctypes.c_void_p(), len(heads)
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v"]
    options += ["-default-device", *(f"-I{folder}" for folder in includes)]
    source = (KERNELS / file).read_bytes()
    names, texts = (ctypes.c_char_p * count)(*heads), (ctypes.c_char_p * count)(*heads.values())
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, file.encode(), count, texts, names)
    flags = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), flags)
    log = _read(nvrtc, program, "ProgramLog").decode()
    if failed:
        raise SystemExit(f"{architecture}: NVRTC returned {failed}\n{log}")
    image, ptx = _read(nvrtc, program, "CUBIN"), _read(nvrtc, program, "PTX").rstrip(b"\0")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return image, ptx, log


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(max(size.value, 1))
    nvrtc[f"nvrtcGet{what}"](program, buffer)
    return buffer.raw[: size.value]


if __name__ == "__main__":
    compile_all()
