"""What this processor can multiply: decides which int8 encoding runs on it."""

from __future__ import annotations

import platform
from pathlib import Path

# x86 instruction sets whose u8 x s8 products do not saturate at 16 bits
_EXACT = ("avx512_vnni", "avx_vnni", "amx_int8", "avx10_1")


def processor() -> dict[str, str]:
    """What Linux says of the first processor; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def flags() -> frozenset[str]:
    """Instruction-set flags as Linux spells them; empty where the system does not say."""
    info = processor()
    return frozenset(info.get("flags", info.get("Features", "")).split())


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
