"""The system's TensorRT: opened where it is needed, its log kept for our errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import BackendError, EngineError
from ..plugins.native import register

_KEPT = 200  # lines of TensorRT's log
_SAID = 4  # of them in an error


def open_tensorrt() -> Any:
    """The module ``tensorrt``; raises BackendError ``backend-missing`` where there is none."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:  # OSError: the bindings without their libraries
        raise BackendError(
            "backend-missing",
            "TensorRT cannot be imported",
            why=str(error),
            fix="Jetson: sudo apt install nvidia-jetpack, and a virtual environment with "
            "--system-site-packages; server: pip install tensorrt; then refedge doctor",
        ) from error
    return tensorrt


def dialect_of(version: str) -> str:
    """The dialect that a TensorRT reads: ``trt8`` or ``trt10``; EngineError ``engine-version``."""
    found = re.match(r"(\d+)\.(\d+)", version)
    major, minor = (int(n) for n in found.groups()) if found else (0, 0)
    if (major, minor) == (8, 6):
        return "trt8"
    if (major, minor) >= (10, 3):
        return "trt10"
    raise EngineError(
        "engine-version",
        f"TensorRT {version} has no dialect",
        why="refedge writes graphs for 8.6 (trt8) and for 10.3 and later (trt10)",
        fix="install one of these: JetPack 6.0 has 8.6, JetPack 6.1 and 6.2 have 10.3",
    )


def new_log(trt: Any) -> Any:
    """A TensorRT logger that keeps warnings and errors in ``lines``: what 'None' means."""

    class Log(trt.ILogger):  # type: ignore[misc]  # its base is known at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            kept = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING)
            if severity in kept:
                self.lines.append(message.strip())
                del self.lines[:-_KEPT]

    return Log()


def last_words(lines: Iterable[str]) -> str:
    """The end of a log, in one line."""
    return " | ".join(list(lines)[-_SAID:]) or "TensorRT gave no message"


def load_plugins(trt: Any, logger: Any, libraries: Mapping[str, str]) -> None:
    """Load libraries (path to SHA-256) that register plugins; EngineError ``plugin-...``."""
    trt.init_libnvinfer_plugins(logger, "")
    register(trt, {Path(path): sha256 for path, sha256 in libraries.items()}, logger.lines)
