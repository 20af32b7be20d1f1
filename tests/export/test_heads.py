"""Folding heads is exact, moves what is text alone to the text part, and says what it left."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from refedge.calibration.placement import is_high
from refedge.export.graph import GraphIndex
from refedge.export.heads import Heads, fold_heads, pays
from refedge.export.words import Fold

from .small_graphs import node, operators, run, small
from .test_words import doubled

N, C, E, T, H, D, LAYERS = 9, 10, 5, 3, 2, 4, 2
Feeds = dict[str, np.ndarray]
CASES = ("plain", "flat attention", "one word", "equal words", "large mean")


def parts(
    *, bias: bool = True, stacked: bool = True, shared: bool = False, masked: bool = True
) -> dict[str, onnx.ModelProto]:
    """Two blocks in a row and the text part, as CM-MaskSD has them (stacked) or LTS.

    shared: the scores of the first block have another reader. masked: words are.
    """
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    split, swap = np.int64([-1, T, H, D]), [0, 2, 1, 3]
    weights: Feeds = {"one": np.int64([1]), "split": split}
    text_nodes: list[onnx.NodeProto] = []
    raw = "raw_" if stacked else ""
    for j in range(LAYERS):
        for side, perm in (("keys", [0, 2, 3, 1]), ("values", swap)):
            weights[f"w_{side}_{j}"] = normal(E, H * D)
            text_nodes += [
                node("MatMul", ["states", f"w_{side}_{j}"], f"p_{side}_{j}", f"layer.{j}"),
                node("Reshape", [f"p_{side}_{j}", "split"], f"s_{side}_{j}", f"layer.{j}"),
                node("Transpose", [f"s_{side}_{j}"], f"{raw}{side}_{j}", f"layer.{j}", perm=perm),
            ]
    ports = [f"{side}_{j}" for j in range(LAYERS) for side in ("keys", "values")]
    if stacked:
        ports = ["keys", "values"]
        for side in ports:
            lifted = [f"l_{side}_{j}" for j in range(LAYERS)]
            text_nodes += [
                node("Unsqueeze", [f"raw_{side}_{j}", "one"], lifted[j]) for j in range(LAYERS)
            ]
            text_nodes.append(node("Concat", lifted, side, axis=1))
    text = small(text_nodes, {"states": ("batch", T, E)}, ports, weights)

    weights = {
        "masked": np.float32(-1e4),
        "middle": np.int64([1, 2]),
        "heads": np.int64([-1, N, H, D]),
        "joined": np.int64([-1, N, H * D]),
    }
    nodes = [node("Unsqueeze", ["words", "middle"], "valid")]
    x = "x"
    for j in range(LAYERS):
        weights |= {f"wq{j}": normal(C, H * D), f"wo{j}": normal(H * D, C), f"slot{j}": np.int64(j)}
        weights |= {f"bq{j}": normal(H * D), f"bo{j}": normal(C)}
        module, keys, values = f"layer.{j}", f"keys_{j}", f"values_{j}"
        if stacked:
            nodes += [
                node("Gather", [side, f"slot{j}"], f"{side}_{j}", module, axis=1)
                for side in ("keys", "values")
            ]
        nodes.append(node("MatMul", [x, f"wq{j}"], f"q{j}", f"{module}.q"))
        query = f"q{j}"
        if bias:
            nodes.append(node("Add", [query, f"bq{j}"], f"qb{j}", f"{module}.q"))
            query = f"qb{j}"
        nodes += [
            node("Reshape", [query, "heads"], f"h{j}", module),
            node("Transpose", [f"h{j}"], f"t{j}", module, perm=swap),
            node("MatMul", [f"t{j}", keys], f"s{j}", module),
        ]
        scores = f"s{j}"
        if masked:
            nodes.append(node("Where", ["valid", scores, "masked"], f"m{j}", module))
            scores = f"m{j}"
        nodes += [
            node("Softmax", [scores], f"p{j}", module, axis=-1),
            node("MatMul", [f"p{j}", values], f"c{j}", module),
            node("Transpose", [f"c{j}"], f"b{j}", module, perm=swap),
            node("Reshape", [f"b{j}", "joined"], f"j{j}", module),
            node("MatMul", [f"j{j}", f"wo{j}"], f"o{j}", f"{module}.out"),
            node("Add", [f"o{j}", f"bo{j}"], f"ob{j}", f"{module}.out"),
            node("Add", [f"ob{j}", x], f"y{j}", module),
        ]
        x = f"y{j}"
    outputs = [x]
    if shared:
        nodes.append(node("ReduceSum", ["s0"], "seen"))
        outputs.append("seen")
    inputs = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim)
              for v in text.graph.output}  # fmt: skip
    mask = small(
        nodes,
        {"x": ("batch", N, C), "words": ("batch", T), **inputs},
        outputs,
        weights,
        {"words": TensorProto.BOOL},
    )
    return {"text": text, "mask": mask}


def feeds(case: str = "plain", batch: int = 2) -> Feeds:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, N, C)).astype(np.float32)
    states = rng.normal(size=(batch, T, E)).astype(np.float32)
    words = np.arange(T)[None] < rng.integers(2, T + 1, (batch, 1))
    if case == "flat attention":
        x, states = x * np.float32(1e-3), states * np.float32(1e-2)
    elif case == "one word":
        words = np.broadcast_to(np.arange(T) < 1, (batch, T))
    elif case == "equal words":
        states = np.broadcast_to(states[:, :1], states.shape)
    elif case == "large mean":
        x = x + np.float32(30.0)
    return {"x": x, "words": np.ascontiguousarray(words), "states": np.ascontiguousarray(states)}


def in_doubles(models: dict[str, onnx.ModelProto], host: Feeds) -> np.ndarray:
    wide = {n: v.astype(np.float64) if v.dtype == np.float32 else v for n, v in host.items()}
    text = ReferenceEvaluator(doubled(models["text"]))
    given = dict(zip(text.output_names, text.run(None, {"states": wide["states"]}), strict=True))
    host_side = {"x": wide["x"], "words": wide["words"]}
    return np.asarray(ReferenceEvaluator(doubled(models["mask"])).run(None, host_side | given)[0])


def in_floats(models: dict[str, onnx.ModelProto], host: Feeds) -> np.ndarray:
    given = run(models["text"], {"states": host["states"]})
    outputs = run(models["mask"], {"x": host["x"], "words": host["words"], **given})
    return next(iter(outputs.values()))


def folded(models: dict[str, onnx.ModelProto]) -> list[Fold]:
    return fold_heads(models, lambda block: True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "form", [{}, {"bias": False}, {"stacked": False}], ids=lambda form: "".join(form) or "stacked"
)
def test_folding_is_exact_in_doubles(form: dict[str, bool], case: str) -> None:
    host, models = feeds(case), parts(**form)
    wanted = in_doubles(models, host)
    assert all(f.folded and f.moved for f in folded(models))
    for model in models.values():
        onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(in_doubles(models, host), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_folding_loses_no_accuracy(case: str, batch: int) -> None:
    """Design §7: the folded error against float64 is at most twice the unfolded one."""
    host, models = feeds(case, batch), parts()
    wanted = in_doubles(models, host)
    before = np.abs(in_floats(models, host) - wanted).max()
    folded(models)
    after = np.abs(in_floats(models, host) - wanted).max()
    # where the unfolded error is a few roundings, one more is as good
    assert after <= max(2 * before, 4 * np.finfo(np.float32).eps * max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize("stacked", [True, False])
def test_the_text_part_makes_what_is_text_alone(stacked: bool) -> None:
    models = parts(stacked=stacked)
    names = [v.name for v in models["text"].graph.output]
    work = sum(n.op_type == "MatMul" for n in models["text"].graph.node)
    done = folded(models)
    assert {port for f in done for port in f.moved} == set(names)
    # a factor for keys and one for values in the text part, two products in the mask part
    assert sum(n.op_type == "MatMul" for n in models["text"].graph.node) == work + 2 * LAYERS
    assert sum(n.op_type == "MatMul" for n in models["mask"].graph.node) == 2 * LAYERS
    assert not operators(models["mask"]) & {"Transpose"}
    text, mask = (GraphIndex(m) for m in models.values())
    slices = (LAYERS,) if stacked else ()
    for name in names:
        wanted = (C + 1, H * T) if name.startswith("keys") else (H * T, C)
        assert text.shape(name) == mask.shape(name) == (1, *slices, *wanted)
    for model in models.values():
        index = GraphIndex(model)
        inferred = GraphIndex(
            onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        )
        node_names = [n.name for n in index.nodes]
        assert len(set(node_names)) == len(node_names)
        for name in index.maker:
            assert inferred.shape(name) == index.shape(name) is not None


def test_words_of_the_mask_part_stay_there() -> None:
    """Without a text part, or with another reader of a slice, both products are made here."""
    host, models = feeds(), parts()
    wanted = in_doubles(models, host)
    alone = {"mask": models["mask"]}
    assert all(f.folded and not f.moved for f in folded(alone))
    np.testing.assert_allclose(in_doubles(models, host), wanted, rtol=1e-9, atol=1e-10)
    models = parts(stacked=False)
    models["mask"].graph.node.append(node("Identity", ["keys_0"], "again"))
    models["mask"].graph.output.append(onnx.helper.make_empty_tensor_value_info("again"))
    moved = {port for f in folded(models) for port in f.moved}
    assert moved == {"values_0", "keys_1", "values_1"}


def test_products_of_words_stay_in_float32() -> None:
    models = parts()
    folded(models)
    high = {n.name for n in models["text"].graph.node if is_high(n, ())}
    assert sum(n.endswith(("keys_product", "values_product")) for n in high) == 2 * LAYERS


def test_what_cannot_be_folded_is_left_and_says_why() -> None:
    models = parts(shared=True)
    done = folded(models)
    assert [f.folded for f in done] == [False, True]
    assert "serve something else" in done[0].why
    assert asdict(done[0])["kind"] == "heads"
    models = parts(masked=False)
    assert folded(models) == []


def test_a_port_whose_slices_are_not_all_folded_does_not_move() -> None:
    host, models = feeds(), parts(shared=True)
    wanted = in_doubles(models, host)
    assert not any(f.moved for f in folded(models))
    np.testing.assert_allclose(in_doubles(models, host), wanted, rtol=1e-9, atol=1e-10)


def test_paper_shapes_pay_while_heads_times_words_are_few() -> None:
    cm_masksd = Heads(900, 17, 8, 512, 512, 512)
    lts = Heads(676, 15, 8, 256, 256, 256)
    assert pays(cm_masksd)
    assert pays(lts)
    assert not pays(Heads(900, 32, 8, 128, 128, 128))
    assert cm_masksd.unfolded_us / cm_masksd.folded_us > lts.unfolded_us / lts.folded_us > 1
