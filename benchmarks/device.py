"""The machine a number was measured on; goes into every result file."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..runtime.cpu import flags, processor

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")
_PACKAGES = ("refedge", "numpy", "onnxruntime", "torch")


def describe() -> dict[str, Any]:
    """Processor, the flags that decide int8 speed, cores, system, versions; no names, no paths."""
    found = flags()
    return {
        "cpu": processor().get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "flags": [f for f in _FLAGS if f in found],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: there for name in _PACKAGES if (there := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
