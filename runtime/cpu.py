"""What this processor can multiply: decides which int8 encoding runs on it."""

from __future__ import annotations

import platform
from pathlib import Path

# x86 instruction sets whose u8 x s8 products do not saturate at 16 bits
_EXACT = ("avx512_vnni", "avx_vnni", "amx_int8", "avx10_1")


def flags() -> frozenset[str]:
    """Instruction-set flags as Linux spells them; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(values.split())
    return frozenset()


def int8_dialects(found: frozenset[str] | None = None, machine: str | None = None) -> list[str]:
    """ONNX Runtime dialects of an int8 plan that compute exactly here, the best first.

    uint8 x int8 wherever the hardware has such a product (x86 with VNNI or AMX, Arm); elsewhere on
    x86 its kernels saturate, and uint8 x uint8 is slower but right.
    """
    found = flags() if found is None else found
    machine = platform.machine() if machine is None else machine
    if machine.lower() in ("aarch64", "arm64") or found.intersection(_EXACT):
        return ["ort", "ort-u8u8"]
    return ["ort-u8u8"]
