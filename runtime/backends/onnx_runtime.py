"""ONNX Runtime, the embedded default."""

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

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


class OnnxRuntimePart:
    """One session."""

    def __init__(self, graph: Path, part: PartSpec, threads: int | None) -> None:
        ort = _import()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        try:
            self._session = ort.InferenceSession(
                str(graph), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this
            raise BackendError(
                "backend-refused",
                f"ONNX Runtime {ort.__version__} refuses {graph.name}",
                why=str(error).splitlines()[0],
                fix="export the model again with this version installed",
            ) from error
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
    """ONNX Runtime on the CPU.

    threads: per operator; None for its own choice.
    dialect: run this dialect (TensorRT's, say, to check what it computes) instead of the best.
    """

    name = "onnxruntime"

    def __init__(self, threads: int | None = None, dialect: str | None = None) -> None:
        self._threads = threads
        self._dialect = dialect

    def dialects(self, plan: str) -> Sequence[str]:
        """Dialects of a plan that run here, the best first; or the one that was asked for."""
        if self._dialect is not None:
            return [self._dialect]
        return ["ort"] if plan in ("fp32", "fp16") else int8_dialects()

    def load(self, graph: Path, part: PartSpec) -> OnnxRuntimePart:
        """Load one graph and check it against the part's specification."""
        return OnnxRuntimePart(graph, part, self._threads)


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "backend-missing",
            "ONNX Runtime is not installed",
            why=str(error),
            fix="pip install 'refedge[cpu]'",
        ) from error
    return onnxruntime
