"""What is said of this machine: its GPU by a driver made of C for the test, the rest as it is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from refedge.cli import main
from refedge.engines import doctor as module
from refedge.engines.doctor import Check, doctor
from refedge.runtime.backends import cuda
from refedge.runtime.backends.cuda import Device


def test_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device", lambda: Device("NVIDIA H100 80GB", 90, "12.4", 1, False))
    monkeypatch.setattr(cuda.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cuda.platform, "system", lambda: "Linux")
    name = "trt10.3.0.30-sm90-nvidiah10080gb-cuda12.4-linux-x86_64"
    assert cuda.target_for("10.3.0.30").name == name


def found(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_the_doctor_lives_here() -> None:
    checks = found(doctor())
    for name in ("python", "numpy", "msgspec", "pillow", "cpu", "memory"):
        assert checks[name].state in ("ok", "note"), checks[name]
    assert {check.state for check in checks.values()} <= {"ok", "note", "missing"}


def test_the_doctor_survives_his_patients(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Check]:
        raise ValueError("of no use")

    monkeypatch.setattr(module, "_cpu", broken)
    assert found(doctor())["broken"].found.endswith("of no use")


def test_the_verb() -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "numpy" in result.output
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0
    assert {"name", "state", "found", "fix"} == set(json.loads(result.output)[0])


def test_jetpack_from_the_release_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "# R36 (release), REVISION: {}, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
    release = tmp_path / "nv_tegra_release"
    real = Path
    for revision, jetpack in (("4.3", "6.1 or 6.2"), ("3.0", "6.0"), ("9.9", "unknown")):
        release.write_text(text.format(revision))
        monkeypatch.setattr(
            module, "Path", lambda p: real(release) if "tegra" in p else real(tmp_path / "none")
        )
        (check,) = module._jetson()
        assert f"Jetson Linux 36.{revision}" in check.found
        assert jetpack in check.found


def test_the_power_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/sbin/nvpmodel")
    for said, state in (("NV Power Mode: 15W\n0\n", "ok"), ("needs root", "note")):
        done = SimpleNamespace(stdout=said)
        monkeypatch.setattr(module.subprocess, "run", lambda *a, done=done, **k: done)
        (check,) = module._power()
        assert check.state == state
        assert check.fix
    for fastest in ("MAXN", "MAXN_SUPER"):  # Orin Nano's, whose -m 0 is its slowest
        done = SimpleNamespace(stdout=f"NV Power Mode: {fastest}\n2\n")
        monkeypatch.setattr(module.subprocess, "run", lambda *a, done=done, **k: done)
        assert module._power()[0].fix == ""


def test_inspect_and_build_say_what_they_find(bundle: Path) -> None:
    runner = CliRunner()
    told = runner.invoke(main, ["inspect", str(bundle)])
    assert told.exit_code == 0
    assert "part mask: batch 1 to 16" in told.output
    found = json.loads(runner.invoke(main, ["inspect", str(bundle), "--json"]).output)
    assert [part["name"] for part in found["parts"]] == ["text", "mask"]
    printed = runner.invoke(main, ["build", str(bundle), "--print-trtexec", "--target", "11.4"])
    assert printed.exit_code == 0
    assert len(printed.output.splitlines()) == 2
    wrong = runner.invoke(main, ["build", str(bundle), "--print-trtexec", "--target", "orin"])
    assert wrong.exit_code == 2
    assert "engine-version" in wrong.output
