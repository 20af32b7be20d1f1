"""What of TensorRT is the builder's own: the dialect that a version reads, plugins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EngineError
from ..plugins.native import register


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


def load_plugins(trt: Any, logger: Any, libraries: Mapping[str, str]) -> None:
    """Load libraries (path to SHA-256) that register plugins; EngineError ``plugin-...``."""
    trt.init_libnvinfer_plugins(logger, "")
    register(trt, {Path(path): sha256 for path, sha256 in libraries.items()}, logger.lines)
