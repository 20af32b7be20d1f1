"""Attention to words with an instance norm behind it, folded: exact, for fewer multiplications.

With ``P`` [T, N] the weights of T words at N pixels (columns sum to one) and ``U`` [C, T] the
projected values, what pixels collect is ``U P``, whose mean over the pixels is ``U mean(P)`` and
whose variance is the diagonal of ``U cov(P) U^T``. So the norm is a scale per row of U, the output
projection is text alone, and a linear map behind the norm takes T columns instead of N pixels:

    norm(W (V P) + b) = D (P - mean(P)),  D = U / sqrt(diag(U cov(P) U^T) + eps),  U = W V
    G norm(W (V P) + b) = (G D) (P - mean(P))

Biases before the norm cancel, and so does any vector added to all columns of U: U mean(P) is taken
off, without which values with a large common part would lose their differences in cov. U is made
by the ``text`` part where its values come straight from there. ``../docs/folding.md`` has the
algebra, the numerics, and where it does not pay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from .graph import GraphIndex, attribute
from .rewrite import add, declare, dense, node_of, only, replace, rewrite

# nodes whose names hold this stay in float32 in every plan: sums over all pixels, and the centring
STATISTICS = "/statistics/"

# nanoseconds on one core, fitted to ONNX Runtime's profile; ../docs/folding.md compares
DENSE = 0.0165  # a multiply-add of a convolution with C channels on both sides
THIN = 0.036  # of a product whose inner or outer size is the number of words
SQUARE = 0.06  # of words times words
PASS = 0.45  # reading and writing an element once: an activation, a change of layout
NORM = 0.6  # an element of an instance norm
CALL = 5000.0  # a node


@dataclass(frozen=True)
class Block:
    """A norm behind attention to words, by its shapes.

    pixels, channels, words: N, C, T. projection: input channels of the linear map before the norm,
    0 where there is none. gates: output channels of the linear maps behind it.
    """

    pixels: int
    channels: int
    words: int
    projection: int
    gates: tuple[int, ...]

    @property
    def unfolded_us(self) -> float:
        """Estimated microseconds of what folding replaces."""
        n, c, t, gates = self.pixels, self.channels, self.words, sum(self.gates)
        dense = n * c * (self.projection + gates) * DENSE
        layouts = n * c * (2 * bool(self.projection) + len(self.gates)) * PASS
        product = n * (self.projection or c) * t * THIN
        calls = (2 + bool(self.projection) + len(self.gates)) * CALL
        return (dense + layouts + product + n * c * NORM + calls) / 1e3

    @property
    def folded_us(self) -> float:
        """Estimated microseconds of what folding puts there, the text part's share apart."""
        n, c, t, gates = self.pixels, self.channels, self.words, sum(self.gates)
        products = (n * t * (c + gates) + c * t * gates) * THIN
        statistics = (n * t * t + c * t * t) * SQUARE + 2 * n * t * PASS
        layouts = 2 * n * gates * PASS
        return (products + statistics + layouts + (16 + 2 * len(self.gates)) * CALL) / 1e3


@dataclass(frozen=True)
class Fold:
    """What became of one block: its node and shape, ``folded`` or ``left``, and why.

    moved: ports of the text part that now carry something else. kind: which module folds such.
    """

    node: str
    block: Any  # Block, or heads.Heads
    folded: bool
    why: str
    moved: tuple[str, ...] = ()
    kind: str = "instance-norm"


@dataclass
class _Found:
    """The nodes of a block, from the product with the weights to the maps behind the norm."""

    block: Block
    product: onnx.NodeProto
    norm: onnx.NodeProto
    projection: onnx.NodeProto | None
    between: list[onnx.NodeProto]  # reshapes between product and norm
    gates: list[onnx.NodeProto]


def pays(block: Block) -> bool:
    """Whether the folded block is estimated to take less time."""
    return block.folded_us < block.unfolded_us


def fold_words(
    parts: Mapping[str, onnx.ModelProto], decide: Callable[[Block], bool] = pays
) -> list[Fold]:
    """Fold every block of the ``mask`` part for which ``decide`` says so; in place.

    Part borders keep their names, shapes and types; ports that carry something else are named by
    ``Fold.moved``, and the text part makes it. Returns what was done and what was left.
    """
    mask = parts["mask"]
    index = GraphIndex(mask)
    found = [f for f in (recognise(index, n) for n in index.nodes) if f is not None]
    chosen = [f for f in found if decide(f.block)]
    moved = _move(index, chosen, parts.get("text"))
    done = [
        Fold(
            f.norm.name,
            f.block,
            f in chosen,
            f"estimated {f.block.folded_us:.0f} µs folded, {f.block.unfolded_us:.0f} µs as it was",
            moved.get(f.norm.name, ()),
        )
        for f in found
    ]
    for name in [f.norm.name for f in chosen]:
        index = GraphIndex(mask)
        again = recognise(index, next(n for n in index.nodes if n.name == name))
        if again is not None:
            _fold(index, again, bool(moved.get(name)))
    rewrite(mask, ())
    return done


def recognise(index: GraphIndex, norm: onnx.NodeProto) -> _Found | None:
    """The block that ends in this norm; None where there is none."""
    if norm.op_type != "InstanceNormalization" or not _plain(index, norm):
        return None
    name, between, projection = norm.input[0], [], None
    while True:
        maker = index.maker.get(name)
        if maker is None or not only(index, name):
            return None
        if maker.op_type == "MatMul":
            break
        if maker.op_type == "Conv" and projection is None and dense(index, maker):
            projection = maker
        elif maker.op_type == "Reshape":
            between.append(maker)
        else:
            return None
        name = maker.input[0]
    softmax = index.maker.get(maker.input[1])
    values, weights = (index.shape(i) for i in maker.input)
    if softmax is None or softmax.op_type != "Softmax" or attribute(softmax, "axis", -1) != 1:
        return None
    if values is None or weights is None or not len(values) == len(weights) == 3:
        return None
    channels, pixels = _rows(index.shape(norm.input[0]))
    if pixels != weights[2] or (projection is None and channels != values[1]):
        return None
    gates = [r for r in index.readers[norm.output[0]] if r.op_type == "Conv" and dense(index, r)]
    widths = tuple(index.tensors[g.input[1]].dims[0] for g in gates)
    block = Block(pixels, channels, weights[1], values[1] if projection is not None else 0, widths)
    return _Found(block, maker, norm, projection, between, gates)


def _plain(index: GraphIndex, norm: onnx.NodeProto) -> bool:
    """Without weights of its own."""
    if not all(name in index.tensors for name in norm.input[1:]):
        return False
    scale, shift = (index.constant(name) for name in norm.input[1:])
    return bool((scale == 1).all() and (shift == 0).all())


def _rows(shape: tuple[int, ...] | None) -> tuple[int, int]:
    return (0, 0) if shape is None else (shape[1], int(np.prod(shape[2:])))


def _matrix(index: GraphIndex, conv: onnx.NodeProto) -> np.ndarray[Any, np.dtype[np.float32]]:
    weight = index.constant(conv.input[1]).astype(np.float32)
    return weight.reshape(weight.shape[:2])


def _move(
    index: GraphIndex, chosen: list[_Found], text: onnx.ModelProto | None
) -> dict[str, tuple[str, ...]]:
    """Let the text part project the values of the chosen blocks; norm to the port that changed.

    A port moves as a whole: each of its slices must feed one chosen block and nothing else.
    """
    if text is None:
        return {}
    wanted: dict[str, dict[int, _Found]] = {}
    for found in chosen:
        pick = index.maker.get(found.product.input[0])
        if found.projection is None or pick is None or pick.op_type != "Gather":
            continue
        if pick.input[0] in index.inputs and attribute(pick, "axis", 0) == 1:
            slot = int(index.constant(pick.input[1]))
            if only(index, pick.output[0]):
                wanted.setdefault(pick.input[0], {})[slot] = found
    moved: dict[str, tuple[str, ...]] = {}
    for port, slots in wanted.items():
        shape, picks = index.shape(port), index.readers[port]
        if shape is None or sorted(slots) != list(range(shape[1])) or len(picks) != len(slots):
            continue
        matrices = [_matrix(index, f.projection) for _, f in sorted(slots.items()) if f.projection]
        if _project(text, port, matrices):
            moved |= {f.norm.name: (port,) for f in slots.values()}
    return moved


def _project(text: onnx.ModelProto, port: str, matrices: list[Any]) -> bool:
    """Multiply each slice [B, T, C] that the text part stacks into a port [B, S, C, T]."""
    index = GraphIndex(text)
    turn = index.maker.get(port)
    stack = index.maker.get(turn.input[0]) if turn and turn.op_type == "Transpose" else None
    if turn is None or stack is None or attribute(turn, "perm") != [0, 1, 3, 2]:
        return False
    several = stack.op_type == "Concat"  # a stack of one is no more than an axis
    lifts = [index.maker.get(name) for name in stack.input] if several else [stack]
    if len(lifts) != len(matrices):
        return False
    if any(lift is None or lift.op_type != "Unsqueeze" for lift in lifts):
        return False
    for lift, matrix in zip(lifts, matrices, strict=True):
        if lift is not None:
            name = f"{lift.input[0]}/projected"
            weight = add(index, f"{name}/weight", np.ascontiguousarray(matrix.T))
            made = node_of(lift, "MatMul", [lift.input[0], weight], [name], f"{lift.name}/weigh")
            declare(index, name, lift.input[0])
            again = node_of(lift, "Unsqueeze", [name, lift.input[1]], lift.output, lift.name)
            replace(index, lift, [made, again])
    return True


def _fold(index: GraphIndex, found: _Found, moved: bool) -> None:
    """Replace projection, norm and gates by products with the centred weights."""
    block, product, norm = found.block, found.product, found.norm
    values, weights = product.input
    n, t, c = block.pixels, block.words, block.channels
    nodes: list[onnx.NodeProto] = []

    def put(
        kind: str,
        inputs: list[str],
        name: str,
        dims: tuple[int, ...],
        place: str = STATISTICS,
        source: onnx.NodeProto = norm,
        **settings: Any,
    ) -> str:
        out = f"{norm.output[0]}/{name}"
        nodes.append(node_of(source, kind, inputs, [out], f"{norm.name}{place}{name}", **settings))
        declare(index, out, weights, dims)
        return out

    def constant(name: str, value: Any) -> str:
        return add(index, f"{norm.output[0]}/{name}", np.asarray(value))

    def replaces(source: onnx.NodeProto) -> None:
        """What was put last, [B, C, N], becomes the output of a node that goes."""
        out, shape = source.output[0], index.shape(source.output[0])
        if shape is None or len(shape) == 3:
            nodes[-1].output[0] = out
            return
        size = add(index, f"{out}/shape", np.array([-1, *shape[1:]], np.int64))
        name = f"{source.name}/map"
        nodes.append(node_of(source, "Reshape", [nodes[-1].output[0], size], [out], name))

    if found.projection is not None and not moved:
        matrix = constant("projection", _matrix(index, found.projection))
        values = put("MatMul", [matrix, values], "values", (c, t), source=found.projection)
    last = constant("pixels", np.array([2], np.int64))
    epsilon = constant("epsilon", np.float32(str(attribute(norm, "epsilon", 1e-5))))
    share = constant("share", np.float32(n))
    mean = put("ReduceMean", [weights, last], "mean", (t, 1), keepdims=1)
    centred = put("Sub", [weights, mean], "centred", (t, n))
    turned = put("Transpose", [centred], "turned", (n, t), perm=[0, 2, 1])
    sums = put("MatMul", [centred, turned], "sums", (t, t))
    covariance = put("Div", [sums, share], "covariance", (t, t))
    middle = put("MatMul", [values, mean], "middle", (c, 1))
    values = put("Sub", [values, middle], "shifted", (c, t))
    spread = put("MatMul", [values, covariance], "spread", (c, t))
    squares = put("Mul", [spread, values], "squares", (c, t))
    variance = put("ReduceSum", [squares, last], "variance", (c, 1), keepdims=1)
    positive = put("Relu", [variance], "positive", (c, 1))  # rounding may leave less than zero
    safe = put("Add", [positive, epsilon], "safe", (c, 1))
    deviation = put("Sqrt", [safe], "deviation", (c, 1))
    columns = put("Div", [values, deviation], "columns", (c, t))
    put("MatMul", [columns, centred], "attended", (c, n), "/folded/")
    replaces(norm)
    for number, gate in enumerate(found.gates):
        weight = _matrix(index, gate)
        rows = len(weight)
        matrix = constant(f"gate_{number}", weight)
        thin = put("MatMul", [matrix, columns], f"thin_{number}", (rows, t), source=gate)
        wide = put("MatMul", [thin, centred], f"wide_{number}", (rows, n), "/folded/", gate)
        if len(gate.input) == 3:
            bias = constant(f"bias_{number}", index.constant(gate.input[2]).reshape(-1, 1))
            put("Add", [wide, bias], f"biased_{number}", (rows, n), "/folded/", gate)
        replaces(gate)
    # the norm comes after the product, and nothing between them has another reader
    replace(index, norm, nodes)
    gone = [product, *found.between, *found.gates]
    for node in [*gone, *([found.projection] if found.projection is not None else [])]:
        replace(index, node, [])
