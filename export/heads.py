"""Attention of many pixels to few words, several heads, folded: exact, for fewer multiplications.

With ``x`` [N, C] the pixels, ``K_h`` [d, T] and ``V_h`` [T, d] the words of head h, and the pixels'
projections before and behind it,

    scores_h = (x Wq_h + bq_h) K_h           = x (Wq_h K_h) + bq_h K_h
    out      = sum_h (P_h V_h) Wo_h + bo     = sum_h P_h (V_h Wo_h) + bo

so that both projections apply to T words instead of N pixels; it pays where heads x T < C. The
sum over the heads is one product of [N, heads T] with [heads T, C], and nothing is transposed on
the way. The products of words are made by the ``text`` part where the words come straight from
there: its port keeps name and type, its shape becomes [C + 1, heads T] for keys, whose last row is
``bq_h K_h``, and [heads T, C] for values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from .graph import GraphIndex, attribute
from .rewrite import add, declare, maker_of, node_of, only, reader_of, replace, rewrite
from .words import CALL, DENSE, PASS, STATISTICS, THIN, Fold, recognise

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Heads:
    """Attention to words, by its shapes.

    pixels, words, heads: N, T, H. channels, inner, out: of the pixels, of the heads together, of
    what is given; zeros where the projections are not in this part.
    """

    pixels: int
    words: int
    heads: int
    channels: int = 0
    inner: int = 0
    out: int = 0

    @property
    def unfolded_us(self) -> float:
        """Estimated microseconds of what folding replaces."""
        n, inner = self.pixels, self.inner
        dense = n * inner * (self.channels + self.out) * DENSE
        products = 2 * n * inner * self.words * THIN
        return (dense + products + 3 * n * inner * PASS + 9 * CALL) / 1e3

    @property
    def folded_us(self) -> float:
        """Estimated microseconds of what folding puts there, the words' own products apart."""
        columns = self.heads * self.words
        products = self.pixels * columns * (self.channels + self.out) * DENSE * _UNPACKED
        return (products + self.pixels * columns * PASS + 6 * CALL) / 1e3


_SWAP = [0, 2, 1, 3]  # heads before rows, and back
_UNPACKED = 1.3  # a right factor that is no constant is packed at every call


@dataclass
class _Found:
    """The nodes of a block, from the pixels' projection to the one behind the heads."""

    block: Heads
    softmax: onnx.NodeProto
    mask: onnx.NodeProto
    scores: onnx.NodeProto
    mixed: onnx.NodeProto
    query: onnx.NodeProto  # the product with Wq
    bias: str  # its bias, empty where there is none
    out: onnx.NodeProto  # the product with Wo
    between: list[onnx.NodeProto]  # layouts and the bias


def pays(block: Heads) -> bool:
    """Whether the folded block is estimated to take at least a tenth less time."""
    return block.folded_us < 0.9 * block.unfolded_us


def fold_heads(
    parts: Mapping[str, onnx.ModelProto], decide: Callable[[Heads], bool] = pays
) -> list[Fold]:
    """Fold attention to words in the ``mask`` part where ``decide`` says so; in place.

    Blocks with an instance norm behind them are ``words.fold_words``'s, which comes later. Returns
    what was done, and what was left and why: one record for every other attention to words.
    """
    mask = parts["mask"]
    index = GraphIndex(mask)
    normed = {f.product.input[1] for n in index.nodes if (f := recognise(index, n)) is not None}
    done: list[Fold] = []
    chosen: list[_Found] = []
    for softmax in index.nodes:
        shape = over_words(index, softmax)
        if shape is None or softmax.output[0] in normed:
            continue
        found = _recognise(index, softmax, shape)
        if isinstance(found, str):
            done.append(Fold(softmax.name, shape, False, found, kind="heads"))
            continue
        block, pay = found.block, decide(found.block)
        why = f"estimated {block.folded_us:.0f} µs folded, {block.unfolded_us:.0f} µs as it was"
        done.append(Fold(softmax.name, block, pay, why, kind="heads"))
        if pay:
            chosen.append(found)
    moved = _move(index, chosen, parts.get("text"))
    for number, fold in enumerate(done):
        ports = tuple(dict.fromkeys(moved.get(fold.node, {}).values()))
        done[number] = Fold(fold.node, fold.block, fold.folded, fold.why, ports, fold.kind)
    for found in chosen:
        _fold(GraphIndex(mask), found, moved.get(found.softmax.name, {}))
    rewrite(mask, ())
    return done


def over_words(index: GraphIndex, softmax: onnx.NodeProto) -> Heads | None:
    """The shapes of a softmax over masked words, whose rows are no words themselves."""
    where = index.maker.get(softmax.input[0]) if softmax.op_type == "Softmax" else None
    if where is None or where.op_type != "Where" or where.input[2] not in index.tensors:
        return None
    shape, valid = index.shape(softmax.input[0]), index.maker.get(where.input[0])
    if shape is None or valid is None or valid.input[0] != "words":
        return None
    axis = int(str(attribute(softmax, "axis", -1))) % len(shape)
    rest = [n for i, n in enumerate(shape[1:], 1) if i != axis]
    if rest[-1] == shape[axis]:
        return None  # words among themselves
    return Heads(rest[-1], shape[axis], int(np.prod(rest[:-1])))


def _recognise(index: GraphIndex, softmax: onnx.NodeProto, shape: Heads) -> _Found | str:
    """The block around a softmax, or why it cannot be folded."""
    where = index.maker[softmax.input[0]]
    scores = index.maker.get(where.input[1])
    if scores is None or scores.op_type != "MatMul":
        return "no product makes its scores"
    if not only(index, scores.output[0]) or not only(index, where.output[0]):
        kinds = [n.op_type for n in index.readers[scores.output[0]]]
        other = "a softmax over pixels" if "Softmax" in kinds else "something else"
        return f"its scores serve {other} too"
    mixed = reader_of(index, softmax.output[0], "MatMul")
    sizes = index.shape(softmax.output[0])
    if mixed is None or mixed.input[0] != softmax.output[0] or sizes is None or len(sizes) != 4:
        return "its weights serve something else too"
    if index.shape(where.input[0]) != (1, 1, 1, shape.words):
        return "its mask differs between heads or pixels"
    turn = maker_of(index, scores.input[0], "Transpose")
    split = maker_of(index, turn.input[0], "Reshape") if turn else None
    entered = index.maker.get(split.input[0]) if split and only(index, split.input[0]) else None
    if turn is None or split is None or entered is None or not _swaps(turn):
        return "no linear map of its pixels is in this part"
    bias, query, between = "", entered, [turn, split]
    if entered.op_type == "Add":
        bias, name = _constant_first(index, entered)
        maker = maker_of(index, name, "MatMul") if bias else None
        if maker is None:
            return "no linear map of its pixels is in this part"
        query = maker
        between.append(entered)
    back = reader_of(index, mixed.output[0], "Transpose")
    join = reader_of(index, back.output[0], "Reshape") if back and _swaps(back) else None
    out = reader_of(index, join.output[0], "MatMul") if join else None
    if back is None or join is None or out is None:
        return "no linear map follows it"
    weights = [_matrix(index, n) for n in (query, out)]
    if weights[0] is None or weights[1] is None:
        return "no linear map with constant weights surrounds it"
    channels, inner = weights[0].shape
    if inner % sizes[1] or weights[1].shape[0] != inner or sizes[2] != shape.pixels:
        return "the linear maps around it have other sizes"
    block = Heads(shape.pixels, shape.words, sizes[1], channels, inner, weights[1].shape[1])
    between += [back, join]
    return _Found(block, softmax, where, scores, mixed, query, bias, out, between)


def _swaps(node: onnx.NodeProto) -> bool:
    return attribute(node, "perm") == _SWAP


def _constant_first(index: GraphIndex, node: onnx.NodeProto) -> tuple[str, str]:
    """The constant [C] and the other input of a sum; empty names where there is none."""
    for constant, other in (tuple(node.input), tuple(node.input)[::-1]):
        if constant in index.tensors and len(index.tensors[constant].dims) == 1:
            return constant, other
    return "", ""


def _matrix(index: GraphIndex, node: onnx.NodeProto) -> Doubles | None:
    """The constant right factor of a product with rows [B, N, C]."""
    if node.input[1] not in index.tensors or len(index.tensors[node.input[1]].dims) != 2:
        return None
    return index.doubles(node.input[1])


def _factors(index: GraphIndex, found: _Found) -> dict[str, npt.NDArray[np.float32]]:
    """What the words are multiplied with: [H, C + 1, d] for keys, [H, d, out] for values."""
    b, query, out = found.block, _matrix(index, found.query), _matrix(index, found.out)
    bias = index.doubles(found.bias) if found.bias else np.zeros(b.inner)
    rows = np.concatenate([query if query is not None else np.zeros(0), bias[None]])
    keys = rows.reshape(b.channels + 1, b.heads, -1).transpose(1, 0, 2)
    values = (out if out is not None else np.zeros(0)).reshape(b.heads, -1, b.out)
    return {"keys": keys.astype(np.float32), "values": values.astype(np.float32)}


def _project(
    index: GraphIndex,
    source: onnx.NodeProto,
    side: str,
    given: str,
    factor: npt.NDArray[np.float32],
    words: int,
    out: str,
) -> tuple[list[onnx.NodeProto], tuple[int, int]]:
    """Nodes that make the folded keys or values of words [B, H, d, T] or [B, H, T, d].

    They write ``out``, whose shape without the batch comes along.
    """
    heads, rows, columns = factor.shape
    weight, product, turned = add(index, f"{out}/factor", factor), f"{out}/product", f"{out}/turned"
    name = f"{source.name}{STATISTICS}{side}_"
    if side == "keys":
        size = (rows, heads * words)
        made = [
            node_of(source, "MatMul", [weight, given], [product], f"{name}product"),
            node_of(source, "Transpose", [product], [turned], f"{name}turned", perm=_SWAP),
        ]
        declare(index, product, given, (heads, rows, words))
        declare(index, turned, given, (rows, heads, words))
    else:
        size = (heads * words, columns)
        made = [node_of(source, "MatMul", [given, weight], [product], f"{name}product")]
        declare(index, product, given, (heads, words, columns))
    shape = add(index, f"{out}/shape", np.array([-1, *size], np.int64))
    made.append(node_of(source, "Reshape", [made[-1].output[0], shape], [out], f"{name}rows"))
    return made, size


def _move(
    index: GraphIndex, chosen: list[_Found], text: onnx.ModelProto | None
) -> dict[str, dict[str, str]]:
    """Let the text part project words; softmax to the port of keys and values that changed.

    A port moves as a whole: each of its slices must feed one chosen block and nothing else.
    """
    wanted: dict[str, dict[int, tuple[_Found, str, onnx.NodeProto | None]]] = {}
    for found in chosen if text is not None else ():
        for side, product in (("keys", found.scores), ("values", found.mixed)):
            name = product.input[1]
            pick = index.maker.get(name)
            if name in index.inputs and only(index, name):
                wanted.setdefault(name, {})[0] = (found, side, None)
            elif pick is not None and pick.op_type == "Gather" and only(index, name):
                port, slot = pick.input[0], pick.input[1]
                if port in index.inputs and slot in index.tensors and _takes_slices(pick):
                    place = int(index.constant(slot))
                    wanted.setdefault(port, {})[place] = (found, side, pick)
    moved: dict[str, dict[str, str]] = {}
    for port, slots in wanted.items():
        rows = [row for _, row in sorted(slots.items())]
        size = _project_port(index, text, port, rows) if text is not None else None
        if size is None:
            continue
        for found, side, pick in rows:
            moved.setdefault(found.softmax.name, {})[side] = port
            if pick is not None:
                _resize(index.model, pick.output[0], size)
        _resize(index.model, port, size)
    return moved


def _takes_slices(pick: onnx.NodeProto) -> bool:
    return attribute(pick, "axis", 0) == 1


def _project_port(
    index: GraphIndex,
    text: onnx.ModelProto,
    port: str,
    rows: list[tuple[_Found, str, onnx.NodeProto | None]],
) -> tuple[int, int] | None:
    """Project in the text part what it gives by a port; the new shape of a slice, if it could."""
    inside = GraphIndex(text)
    maker, shape = inside.maker.get(port), index.shape(port)
    if maker is None or shape is None or inside.readers[port]:
        return None
    sliced = rows[0][2] is not None
    if sliced and (len(rows) != shape[1] or len(index.readers[port]) != len(rows)):
        return None
    lifts: list[onnx.NodeProto | None] = [None]
    if sliced:
        lifts = [inside.maker.get(n) for n in (maker.input if len(rows) > 1 else [port])]
        if len(rows) > 1 and (maker.op_type != "Concat" or attribute(maker, "axis") != 1):
            return None
        if any(lift is None or lift.op_type != "Unsqueeze" for lift in lifts):
            return None
    size = (0, 0)
    for (found, side, _), lift in zip(rows, lifts, strict=True):
        factor, words = _factors(index, found)[side], found.block.words
        if lift is None:
            raw = f"{port}/unfolded"
            maker.output[:] = [raw if o == port else o for o in maker.output]
            declare(inside, raw, port)
            made, size = _project(inside, maker, side, raw, factor, words, port)
            replace(inside, maker, [maker, *made])
        else:
            given = lift.input[0]
            made, size = _project(inside, lift, side, given, factor, words, f"{given}/folded")
            lifted = node_of(
                lift, "Unsqueeze", [f"{given}/folded", lift.input[1]], lift.output, lift.name
            )
            declare(inside, f"{given}/folded", given, size)
            replace(inside, lift, [*made, lifted])
            _resize(text, lift.output[0], size)
    _resize(text, port, size)
    return size


def _resize(model: onnx.ModelProto, name: str, size: tuple[int, int]) -> None:
    """Let a tensor's last three axes, one of which is that of the heads, become ``size``."""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        if value.name == name:
            shape = value.type.tensor_type.shape
            del shape.dim[-3:]
            for n in size:
                shape.dim.add().dim_value = n


def _fold(index: GraphIndex, found: _Found, moved: Mapping[str, str]) -> None:
    """Replace projections and heads by products with the projected words."""
    b, softmax = found.block, found.softmax
    stem, n, columns = softmax.output[0], b.pixels, b.heads * b.words
    nodes: list[onnx.NodeProto] = []
    folded = {}
    for side, product in (("keys", found.scores), ("values", found.mixed)):
        folded[side] = product.input[1]
        if side not in moved:
            factor = _factors(index, found)[side]
            made, size = _project(
                index, product, side, folded[side], factor, b.words, f"{stem}/{side}"
            )
            declare(index, f"{stem}/{side}", stem, size)
            nodes += made
            folded[side] = f"{stem}/{side}"

    def put(
        source: onnx.NodeProto,
        kind: str,
        inputs: list[str],
        name: str,
        dims: tuple[int, ...],
        **settings: Any,
    ) -> str:
        out = f"{stem}/{name}"
        nodes.append(node_of(source, kind, inputs, [out], f"{softmax.name}/{name}", **settings))
        declare(index, out, stem, dims)
        return out

    scores, where = found.scores, found.mask
    sizes = add(index, f"{stem}/split", np.array([b.channels, 1], np.int64))
    parts = [f"{stem}/keys_only", f"{stem}/offset"]
    nodes.append(
        node_of(scores, "Split", [folded["keys"], sizes], parts, f"{softmax.name}/split", axis=1)
    )
    declare(index, parts[0], stem, (b.channels, columns))
    declare(index, parts[1], stem, (1, columns))
    rows = put(scores, "MatMul", [found.query.input[0], parts[0]], "scores", (n, columns))
    if found.bias:
        rows = put(scores, "Add", [rows, parts[1]], "shifted", (n, columns))
    apart = add(index, f"{stem}/heads", np.array([-1, n, b.heads, b.words], np.int64))
    rows = put(scores, "Reshape", [rows, apart], "apart", (n, b.heads, b.words))
    rows = put(where, "Where", [where.input[0], rows, where.input[2]], "masked",
               (n, b.heads, b.words))  # fmt: skip
    rows = put(softmax, "Softmax", [rows], "weights", (n, b.heads, b.words), axis=-1)
    together = add(index, f"{stem}/columns", np.array([-1, n, columns], np.int64))
    rows = put(softmax, "Reshape", [rows, together], "together", (n, columns))
    nodes.append(
        node_of(found.out, "MatMul", [rows, folded["values"]], found.out.output, found.out.name)
    )
    replace(index, found.out, nodes)
    for node in (found.mixed, softmax, where, scores, found.query, *found.between):
        replace(index, node, [])
