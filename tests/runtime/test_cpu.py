from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from refedge.runtime import cpu
from refedge.runtime.backends.onnx_runtime import OnnxRuntimeBackend
from refedge.runtime.cpu import flags, int8_dialects

OLD_X86 = frozenset({"sse4_2", "avx", "avx2", "fma"})


@pytest.mark.parametrize(
    ("found", "machine", "first"),
    [
        (OLD_X86, "x86_64", "ort-u8u8"),
        (OLD_X86 | {"avx512f", "avx512bw"}, "x86_64", "ort-u8u8"),
        (OLD_X86 | {"avx512_vnni"}, "x86_64", "ort"),
        (OLD_X86 | {"avx_vnni"}, "AMD64", "ort"),
        (OLD_X86 | {"amx_int8"}, "x86_64", "ort"),
        (frozenset({"asimd"}), "aarch64", "ort"),
        (frozenset(), "arm64", "ort"),
        (frozenset(), "ARM64", "ort"),
        # where nothing is known, the slower and right one
        (frozenset(), "x86_64", "ort-u8u8"),
        (frozenset(), "riscv64", "ort-u8u8"),
    ],
)
def test_the_first_dialect(found: frozenset[str], machine: str, first: str) -> None:
    dialects = int8_dialects(found, machine)
    assert dialects[0] == first
    # u8 x u8 is right everywhere; u8 x s8 is never offered where it saturates
    assert "ort-u8u8" in dialects
    assert ("ort" in dialects) == (first == "ort")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\nbugs\t: x\n", {"avx2", "avx512_vnni"}),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", {"asimddp"}),
        ("vmx flags\t: vnmi\nflags\t: fpu\n", {"fpu"}),
        ("model name\t: something\n", set()),
        ("", set()),
    ],
)
def test_flags_as_linux_spells_them(
    text: str, found: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "Path", lambda _: tmp_path / "cpuinfo")
    assert found <= flags()
    assert "vnmi" not in flags()
    assert bool(flags()) == bool(found)


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "Path", lambda _: tmp_path / "nothing")
    assert flags() == frozenset()


@pytest.mark.parametrize("found", [OLD_X86, OLD_X86 | {"avx_vnni"}])
def test_the_backend_asks_the_processor(
    found: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: found)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    backend: Any = OnnxRuntimeBackend()
    assert backend.dialects("int8") == int8_dialects(found, "x86_64")
    for plan in ("fp32", "fp16"):
        assert backend.dialects(plan) == ["ort"]
    assert OnnxRuntimeBackend(dialect="trt8").dialects("int8") == ["trt8"]
