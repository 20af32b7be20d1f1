"""Which nodes int8 hurts most, and which of them are cheap to leave in float.

Every node is quantized alone and the outputs of its part are compared with the float graph's, on
calibration samples. Errors add up nearly, since each is small; so the nodes with the largest error
per multiply-accumulate are left in float until a share of the work is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from ..export.graph import GraphIndex
from ..export.qdq import write_qdq
from ..runtime.plan import PartPlan
from .placement import macs
from .statistics import Arrays

Outputs = Sequence[npt.NDArray[np.generic]]


def node_errors(
    model: onnx.ModelProto,
    plan: PartPlan,
    inputs: Arrays,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> dict[str, float]:
    """Mean squared error of a part's outputs over their variance, by the node that is in int8."""
    index = GraphIndex(model)
    nodes = {n.name: n for n in index.nodes}
    reference = _run(model, inputs)
    errors = {}
    for name in progress(plan.int8):
        weight = index.weight_of(nodes[name])
        touched = {*nodes[name].input, *nodes[name].output}
        alone = replace(
            plan,
            int8=(name,),
            activations={t: s for t, s in plan.activations.items() if t in touched},
            stored=tuple(t for t in plan.stored if t in touched),
            weights={w: s for w, s in plan.weights.items() if w == weight},
        )
        found = _run(write_qdq(model, alone, unsigned=True, stored=True), inputs)
        errors[name] = _error(reference, found)
    return errors


def spared(index: GraphIndex, errors: Mapping[str, float], budget: float) -> frozenset[str]:
    """Nodes to leave in float: most error per multiply-accumulate first, up to a share of all."""
    nodes = {n.name: n for n in index.nodes}
    total = sum(macs(index, n) for n in index.nodes if index.weight_of(n) is not None)
    cost = {name: macs(index, nodes[name]) for name in errors}
    order = sorted(errors, key=lambda name: (-errors[name] / (cost[name] + 1), name))
    chosen, spent = set(), 0
    for name in order:
        if spent + cost[name] <= budget * total:
            chosen.add(name)
            spent += cost[name]
    return frozenset(chosen)


def _run(model: onnx.ModelProto, inputs: Arrays) -> Outputs:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    taken = {i.name: inputs[i.name] for i in session.get_inputs()}
    outputs: Outputs = session.run(None, taken)
    return outputs


def _error(reference: Outputs, found: Outputs) -> float:
    ratios = [
        float(((a - b) ** 2).mean() / max(float(a.var()), 1e-12))
        for a, b in zip(
            (np.asarray(r, np.float64) for r in reference),
            (np.asarray(f, np.float64) for f in found),
            strict=True,
        )
    ]
    return float(np.mean(ratios))
