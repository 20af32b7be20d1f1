"""What the tests of every network ask of it."""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnxruntime
import torch
from refedge.calibration.placement import is_high
from refedge.export.dialects import WITH_PLUGIN, write_dialect
from refedge.export.from_torch import to_onnx
from refedge.export.fuse import fuse
from refedge.export.lint import require_clean
from refedge.export.parity import Agreement, compare
from refedge.export.targets import require_target
from refedge.models.examples import host_inputs, steps
from refedge.models.parts import HOST, Network, Part
from refedge.plugins.onnx_function import attach
from refedge.runtime.plan import PartPlan, Plan
from torch import Tensor


def inputs_of(model: Network, batch: int, seed: int) -> tuple[Tensor, ...]:
    """Pixels, ids, words and the index of pictures, as forward takes them."""
    host = host_inputs(model, batch, seed)
    return tuple(host[name] for name in HOST)


def taken_by(part: Part, batch: int, seed: int) -> tuple[Tensor, ...]:
    """What a part takes, in its order."""
    model = part.module.model
    assert isinstance(model, Network)
    return tuple(steps(model, host_inputs(model, batch, seed))[part.name][0].values())


def graphs_of(
    model: Network, only: Collection[str] = ()
) -> dict[str, onnxruntime.InferenceSession]:
    """A session per part (or some of them), of the linted canonical graph as it is written.

    Where attention to words can be one node, a session of that with its functions: ``mask fused``.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    found = {}
    for part in model.parts():
        if only and part.name not in only:
            continue
        graph = to_onnx(part)
        require_clean(graph)
        require_fit(graph, model.high)
        found[part.name] = onnxruntime.InferenceSession(graph.SerializeToString(), options)
        if part.name == "mask" and any(f.operator for f in fuse(graph)):
            whole = attach(graph).SerializeToString()
            found["mask fused"] = onnxruntime.InferenceSession(whole, options)
    return found


def require_fit(graph: onnx.ModelProto, high: tuple[str, ...]) -> None:
    """TensorRT's parsers, 8.6 and 10 to 11, take all of its operators, in the types they have."""
    names = tuple(node.name for node in graph.graph.node if is_high(node, high))
    for rest in ("fp32", "fp16"):
        for dialect in ("trt10", "trt8", *WITH_PLUGIN):
            plan = PartPlan("", high=names)
            written, *_ = write_dialect(graph, dialect, Plan("fp16", rest, {}), plan)
            require_target(written, dialect)


def compare_parts(
    model: Network, graphs: dict[str, onnxruntime.InferenceSession], batch: int, seed: int = 3
) -> dict[str, Agreement]:
    """How far each given part's graph is from torch, on what torch gave the part."""
    found = {}
    done = steps(model, host_inputs(model, batch, seed))
    for name in graphs:
        taken, given = done[name.removesuffix(" fused")]
        fed = {n: t.contiguous().numpy() for n, t in taken.items()}
        outputs = graphs[name].run(list(given), fed)
        wanted = {n: t.contiguous().numpy() for n, t in given.items()}
        found[name] = compare(wanted, dict(zip(given, outputs, strict=True)))
    return found


def with_other_padding(ids: Tensor, words: Tensor, other: int = 7) -> Tensor:
    """The same expressions with another id wherever there is no word."""
    changed = torch.where(words, ids, torch.full_like(ids, other))
    assert not torch.equal(ids, changed)
    return changed
