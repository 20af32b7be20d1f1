"""Parity: torch, the canonical graph and every dialect on the same inputs, measured.

The canonical graph runs on ONNX Runtime with all optimisations off, so that the graph itself is
judged; a dialect runs as it will run for the user. A bundle whose parity misses a bar is not
written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from ..errors import ExportError
from ..models.examples import host_inputs, steps
from ..models.parts import Network
from ..runtime.backends.onnx_runtime import OnnxRuntimeBackend
from ..runtime.manifest import PartSpec
from ..runtime.masks import iou

Arrays = dict[str, npt.NDArray[np.generic]]

BATCHES = (1, 4)
SIGMA_BAR = 1e-3
IOU_BAR = 0.999


@dataclass(frozen=True)
class Agreement:
    """How far two sets of outputs are apart.

    sigma: largest absolute difference over the reference's standard deviation.
    iou:   of the masks logit > 0; None for outputs that are no logits.
    """

    sigma: float
    cosine: float
    iou: float | None


def compare(reference: Arrays, found: Arrays) -> Agreement:
    """The worst over all outputs."""
    sigma, cosine, overlap = 0.0, 1.0, None
    for name, value in reference.items():
        a, b = value.astype(np.float64), found[name].astype(np.float64)
        scale = max(float(a.std()), 1e-12)
        sigma = max(sigma, float(np.abs(a - b).max()) / scale)
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosine = min(cosine, float((a * b).sum()) / norms if norms else 1.0)
        if name == "logits":
            overlap = iou(a > 0, b > 0)
    return Agreement(sigma, cosine, overlap)


def measure(
    model: Network,
    specs: Sequence[PartSpec],
    canonical: Mapping[str, Path],
    dialects: Mapping[str, Mapping[str, Path]],
    seed: int = 0,
    moved: Set[str] = frozenset(),
) -> dict[str, Any]:
    """Parity of every part and of the whole, at every batch size; a record for the manifest.

    canonical, dialects: graph files by part name. moved: tensors between parts that carry something
    else than torch's, because the graphs were folded; a part that reads one gets the graphs' own.
    Raises ExportError where a bar is missed.
    """
    runners = {"canonical": _Plain(canonical, specs)}
    runners |= {
        name: _Plain(graphs, specs, OnnxRuntimeBackend()) for name, graphs in dialects.items()
    }
    record: dict[str, Any] = {
        "reference": f"torch {torch.__version__} eager float32 on the CPU",
        "seed": seed,
        "bars": {"sigma": SIGMA_BAR, "iou": IOU_BAR},
        "runs": {},
    }
    for batch in BATCHES:
        host = host_inputs(model, batch, seed)
        ran = {
            n: (_arrays(taken), _arrays(given)) for n, (taken, given) in steps(model, host).items()
        }
        inputs = _arrays(host)
        for name, runner in runners.items():
            row, own = {}, dict[str, Any]()
            for part, (taken, given) in ran.items():
                found = runner.run(part, {n: own.get(n, value) for n, value in taken.items()})
                own |= {n: value for n, value in found.items() if n in moved}
                same = {n: value for n, value in given.items() if n not in moved}
                row[part] = asdict(compare(same, found))
            whole = compare(ran["mask"][1], runner.chain(specs, inputs))
            row["end_to_end"] = asdict(whole)
            record["runs"][f"{name}, batch {batch}"] = row
            _require(name, batch, whole)
        margin = getattr(model, "selection_margin", None)
        if margin is not None:
            record.setdefault("topk_margin", {})[f"batch {batch}"] = margin(inputs)
    return record


class _Plain:
    """The graphs of one dialect, by part name; without a backend, ONNX Runtime unoptimised."""

    def __init__(
        self,
        graphs: Mapping[str, Path],
        specs: Sequence[PartSpec],
        backend: OnnxRuntimeBackend | None = None,
    ) -> None:
        self._parts: dict[str, Any] = {}
        for spec in specs:
            if backend is not None:
                self._parts[spec.name] = backend.load(graphs[spec.name], spec).run
                continue
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(
                str(graphs[spec.name]), options, providers=["CPUExecutionProvider"]
            )
            self._parts[spec.name] = _named(session, [o.name for o in spec.outputs])

    def run(self, part: str, inputs: Arrays) -> Arrays:
        outputs: Arrays = self._parts[part](inputs)
        return outputs

    def chain(self, parts: Sequence[PartSpec], inputs: Arrays) -> Arrays:
        """All parts, each fed by the host's inputs and by the parts before it."""
        known = dict(inputs)
        outputs: Arrays = {}
        for part in parts:
            outputs = self.run(part.name, {t.name: known[t.name] for t in part.inputs})
            known |= outputs
        return outputs


def _named(session: onnxruntime.InferenceSession, names: list[str]) -> Any:
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: t.contiguous().numpy() for name, t in tensors.items()}


def _require(name: str, batch: int, whole: Agreement) -> None:
    if whole.sigma <= SIGMA_BAR and (whole.iou is None or whole.iou >= IOU_BAR):
        return
    raise ExportError(
        "export-parity",
        f"{name} does not compute what the torch model computes (batch {batch})",
        why=f"logits differ by {whole.sigma:.2e} σ (bar {SIGMA_BAR:.0e}), "
        f"masks agree to {whole.iou:.4f} (bar {IOU_BAR})",
        fix="report this with the model: a pass or the exporter changed what is computed",
    )
