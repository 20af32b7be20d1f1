"""Which backend runs a plan of a bundle here."""

from __future__ import annotations

import warnings

from ...errors import BackendError, EngineError, RefedgeWarning
from ..bundle import Bundle
from ..engine import FOLDER, RECORD
from .onnx_runtime import OnnxRuntimeBackend
from .protocol import Backend

BACKENDS = ("auto", "onnxruntime", "onnxruntime:cuda", "onnxruntime:tensorrt", "tensorrt")


def choose_backend(
    name: str, bundle: Bundle, plan: str, *, threads: int | None, dialect: str | None
) -> Backend:
    """The backend of that name; BackendError ``backend-unknown``.

    ``auto`` is TensorRT where the bundle has engines of the plan for this machine, else ONNX
    Runtime on the CPU. Engines for another machine are said to be there; a damaged one is an error.
    """
    if name not in BACKENDS:
        raise BackendError(
            "backend-unknown",
            f"there is no backend called {name!r}",
            why=f"this version of refedge has {', '.join(BACKENDS)}",
            fix="use backend='auto'",
        )
    if name == "tensorrt":
        return _tensorrt(bundle, plan)
    built = {file.parent.name for file in (bundle.path / FOLDER).glob(f"*/*/{RECORD}")}
    if name == "auto" and built and plan not in built and dialect is None:
        message = (
            f"{bundle.path.name} has engines of {', '.join(sorted(built))}, none of {plan}; "
            "ONNX Runtime runs instead"
        )
        warnings.warn(message, RefedgeWarning, stacklevel=4)
    if name == "auto" and plan in built and dialect is None:
        try:
            return _tensorrt(bundle, plan)
        except BackendError as error:
            if error.code not in ("backend-missing", "cuda-missing"):
                raise
        except EngineError as error:
            if error.code != "engine-target":
                raise
            message = f"{error.what} ({error.why}); ONNX Runtime runs instead. {error.fix}"
            warnings.warn(message, RefedgeWarning, stacklevel=4)
    return OnnxRuntimeBackend(threads, dialect, name.partition(":")[2] or "cpu")


def _tensorrt(bundle: Bundle, plan: str) -> Backend:
    from .tensorrt import TensorRTBackend

    return TensorRTBackend(bundle, plan)
