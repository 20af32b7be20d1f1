"""What is kept of TensorRT's log."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from refedge.errors import BackendError
from refedge.runtime.backends.bindings import new_log, open_tensorrt


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


def test_warnings_and_errors_are_kept_and_given_once() -> None:
    log = new_log(SimpleNamespace(ILogger=ILogger))
    lines = log.lines
    log.log(ILogger.INFO, "chatter")
    log.log(ILogger.ERROR, "  broken \n")
    assert log.take() == "broken"
    assert log.take() == "TensorRT gave no message"
    log.log(ILogger.WARNING, "odd")
    assert lines == ["odd"]  # whoever was handed the lines before sees what is said later


def test_no_tensorrt_is_said_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(BackendError) as caught:
        open_tensorrt()
    assert caught.value.code == "backend-missing"
