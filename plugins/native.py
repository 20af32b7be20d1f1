"""The TensorRT plugins as a library: compile it on the board, verify it, register it.

The library is one C++ file around kernels that were compiled ahead of time, so a board needs g++
and the headers of its TensorRT, neither nvcc nor CUDA's headers. docs/plugins.md has the operators.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import EngineError, unwritable

_HERE = Path(__file__).parent
_TABLE = _HERE / "kernels" / "cubins.json"
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-s", "-fvisibility=hidden", "-fno-gnu-unique")
_OLDEST = (8, 6)
_ENTERS = "REFEDGE_PLUGINS_REGISTER"  # a library that is opened with it registers by itself, too


def build(folder: Path, headers: Path | None = None, compiler: str = "g++") -> Path:
    """Compile the library for the TensorRT whose headers are found; its path.

    folder: where it goes, as ``librefedge_plugins-<sha256, 16 digits>.so``.
    headers: folder with NvInferRuntime.h; default: where the system's packages put it.
    Raises EngineError: ``plugin-headers``, ``plugin-compiler``, ``plugin-kernels``; InputError.
    """
    include = _headers(headers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    with tempfile.TemporaryDirectory(dir=folder, prefix=".plugins.") as name:
        work = Path(name)
        lines = []
        for architecture, image in cubins().items():
            (work / f"{architecture}.cubin").write_bytes(image)
            lines.append(f'REFEDGE_CUBIN({architecture[3:]}, "{architecture}.cubin")\n')
        (work / "cubins.inc").write_text("".join(lines))
        command = [compiler, *_FLAGS, "-Wno-deprecated-declarations", "-I", str(_HERE / "cpp")]
        command += ["-I", str(include.resolve()), "-I", ".", "-o", "made.so"]
        command += [str(_HERE / "cpp" / "plugin.cpp"), "-ldl"]
        try:
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        except OSError as error:
            raise EngineError(
                "plugin-compiler",
                f"the compiler {compiler!r} cannot be run",
                why=error.strerror or str(error),
                fix="install g++, or name another compiler with --compiler",
            ) from error
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            raise EngineError(
                "plugin-compiler",
                f"{compiler!r} cannot compile the plugins against {include}",
                why=said[0],
                fix="use a g++ with C++17, and complete headers of TensorRT 8.6 or later",
            )
        digest = hashlib.sha256((work / "made.so").read_bytes()).hexdigest()
        library = folder / f"librefedge_plugins-{digest[:16]}.so"
        os.replace(work / "made.so", library)
    return library


def cubins() -> dict[str, bytes]:
    """The kernels' images by architecture, ``sm_87`` and so on, each checked by its SHA-256.

    Raises EngineError ``plugin-kernels`` for a missing or changed file.
    """
    recorded = json.loads(_TABLE.read_text())["cubins"]
    return {name: _unpacked(f"{name}.cubin", row["sha256"]) for name, row in recorded.items()}


def ptx(sm: int) -> dict[str, str]:
    """PTX of the ahead-of-time plugins' kernels by their names, each a module of its own.

    sm: compute capability times ten of the GPU that it is for. Raises EngineError
    ``plugin-kernels`` for one before 7.5, and for a missing or changed file.
    """
    recorded = json.loads(_TABLE.read_text())["ptx"]
    usable = [int(number) for number in recorded if int(number) <= sm]
    if not usable:
        raise EngineError(
            "plugin-kernels",
            f"there are no kernels for compute capability {sm / 10}",
            why=f"they are for {min(map(int, recorded)) / 10} and later",
            fix="build without the plugins",
        )
    target = max(usable)
    text = _unpacked(f"compute_{target}.ptx", recorded[str(target)]["sha256"]).decode()
    head = re.findall(r"^\.(?:version|target|address_size|extern) .*$", text, re.M)
    entries = re.finditer(r"^\.visible \.entry (\w+)\(.*?^}$", text, re.M | re.S)
    return {entry[1]: "\n".join([*head, entry[0], ""]) for entry in entries}


def _unpacked(name: str, sha256: str) -> bytes:
    path = _TABLE.parent / "cubins" / f"{name}.xz"
    try:
        image = lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise _damaged(path, str(error)) from error
    if hashlib.sha256(image).hexdigest() != sha256:
        raise _damaged(path, "its SHA-256 is not that of the table beside it")
    return image


def register(trt: Any, libraries: Mapping[Path, str], said: Iterable[str] = ()) -> list[Any]:
    """Load libraries into TensorRT's registry; their handles, to be kept as long as the engines.

    trt: the ``tensorrt`` module. libraries: path to SHA-256, which is checked before the file is
    loaded. said: the lines of the logger, for the message of a refusal.
    Raises EngineError: ``plugin-missing``, ``plugin-changed``, ``plugin-refused``.
    """
    handles = []
    for path, sha256 in libraries.items():
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise EngineError(
                "plugin-missing",
                f"the plugin library {path.name} cannot be read",
                why=error.strerror or str(error),
                fix="build it on this machine: refedge plugin build",
            ) from error
        if found != sha256:
            raise EngineError(
                "plugin-changed",
                f"the plugin library {path.name} is not the one that was recorded",
                why=f"its SHA-256 starts {found[:12]}, that of the record {sha256[:12]}",
                fix="build the engines again with the library that you want",
            )
        why, asked = "", os.environ.pop(_ENTERS, None)
        try:
            # 8.6 returns None for a library that it refuses, 10 raises
            handle = trt.get_plugin_registry().load_library(str(path.resolve()))
        except RuntimeError as error:
            handle, why = None, str(error)
        finally:
            if asked is not None:
                os.environ[_ENTERS] = asked
        if handle is None:
            raise EngineError(
                "plugin-refused",
                f"TensorRT {trt.__version__} cannot load the plugin library {path.name}",
                why=" | ".join([*said][-3:]) or why or "it gave no reason",
                fix="build it on this machine with its own TensorRT's headers: refedge plugin "
                "build; a process takes one such library, the same for all its engines",
            )
        handles.append(handle)
    return handles


def version_of(include: Path) -> tuple[int, ...]:
    """TensorRT's version by its headers; empty if they are not there."""
    try:
        text = (include / "NvInferVersion.h").read_text("utf-8", "replace")
    except OSError:
        return ()
    defined: dict[str, str] = dict(re.findall(r"^#define (\w+) (\w+)", text, re.M))
    numbers = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        value = defined.get(f"NV_TENSORRT_{part}", "")
        value = defined.get(value, value)  # 10.11 and later name the number once more
        if not value.isdigit():
            return ()
        numbers.append(int(value))
    return tuple(numbers)


def _headers(given: Path | None) -> Path:
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{os.uname().machine}-linux-gnu"
    usual = [Path("/usr/include") / multiarch, Path("/usr/include")]
    usual += [Path("/usr/local/tensorrt/include"), Path("/opt/tensorrt/include")]
    for folder in [given] if given else usual:
        version = version_of(folder)
        if version and (folder / "NvInferRuntime.h").exists():
            if version >= _OLDEST:
                return folder
            raise EngineError(
                "plugin-headers",
                f"{folder} holds the headers of TensorRT {'.'.join(map(str, version))}",
                why="the plugins are for 8.6 and later",
                fix="name a later version's headers with --headers",
            )
    raise EngineError(
        "plugin-headers",
        f"TensorRT's headers are not in {given}" if given else "TensorRT's headers were not found",
        why="NvInferRuntime.h and NvInferVersion.h are needed",
        fix="install libnvinfer-headers-dev, or name their folder with --headers",
    )


def _damaged(path: Path, why: str) -> EngineError:
    return EngineError(
        "plugin-kernels",
        f"the compiled kernels {path.name} cannot be used",
        why=why,
        fix="install refedge again; in a checkout: make cubins",
    )
