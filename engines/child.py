"""Building and timing in processes of their own: what ends those from outside becomes an error."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from ..errors import EngineError
from .part import PartResult, PartTask
from .race import RaceResult, RaceTask
from .refusals import no_memory

_LINES = 30  # of a process that died
_Answer = TypeVar("_Answer", PartResult, RaceResult)


def in_a_process(task: PartTask, say: Callable[[str], None]) -> PartResult:
    """Run ``part.py``; what ends that process from outside becomes an EngineError here."""
    return _alone("part", f"builder of the part {task.part!r}", task.part, task, PartResult, say)


def against_each_other(task: RaceTask, say: Callable[[str], None]) -> tuple[float, ...]:
    """Run ``race.py``, the same way."""
    name = task.part.name
    what = f"process that timed the engines of the part {name!r}"
    return _alone("race", what, name, task, RaceResult, say).milliseconds


def _alone(
    module: str,
    what: str,
    part: str,
    task: PartTask | RaceTask,
    kind: type[_Answer],
    say: Callable[[str], None],
) -> _Answer:
    folder = Path(tempfile.mkdtemp(prefix="refedge-build-"))
    try:
        asked, answer = folder / "task.json", folder / "result.json"
        asked.write_bytes(msgspec.json.encode(task))
        command = [sys.executable, "-m", f"refedge.engines.{module}", str(asked), str(answer)]
        lines: list[str] = []
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            close_fds=False,  # the lock goes along (``build.py``); nothing else is inheritable
        ) as process:
            for line in process.stdout or ():
                lines = [*lines[1 - _LINES :], line.rstrip()]
                say(line.rstrip())
        if process.returncode or not answer.is_file():
            raise _died(what, part, process.returncode, lines)
        result = msgspec.json.decode(answer.read_bytes(), type=kind)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if result.error is not None:
        code, text, why, fix = result.error
        raise EngineError(code, text, why=why, fix=fix)
    return result


def _died(what: str, part: str, status: int, lines: list[str]) -> EngineError:
    said = " | ".join(lines[-4:]) or "it said nothing"
    if status == -signal.SIGKILL:
        return no_memory(part, f"the system ended the {what} (SIGKILL); {said}")
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"exit code {status}"
    return EngineError(
        "engine-build",
        f"the {what} died",
        why=f"{name}; {said}",
        fix="try --level 1; if it stays, report it with TensorRT's version",
    )
