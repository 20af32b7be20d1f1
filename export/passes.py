"""A fused node as the chain of its passes, for TensorRT's ahead-of-time plugins.

Each of those launches one kernel, so that what the passes leave to each other becomes tensors of
the graph. ``../plugins/quick.py`` has the passes; tensors of one name there are the same tensor.
"""

from __future__ import annotations

import numpy as np
import onnx

from ..plugins.onnx_function import DOMAIN, PLUGIN
from ..plugins.quick import PASSES
from .graph import GraphIndex, attribute
from .rewrite import add, node_of, replace

_INPUTS = ("query", "keys", "values", "words", "first", "second")
_OUTPUTS = ("y", "relevance")


def split_passes(model: onnx.ModelProto) -> list[str]:
    """Replace every ``NormAttention`` of a type; in place. Names of the new nodes."""
    made = []
    for name in [n.name for n in model.graph.node if n.op_type.startswith("NormAttention_")]:
        index = GraphIndex(model)
        fused = next(n for n in index.nodes if n.name == name)
        tensors = dict(zip((*_INPUTS, *_OUTPUTS), (*fused.input, *fused.output), strict=True))
        epsilon = np.array([attribute(fused, "epsilon", 1e-5)], np.float32)
        tensors["epsilon"] = add(index, f"{name}/epsilon", epsilon)
        chain = []
        for kind, one in PASSES.items():
            for output in one.outputs:
                tensors.setdefault(output, f"{name}/{output}")
            inputs, outputs = ([tensors[t] for t in side] for side in (one.inputs, one.outputs))
            settings = {"domain": DOMAIN, "aot": 1, **PLUGIN}
            chain.append(node_of(fused, kind, inputs, outputs, f"{name}/{kind}", **settings))
        replace(index, fused, chain)
        made += [node.name for node in chain]
    return made
