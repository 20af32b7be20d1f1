"""What the builder is at, in plain lines (TensorRT 10 and later)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt as trt

_SECONDS = 5.0  # between two lines


def new_progress(trt: Any, part: str, say: Callable[[str], None]) -> trt.IProgressMonitor:
    """A monitor that says which outermost phase the builder is in, and how far."""

    class Progress(trt.IProgressMonitor):  # type: ignore[misc]  # its base is known at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._said = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._steps[phase_name] = num_steps
                self._say(f"{part}: {phase_name}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps = self._steps.get(phase_name)
            if steps and time.monotonic() - self._said > _SECONDS:
                self._say(f"{part}: {phase_name}, {100 * (step + 1) // steps} %")
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def _say(self, line: str) -> None:
            self._said = time.monotonic()
            say(line)

    return Progress()
