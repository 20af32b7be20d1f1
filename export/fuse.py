"""Attention to words as one node of domain ``refedge``, for TensorRT's plugin.

Inputs and outputs are those of ``../plugins/reference.py``. ``NormAttention`` is SLViT's gated
block, ``CrossAttention`` that of several heads, ``MutualAttention`` M3Att's. What the first two
replace is the folded block, so a block that was left is folded first, without a look at what its
small nodes cost: a kernel has none to pay for. The functions are not in the file, because TensorRT
before 10.7 prefers them to a plugin; ``plugins.onnx_function`` has them for a runtime without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from ..plugins.onnx_function import DOMAIN, node
from .canonical import module_of
from .graph import GraphIndex, attribute, set_nodes
from .heads import Heads, fold_heads, over_words
from .rewrite import add, declare, node_of, reader_of, replace, rewrite
from .words import Block, Fold, fold_words


@dataclass(frozen=True)
class Fusion:
    """What became of one attention to words: the node it is now, or that of its softmax.

    operator: which it is now, empty where it was left. why: it was left.
    """

    node: str
    operator: str
    why: str = ""


_UNGATED = "no gate of two linear maps without biases follows its norm"


def fuse(model: onnx.ModelProto) -> list[Fusion]:
    """Replace every attention to words that an operator computes; in place, before quantization."""
    if not any(n.op_type == "Softmax" for n in model.graph.node):
        return []
    fold_words({"mask": model}, _gated)
    left = {f.node: _why(f) for f in fold_heads({"mask": model}, _narrows)}
    done: list[Fusion] = []
    for name in [n.name for n in model.graph.node if n.op_type == "Softmax"]:
        index = GraphIndex(model)
        softmax = next(n for n in index.nodes if n.name == name)
        made = (
            _norm_attention(index, softmax)
            or _cross_attention(index, softmax)
            or _mutual_attention(index, softmax)
        )
        if made is not None:
            done.append(Fusion(made.name, made.op_type.partition("_")[0]))
        elif over_words(index, softmax) is not None:
            by_word = attribute(softmax, "axis", -1) == 1  # in front of a norm over the pixels
            done.append(Fusion(name, "", _UNGATED if by_word else left.get(name, "")))
    if any(f.operator for f in done):
        _tidy(model)
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return done


def integer_words(model: onnx.ModelProto) -> None:
    """Give fused nodes their words as int32: TensorRT 8.6 has no booleans for plugins. In place."""
    index, casts = GraphIndex(model), dict[str, onnx.NodeProto]()
    nodes: list[onnx.NodeProto] = []
    for item in index.nodes:
        if item.domain == DOMAIN:
            at = 2 if item.op_type.startswith("MutualAttention") else 3
            words = item.input[at]
            if words not in casts:
                made = f"{words}/int32"
                casts[words] = onnx.helper.make_node(
                    "Cast", [words], [made], f"{made}/Cast", to=onnx.TensorProto.INT32
                )
                nodes.append(casts[words])
            item.input[at] = casts[words].output[0]
        nodes.append(item)
    set_nodes(model.graph, nodes)


def _gated(block: Block) -> bool:
    return len(block.gates) == 1 and block.projection > 0


def _narrows(block: Heads) -> bool:
    return block.heads * block.words < block.channels


def _why(fold: Fold) -> str:
    """Why there is no block to fuse, from what folding says of it."""
    b = fold.block
    if isinstance(b, Heads) and b.inner and not _narrows(b):
        return f"{b.heads} x {b.words} columns of words are no fewer than {b.channels} channels"
    return fold.why


def _norm_attention(index: GraphIndex, softmax: onnx.NodeProto) -> onnx.NodeProto | None:
    """SLViT's block around a softmax becomes a node, if it is one."""
    gates = (n for n in index.nodes if n.op_type == "Tanh")
    return next((m for g in gates if (m := _gate(index, g, softmax.output[0])) is not None), None)


def _gate(index: GraphIndex, tanh: onnx.NodeProto, weights: str) -> onnx.NodeProto | None:
    """Put the node in front of the product of gate and map, if they are of these weights."""
    gate = _made(index, tanh.input[0], "Conv")
    relu = _made(index, gate.input[0] if gate else "", "Relu")
    wide = _through_layout(index, relu.input[0] if relu else "")
    thin = _made(index, wide.input[0] if wide else "", "MatMul")
    products = [r for r in index.readers[tanh.output[0]] if r.op_type == "Mul"]
    if gate is None or wide is None or thin is None or len(products) != 1 or len(gate.input) != 2:
        return None
    product = products[0]
    found = _through_layout(index, next((i for i in product.input if i != tanh.output[0]), ""))
    if found is None or found.input[1] != wide.input[1] or found.input[0] != thin.input[1]:
        return None
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
        return None
    if softmax.output[0] != weights:
        return None
    second = index.constant(gate.input[1]) if gate.input[1] in index.tensors else np.zeros(0)
    if thin.input[0] not in index.tensors or second.ndim != 4 or second.shape[2:] != (1, 1):
        return None
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
    for reader in index.readers[weights]:
        if reader.op_type == "ReduceMax" and _over_words(index, reader):
            kept = attribute(reader, "keepdims", 1)
            axis = [reader.input[1]] if kept else []
            kind = "Unsqueeze" if kept else "Identity"
            replace(index, reader, [
                node_of(reader, kind, [outputs[1], *axis], reader.output, reader.name)
            ])  # fmt: skip
    return made


def _cross_attention(index: GraphIndex, softmax: onnx.NodeProto) -> onnx.NodeProto | None:
    """The folded block of several heads around a softmax becomes a node, if it is one."""
    weights = softmax.output[0]
    together = reader_of(index, weights, "Reshape")
    product = reader_of(index, together.output[0] if together else "", "MatMul")
    where = _made(index, softmax.input[0], "Where")
    valid = _made(index, where.input[0] if where else "", "Unsqueeze")
    apart = _made(index, where.input[1] if where else "", "Reshape")
    rows = apart.input[0] if apart else ""
    shifted = _made(index, rows, "Add")
    scores = _made(index, shifted.input[0] if shifted else rows, "MatMul")
    split = _made(index, scores.input[1] if scores else "", "Split")
    if product is None or valid is None or scores is None or split is None:
        return None
    names = (weights, valid.output[0], split.output[0], product.input[1])
    shapes = [index.shape(name) or () for name in names]
    if [len(s) for s in shapes] != [4, 4, 3, 3] or scores.input[1] != split.output[0]:
        return None
    (_, _, heads, words), mask, (_, channels, columns), (_, rest, out) = shapes
    if mask != (1, 1, 1, words) or not columns == rest == heads * words:
        return None
    if shifted is not None and shifted.input[1] != split.output[1]:
        return None
    nodes, operands = [], {}
    for side, source, dims in (
        ("keys", split.output[0], (channels, heads, words)),
        ("values", product.input[1], (heads, words, out)),
        ("offset", split.output[1], (heads, words)),  # zeros where there is no bias
    ):
        operands[side] = name = f"{weights}/{side}"
        size = add(index, f"{name}/shape", np.array([-1, *dims], np.int64))
        declare(index, name, source, dims)
        nodes.append(node_of(softmax, "Reshape", [source, size], [name], f"{softmax.name}/{side}"))
    inputs = [scores.input[0], operands["keys"], operands["values"], valid.input[0]]
    made = _call("CrossAttention", softmax, [*inputs, operands["offset"]], product.output[0])
    replace(index, product, [*nodes, made])
    return made


def _mutual_attention(index: GraphIndex, softmax: onnx.NodeProto) -> onnx.NodeProto | None:
    """M3Att's block around its softmax over words becomes a node, if it is one."""
    weights = softmax.output[0]
    where = _made(index, softmax.input[0], "Where")
    valid = _made(index, where.input[0] if where else "", "Unsqueeze")
    scores = _made(index, where.input[1] if where else "", "MatMul")
    readers = index.readers[scores.output[0]] if scores else []
    by_pixel = next((r for r in readers if r.op_type == "Softmax"), None)
    seen = reader_of(index, by_pixel.output[0] if by_pixel else "", "MatMul")
    shared = reader_of(index, seen.output[0] if seen else "", "Mul")
    pairs = reader_of(index, shared.output[0] if shared else "", "MatMul")
    kept = reader_of(index, pairs.output[0] if pairs else "", "Where")
    turned = reader_of(index, kept.output[0] if kept else "", "Transpose")
    rows = reader_of(index, turned.output[0] if turned else "", "Reshape")
    product = reader_of(index, rows.output[0] if rows else "", "MatMul")
    told = reader_of(index, weights, "Reshape")
    if valid is None or scores is None or by_pixel is None or seen is None or shared is None:
        return None
    if pairs is None or kept is None or turned is None or rows is None:
        return None
    if product is None or told is None:
        return None
    sizes, depth = index.shape(weights) or (), (index.shape(seen.output[0]) or (0,))[-1]
    if len(sizes) != 4 or index.shape(valid.output[0]) != (1, 1, sizes[2], 1):
        return None
    share = _scalar(index, shared.input[1])
    fits = (
        attribute(softmax, "axis", -1) == 2
        and attribute(by_pixel, "axis", -1) in (3, -1)
        and seen.input[0] == by_pixel.output[0]
        and pairs.input[0] == shared.output[0]
        and kept.input[0] == valid.output[0]
        and product.input[:] == [rows.output[0], told.output[0]]
        and attribute(turned, "perm") == [0, 2, 1, 3]
        and _scalar(index, kept.input[2]) == 0.0
        and abs(share * (sizes[1] * depth) ** 0.5 - 1.0) < 1e-5
    )
    if not fits:
        return None
    values = f"{weights}/values"
    declare(index, values, pairs.input[1], (sizes[1], sizes[2], depth))
    name, given = f"{softmax.name}/values", [pairs.input[1]]
    back = node_of(softmax, "Transpose", given, [values], name, perm=[0, 1, 3, 2])
    inputs = [scores.input[0], values, valid.input[0], scores.input[1], seen.input[1]]
    made = _call("MutualAttention", softmax, inputs, product.output[0], f"{weights}/told")
    declare(index, made.output[1], product.output[0])
    replace(index, product, [back, made])
    return made


def _call(
    operator: str, source: onnx.NodeProto, inputs: list[str], *outputs: str
) -> onnx.NodeProto:
    """The node, named after the torch module of another."""
    made = node(operator, inputs, list(outputs), name=f"{module_of(source)}/{operator}")
    made.metadata_props.extend(source.metadata_props)
    return made


def _made(index: GraphIndex, name: str, kind: str) -> onnx.NodeProto | None:
    maker = index.maker.get(name)
    return maker if maker is not None and maker.op_type == kind else None


def _scalar(index: GraphIndex, name: str) -> float:
    """A constant of one number; not a number where it is none."""
    value = index.constant(name) if name in index.tensors else np.zeros(0)
    return float(value.item()) if value.size == 1 else float("nan")


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
    set_nodes(graph, nodes)
    rewrite(model, ())
