"""A fused node as the chain of its passes, for TensorRT's ahead-of-time plugins.

Each of those launches one kernel, so that what the passes leave to each other becomes tensors of
the graph. ``../plugins/quick.py`` has the passes; tensors of one name there are the same tensor.
"""

from __future__ import annotations

import numpy as np
import onnx

from ..plugins.onnx_function import DOMAIN, PLUGIN
from ..plugins.quick import CHAINS
from .graph import GraphIndex, attribute
from .rewrite import add, node_of, replace


def split_passes(model: onnx.ModelProto) -> list[str]:
    """Replace every fused node; in place. Names of the new nodes."""
    made = []
    for name in [n.name for n in model.graph.node if n.domain == DOMAIN]:
        index = GraphIndex(model)
        fused = next(n for n in index.nodes if n.name == name)
        chain = CHAINS[fused.op_type.rpartition("_")[0]]
        operands = (*chain.inputs, *chain.outputs)
        tensors = dict(zip(operands, (*fused.input, *fused.output), strict=True))
        if any("epsilon" in one.inputs for one in chain.passes.values()):
            epsilon = np.array([attribute(fused, "epsilon", 1e-5)], np.float32)
            tensors["epsilon"] = add(index, f"{name}/epsilon", epsilon)
        nodes = []
        for kind, one in chain.passes.items():
            for output in one.outputs:
                tensors.setdefault(output, f"{name}/{output}")
            inputs, outputs = ([tensors[t] for t in side] for side in (one.inputs, one.outputs))
            settings = {"domain": DOMAIN, "aot": 1, **PLUGIN}
            nodes.append(node_of(fused, kind, inputs, outputs, f"{name}/{kind}", **settings))
        replace(index, fused, nodes)
        made += [node.name for node in nodes]
    return made
