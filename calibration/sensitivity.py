"""Which nodes int8 hurts most, and which of them are cheap to leave in float.

Every node is quantized alone and the probabilities of the mask are compared with the float graph's,
on calibration samples: an error counts where it could flip a pixel. Errors add up nearly, since
each is small; so the nodes with the largest error per multiply-accumulate are left in float until a
share of the model's work is spent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from ..export.graph import GraphIndex
from ..export.qdq import write_qdq
from ..runtime.plan import PartPlan
from .statistics import Arrays

Node = tuple[str, str]  # part, name
Array = npt.NDArray[np.generic]


def node_errors(
    model: onnx.ModelProto,
    plan: PartPlan,
    inputs: Arrays,
    logits: Callable[[Arrays], Array],
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> dict[str, float]:
    """Mean squared error of the mask's probabilities, by the node that alone is in int8.

    logits: what becomes of a part's outputs further on; for the last part, its own output.
    """
    index = GraphIndex(model)
    nodes = {n.name: n for n in index.nodes}
    reference = _probabilities(logits(run_part(model, inputs)))

    def error(name: str) -> float:
        weight = index.weight_of(nodes[name])
        touched = {*nodes[name].input, *nodes[name].output}
        alone = replace(
            plan,
            int8=(name,),
            activations={t: s for t, s in plan.activations.items() if t in touched},
            stored=tuple(t for t in plan.stored if t in touched),
            weights={w: s for w, s in plan.weights.items() if w == weight},
        )
        quantized = write_qdq(model, alone, unsigned=True, stored=True)
        found = _probabilities(logits(run_part(quantized, inputs)))
        return float(((found - reference) ** 2).mean())

    # each run has one thread, so the result does not depend on how many go on at once
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = {name: pool.submit(error, name) for name in plan.int8}
        return {name: waiting[name].result() for name in progress(plan.int8)}


def _probabilities(logits: Array) -> npt.NDArray[np.floating]:
    clipped = np.clip(logits.astype(np.float32), -30.0, 30.0)
    return np.asarray(1.0 / (1.0 + np.exp(-clipped)))


def spared(
    work: Mapping[Node, int], errors: Mapping[Node, float], budget: float
) -> frozenset[Node]:
    """Nodes to leave in float: most error per multiply-accumulate first, up to a share of all.

    work: multiply-accumulates of every node with a constant weight, of all parts. Those that stay
    in float anyway, and have no error, are counted in the share.
    """
    total = sum(work.values())
    order = sorted(errors, key=lambda name: (-errors[name] / (work[name] + 1), name))
    chosen, spent = set(), sum(work[node] for node in work if node not in errors)
    for name in order:
        if spent + work[name] <= budget * total:
            chosen.add(name)
            spent += work[name]
    return frozenset(chosen)


def run_part(model: onnx.ModelProto, inputs: Arrays) -> Arrays:
    """Outputs of a part by name; ``inputs`` may hold more than it takes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    taken = {i.name: inputs[i.name] for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, taken), strict=True))
