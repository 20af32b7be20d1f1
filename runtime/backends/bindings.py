"""TensorRT's Python bindings: opened where they are needed, their log kept for our errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ...errors import BackendError

if TYPE_CHECKING:
    import tensorrt as trt

_KEPT = 200  # lines of TensorRT's log
_SAID = 4  # of them in an error


def open_tensorrt() -> Any:
    """The module ``tensorrt``; raises BackendError ``backend-missing`` where there is none."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:  # OSError: the bindings without their libraries
        raise BackendError(
            "backend-missing",
            "TensorRT cannot be imported",
            why=str(error),
            fix="Jetson: sudo apt install nvidia-jetpack, and a virtual environment with "
            "--system-site-packages; server: pip install tensorrt; then refedge doctor",
        ) from error
    return tensorrt


def new_log(trt: Any) -> Any:
    """A TensorRT logger that keeps warnings and errors in ``lines``: what 'None' means."""

    class Log(trt.ILogger):  # type: ignore[misc]  # its base is known at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            kept = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING)
            if severity in kept:
                self.lines.append(message.strip())
                del self.lines[:-_KEPT]

        def take(self) -> str:
            """The last words, once."""
            said = last_words(self.lines)
            self.lines.clear()
            return said

    return Log()


def new_runtime(trt: Any, logger: Any) -> trt.Runtime:
    """What loads engines; raises BackendError ``backend-refused``."""
    try:
        return trt.Runtime(logger)
    except TypeError as error:  # the bindings' word for a null pointer
        raise BackendError(
            "backend-refused",
            f"TensorRT {trt.__version__} cannot start here",
            why=last_words(logger.lines),
            fix="refedge doctor: the driver must be new enough for this TensorRT's CUDA, and the "
            "GPU free",
        ) from error


def last_words(lines: Iterable[str]) -> str:
    """The end of a log, in one line."""
    return " | ".join(list(lines)[-_SAID:]) or "TensorRT gave no message"
