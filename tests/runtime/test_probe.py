"""Engines are tried in a child process: real children, which end as engines make them end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from refedge.errors import BackendError, BundleError, EngineError, RefedgeError
from refedge.runtime.backends import probe

ERROR = {"code": "engine-refused", "what": "no", "why": "because", "fix": "so"}


def child(code: str, seconds: float = 60.0) -> None:
    probe.try_in_child([sys.executable, "-c", code], seconds)


def test_one_that_works() -> None:
    child("pass")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
        ("import sys; sys.exit('last words')", "ended with 1\nlast words"),
    ],
    ids=["signal", "exit"],
)
def test_one_that_crashes(code: str, why: str) -> None:
    with pytest.raises(EngineError) as caught:
        child(code)
    assert caught.value.code == "engine-crash"
    assert why in caught.value.why


def test_one_that_hangs() -> None:
    with pytest.raises(EngineError, match="crashed") as caught:
        child("import time; time.sleep(60)", seconds=0.2)
    assert "did not end within 0.2 s" in caught.value.why


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("engine-refused", EngineError),
        ("plugin-refused", EngineError),
        ("cuda-missing", BackendError),
    ],
)
def test_one_that_says_why(code: str, kind: type[RefedgeError]) -> None:
    said = json.dumps(ERROR | {"kind": kind.__name__, "code": code})
    with pytest.raises(kind) as caught:
        child(f"import sys; print('log'); print({said!r}); sys.exit(3)")
    assert (caught.value.code, caught.value.why) == (code, "because")


def test_the_child_reports_what_it_meets(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert probe.main(str(tmp_path), "fp16") == 3
    said = json.loads(capsys.readouterr().out)
    assert (said["kind"], said["code"]) == ("BundleError", "bundle-missing")


def test_the_child_finds_this_package(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        probe.try_in_child([sys.executable, "-m", probe.__name__, str(tmp_path), "fp16"])


def test_each_record_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tried: list[list[str]] = []
    monkeypatch.setattr(probe, "try_in_child", tried.append)
    for digest in ("a" * 64, "a" * 64, "b" * 64):
        probe.require(tmp_path, "fp16", digest)
    assert [command[2:] for command in tried] == [[probe.__name__, str(tmp_path), "fp16"]] * 2


def test_what_crashed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        with pytest.raises(BundleError):  # none is there
            probe.require(tmp_path, "fp16", "a" * 64)
