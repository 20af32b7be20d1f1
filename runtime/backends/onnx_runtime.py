"""ONNX Runtime, the embedded default: on the CPU, or by its CUDA and TensorRT providers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import BackendError, BundleError
from ..cpu import int8_dialects
from ..manifest import PartSpec
from .protocol import Arrays

# what each provider falls back on, as ONNX Runtime orders them
PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


class OnnxRuntimePart:
    """One session."""

    def __init__(self, graph: Path, part: PartSpec, threads: int | None, provider: str) -> None:
        ort = _import(provider)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        providers = [p for p in PROVIDERS[provider] if p in ort.get_available_providers()]
        try:
            self._session = ort.InferenceSession(str(graph), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this
            raise BackendError(
                "backend-refused",
                f"ONNX Runtime {ort.__version__} refuses {graph.name}",
                why=str(error).splitlines()[0],
                fix="export the model again with this version installed",
            ) from error
        if self._session.get_providers()[0] != PROVIDERS[provider][0]:
            raise _no_provider(provider, f"its libraries do not load; {graph.name} fell back on "
                               f"{self._session.get_providers()[0]}")  # fmt: skip
        self.largest = part.profile[2]
        self._outputs = [o.name for o in part.outputs]
        self._check(graph, part)

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[np.generic]]:
        """Outputs by name."""
        values = self._session.run(self._outputs, dict(inputs))
        return dict(zip(self._outputs, values, strict=True))

    def _check(self, graph: Path, part: PartSpec) -> None:
        takes = {i.name: (_DTYPES.get(i.type), tuple(i.shape)) for i in self._session.get_inputs()}
        gives = {o.name: (_DTYPES.get(o.type), tuple(o.shape)) for o in self._session.get_outputs()}
        for said, has in ((part.inputs, takes), (part.outputs, gives)):
            wanted = {t.name: (t.dtype, t.shape) for t in said}
            if wanted != has:
                differ = sorted(
                    n for n in wanted.keys() | has.keys() if wanted.get(n) != has.get(n)
                )
                raise BundleError(
                    "bundle-io",
                    f"{graph.name} does not have the tensors its manifest lists",
                    why=f"they differ in {', '.join(differ)}",
                    fix="export the model again",
                )


class OnnxRuntimeBackend:
    """ONNX Runtime.

    threads:  per operator; None for its own choice.
    dialect:  run this dialect (TensorRT's, say, to check what it computes) instead of the best.
    provider: ``cpu``, ``cuda`` or ``tensorrt``; BackendError ``backend-provider`` where this build
              of ONNX Runtime has it not.
    """

    def __init__(
        self, threads: int | None = None, dialect: str | None = None, provider: str = "cpu"
    ) -> None:
        self.name = "onnxruntime" if provider == "cpu" else f"onnxruntime:{provider}"
        self._threads, self._dialect, self._provider = threads, dialect, provider
        if provider != "cpu":
            _import(provider)

    def dialects(self, plan: str) -> Sequence[str]:
        """Dialects of a plan that run here, the best first; or the one that was asked for.

        On a GPU TensorRT's come first: they compute in float16, and their int8 is symmetric.
        """
        if self._dialect is not None:
            return [self._dialect]
        if self._provider != "cpu" and plan != "fp32":
            return ["trt10", "ort"]
        return ["ort"] if plan in ("fp32", "fp16") else int8_dialects()

    def load(self, graph: Path, part: PartSpec) -> OnnxRuntimePart:
        """Load one graph and check it against the part's specification."""
        return OnnxRuntimePart(graph, part, self._threads, self._provider)


def _import(provider: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "backend-missing",
            "ONNX Runtime is not installed",
            why=str(error),
            fix="pip install onnxruntime",
        ) from error
    if PROVIDERS[provider][0] not in onnxruntime.get_available_providers():
        raise _no_provider(provider, "it has " + ", ".join(onnxruntime.get_available_providers()))
    if provider != "cpu" and hasattr(onnxruntime, "preload_dlls"):  # 1.21: CUDA from torch's wheels
        onnxruntime.preload_dlls()
    return onnxruntime


def _no_provider(provider: str, why: str) -> BackendError:
    return BackendError(
        "backend-provider",
        f"this ONNX Runtime cannot use its provider {PROVIDERS[provider][0]}",
        why=why,
        fix="install onnxruntime-gpu for the CUDA that is here, in place of onnxruntime",
    )
