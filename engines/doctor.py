"""What this machine has for refedge, what it lacks, and what mends it: ``refedge doctor``.

Nothing here raises: what cannot be found out is said to be so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import RefedgeError
from ..runtime.backends.bindings import open_tensorrt
from ..runtime.backends.cuda import device
from ..runtime.cpu import flags, int8_dialects, processor
from .tensorrt import dialect_of

_SECONDS = 5.0  # that a helper program may take
_CORE = ("numpy", "pillow", "tokenizers", "msgspec", "click", "rich")
_EXTRAS = {
    "onnxruntime": ("runs bundles on the CPU", "pip install onnxruntime"),
    "pycuda": ("runs engines", "pip install 'pycuda>=2024.1' (needs CUDA's headers and g++)"),
    "torch": ("exports models", "pip install torch transformers safetensors, on a workstation"),
    "onnx": ("exports and quantizes", "pip install onnx onnxscript, on a workstation"),
}
_RELEASE = re.compile(r"R(\d+)[^,]*, REVISION: ([\d.]+)")
_JETPACKS = {"36.2": "6.0 DP", "36.3": "6.0", "36.4": "6.1 or 6.2", "38": "7.0 or 7.1", "39": "7.2"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: ``state`` is ``ok``, ``missing`` or ``note``; fix may be ''."""

    name: str
    state: str
    found: str
    fix: str = ""


def doctor() -> list[Check]:
    """All checks, in the order in which they matter."""
    looks: list[Callable[[], list[Check]]] = [
        _system,
        _packages,
        _cpu,
        _memory,
        _gpu,
        _tensorrt,
        _jetson,
        _power,
    ]
    return [check for look in looks for check in _alive(look)]


def _alive(look: Callable[[], list[Check]]) -> list[Check]:
    """What a look finds; a doctor does not die of the patient."""
    try:
        return look()
    except Exception as error:
        return [Check(look.__name__.strip("_"), "note", f"cannot be found out: {error}")]


def _system() -> list[Check]:
    version = platform.python_version()
    where = f"{platform.system()} {platform.release()}, {platform.machine()}"
    return [Check("python", "ok", f"{version}, {where}")]


def _packages() -> list[Check]:
    checks = []
    for name in _CORE:
        found = _version(name)
        state = "ok" if found else "missing"
        checks.append(
            Check(name, state, found or "not installed", f"pip install {name}" * (not found))
        )
    for name, (use, fix) in _EXTRAS.items():
        found = _version(name)
        if found:
            checks.append(Check(name, "ok", found))
        else:
            checks.append(Check(name, "note", f"not installed; it {use}", fix))
    return checks


def _version(name: str) -> str:
    """The installed version of a distribution; '' where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed" if name != "pillow" and importlib.util.find_spec(name) else ""


def _cpu() -> list[Check]:
    info, known = processor(), flags()
    name = info.get("model name", info.get("Model", platform.machine()))
    wanted = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
    held = [flag for flag in wanted if flag in known]
    found = f"{name}; {', '.join(held) or 'no integer products'}"
    return [Check("cpu", "ok", f"{found}; int8 runs as {int8_dialects()[0]}")]


def _memory() -> list[Check]:
    text = Path("/proc/meminfo").read_text()
    sizes = {m[1]: int(m[2]) >> 10 for m in re.finditer(r"^(\w+):\s+(\d+) kB", text, re.M)}
    found = f"{sizes['MemTotal']} MiB, {sizes['MemAvailable']} free, {sizes['SwapTotal']} swap"
    low = sizes["MemAvailable"] + sizes["SwapFree"] < 4096
    fix = "before building engines: end other programs, or add swap; build with --workspace 512"
    return [Check("memory", "note" if low else "ok", found, fix if low else "")]


def _gpu() -> list[Check]:
    try:
        gpu = device()
    except RefedgeError as error:
        return [Check("gpu", "note", error.why, "only TensorRT needs one")]
    found = f"{gpu.name}, compute capability {gpu.sm / 10}, {gpu.memory >> 20} MiB"
    return [Check("gpu", "ok", found), Check("driver", "ok", f"runs CUDA up to {gpu.cuda}")]


def _tensorrt() -> list[Check]:
    try:
        trt = open_tensorrt()
        dialect = dialect_of(trt.__version__)
    except RefedgeError as error:
        return [Check("tensorrt", "note", error.why, error.fix)]
    found = f"{trt.__version__}, reads the dialect {dialect}"
    checks = [Check("tensorrt", "ok", found)]
    trtexec = shutil.which("trtexec") or shutil.which("trtexec", path="/usr/src/tensorrt/bin")
    if trtexec:
        checks.append(Check("trtexec", "ok", trtexec))
    return checks


def _jetson() -> list[Check]:
    release = Path("/etc/nv_tegra_release")
    if not release.is_file():
        return []
    text = release.read_text()
    found = _RELEASE.search(text)
    if found is None:
        return [Check("jetson", "note", text.splitlines()[0])]
    linux = f"{found[1]}.{found[2]}"
    jetpack = next((p for key, p in _JETPACKS.items() if f"{linux}.".startswith(f"{key}.")), "")
    board = Path("/proc/device-tree/model")
    name = board.read_text().strip("\x00 \n") if board.is_file() else "Jetson"
    said = f"JetPack {jetpack}" if jetpack else "unknown JetPack"
    return [Check("jetson", "ok", f"{name}, Jetson Linux {linux}, {said}")]


def _power() -> list[Check]:
    tool = shutil.which("nvpmodel")
    if tool is None:
        return []
    done = subprocess.run(
        [tool, "-q"], capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    found = re.search(r"NV Power Mode: (\S+)", done.stdout)
    if found is None:
        return [Check("power", "note", "nvpmodel does not say", "sudo nvpmodel -q")]
    fix = (
        ""
        if found[1].startswith("MAXN")
        else "for the shortest times the mode that /etc/nvpmodel.conf calls MAXN…: "
        "sudo nvpmodel -m ID; sudo jetson_clocks"
    )
    return [Check("power", "ok", f"mode {found[1]}", fix)]
