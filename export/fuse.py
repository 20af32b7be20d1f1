"""A folded block of attention to words as one node of domain ``refedge``, for TensorRT's plugin.

Only the gated form of SLViT has such a node so far, ``NormAttention``; inputs and outputs are those
of ``../plugins/reference.py``. What the node replaces is the folded block, so a block that was left
is folded first, without a look at its cost: a kernel has no small nodes to pay for. The functions
are not in the file, because TensorRT before 10.7 prefers them to a plugin;
``plugins.onnx_function`` has them for a runtime without it.
"""

from __future__ import annotations

import numpy as np
import onnx

from ..plugins.onnx_function import DOMAIN, node
from .graph import GraphIndex, attribute
from .rewrite import add, declare, node_of, replace, rewrite
from .words import Block, fold_words


def fuse(model: onnx.ModelProto) -> list[str]:
    """Replace every block that has a node; in place, before quantization. Names of the nodes."""
    if not any(n.op_type == "Softmax" for n in model.graph.node):
        return []
    fold_words({"mask": model}, _gated)
    made = []
    for name in [n.name for n in model.graph.node if n.op_type == "Tanh"]:
        index = GraphIndex(model)
        tanh = next(n for n in index.nodes if n.name == name)
        made += _norm_attention(index, tanh)
    if made:
        _tidy(model)
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return made


def _gated(block: Block) -> bool:
    return len(block.gates) == 1 and block.projection > 0


def _norm_attention(index: GraphIndex, tanh: onnx.NodeProto) -> list[str]:
    """Put the node in front of the product of gate and map; nothing where there is no block."""
    gate = _made(index, tanh.input[0], "Conv")
    relu = _made(index, gate.input[0] if gate else "", "Relu")
    wide = _through_layout(index, relu.input[0] if relu else "")
    thin = _made(index, wide.input[0] if wide else "", "MatMul")
    products = [r for r in index.readers[tanh.output[0]] if r.op_type == "Mul"]
    if gate is None or wide is None or thin is None or len(products) != 1 or len(gate.input) != 2:
        return []
    product = products[0]
    found = _through_layout(index, next((i for i in product.input if i != tanh.output[0]), ""))
    if found is None or found.input[1] != wide.input[1] or found.input[0] != thin.input[1]:
        return []
    columns = _made(index, found.input[0], "Div")
    centred = _made(index, found.input[1], "Sub")
    shifted = _made(index, columns.input[0] if columns else "", "Sub")
    softmax = _made(index, centred.input[0] if centred else "", "Softmax")
    where = _made(index, softmax.input[0] if softmax else "", "Where")
    valid = _made(index, where.input[0] if where else "", "Unsqueeze")
    scores = _made(index, where.input[1] if where else "", "MatMul")
    root = _made(index, columns.input[1] if columns else "", "Sqrt")
    safe = _made(index, root.input[0] if root else "", "Add")
    if softmax is None or shifted is None or valid is None or scores is None or safe is None:
        return []
    second = index.constant(gate.input[1]) if gate.input[1] in index.tensors else np.zeros(0)
    if thin.input[0] not in index.tensors or second.ndim != 4 or second.shape[2:] != (1, 1):
        return []
    stem = product.output[0]
    inputs = [scores.input[1], scores.input[0], shifted.input[0], valid.input[0], thin.input[0]]
    inputs.append(add(index, f"{stem}/second", second.reshape(second.shape[:2])))
    outputs = [f"{stem}/rows", f"{stem}/relevance"]
    epsilon = index.constant(safe.input[1]).item()
    name = f"{tanh.name.rsplit('/', 1)[0]}/NormAttention"
    made = node("NormAttention", inputs, outputs, name=name, epsilon=epsilon)
    made.metadata_props.extend(product.metadata_props)
    shape, rows = index.shape(stem) or (), index.shape(found.output[0]) or ()
    declare(index, outputs[0], found.output[0])
    declare(index, outputs[1], found.output[0], rows[2:])
    size = add(index, f"{stem}/map", np.array([-1, *shape[1:]], np.int64))
    back = node_of(product, "Reshape", [outputs[0], size], [stem], product.name)
    replace(index, product, [made, back])
    for reader in index.readers[softmax.output[0]]:
        if reader.op_type == "ReduceMax" and _over_words(index, reader):
            kept = attribute(reader, "keepdims", 1)
            axis = [reader.input[1]] if kept else []
            kind = "Unsqueeze" if kept else "Identity"
            replace(index, reader, [
                node_of(reader, kind, [outputs[1], *axis], reader.output, reader.name)
            ])  # fmt: skip
    return [name]


def _made(index: GraphIndex, name: str, kind: str) -> onnx.NodeProto | None:
    maker = index.maker.get(name)
    return maker if maker is not None and maker.op_type == kind else None


def _through_layout(index: GraphIndex, name: str) -> onnx.NodeProto | None:
    """The product behind a tensor, or behind the reshape that made it."""
    layout = _made(index, name, "Reshape")
    return _made(index, layout.input[0] if layout else name, "MatMul")


def _over_words(index: GraphIndex, reader: onnx.NodeProto) -> bool:
    axes = reader.input[1] if len(reader.input) > 1 else ""
    return axes in index.tensors and index.constant(axes).tolist() == [1]


def _tidy(model: onnx.ModelProto) -> None:
    """Drop what nobody reads any more, and put every node behind what it reads."""
    graph, makers = model.graph, GraphIndex(model).maker
    pending, read = [v.name for v in graph.output], set[str]()
    while pending:
        name = pending.pop()
        if name not in read:
            read.add(name)
            pending += makers[name].input if name in makers else []
    rest = [n for n in graph.node if read.intersection(n.output)]
    made = {o for n in rest for o in n.output}
    nodes: list[onnx.NodeProto] = []
    while rest:
        later: list[onnx.NodeProto] = []
        for item in rest:
            (later if made.intersection(item.input) else nodes).append(item)
            made.difference_update(() if later and later[-1] is item else item.output)
        rest = later
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    rewrite(model, ())
