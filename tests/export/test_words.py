"""Folding attention to words is exact, is done where it pays, and leaves the parts' borders."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from refedge.calibration.placement import is_high
from refedge.data.refshapes.expressions import words
from refedge.export.graph import GraphIndex
from refedge.export.parity import measure
from refedge.export.words import Block, Fold, fold_words, pays
from refedge.models.checkpoint import open_model
from refedge.runtime.bundle import open_bundle

from .small_graphs import node, operators, run, small

T, C, E, SIDE, SLICES = 4, 6, 5, 7, 2
N = SIDE * SIDE
Feeds = dict[str, np.ndarray]


def parts(
    *, projected: bool = True, gated: bool = True, bias: bool = False, shared: bool = False
) -> dict[str, onnx.ModelProto]:
    """Two blocks in a row, as SLViT has them, and the text part that makes their values.

    shared: the first block's values have another reader.
    """
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    text_weights: Feeds = {"one": np.int64([1])}
    text_nodes, lifted = [], []
    for j in range(SLICES):
        text_weights[f"wv{j}"] = normal(E, C)
        text_nodes += [
            node("MatMul", ["states", f"wv{j}"], f"v{j}", f"block.{j}.value"),
            node("Unsqueeze", [f"v{j}", "one"], f"l{j}", f"block.{j}.value"),
        ]
        lifted.append(f"l{j}")
    text_nodes += [
        node("Concat", lifted, "stack", axis=1),
        node("Transpose", ["stack"], "values", perm=[0, 1, 3, 2]),
    ]
    text = small(text_nodes, {"states": ("batch", T, E)}, ["values"], text_weights)

    weights: Feeds = {
        "masked": np.float32(-1e4),
        "two": np.int64([2]),
        "flat": np.int64([-1, C, N]),
        "map": np.int64([-1, C, SIDE, SIDE]),
        "ones": np.ones(C, np.float32),
        "zeros": np.zeros(C, np.float32),
    }
    nodes = [node("Unsqueeze", ["words", "two"], "valid")]
    x = "x"
    for j in range(SLICES):
        weights |= {f"slot{j}": np.int64(j), f"k{j}": normal(T, C), f"wo{j}": normal(C, C, 1, 1)}
        weights |= {f"g{j}": normal(C, C, 1, 1), f"h{j}": normal(C, C, 1, 1), f"b{j}": normal(C)}
        module = f"block.{j}"
        nodes += [
            node("Gather", ["values", f"slot{j}"], f"u{j}", module, axis=1),
            node("Reshape", [x, "flat"], f"q{j}", module),
            node("MatMul", [f"k{j}", f"q{j}"], f"s{j}", module),
            node("Where", ["valid", f"s{j}", "masked"], f"w{j}", module),
            node("Softmax", [f"w{j}"], f"p{j}", module, axis=1),
            node("MatMul", [f"u{j}", f"p{j}"], f"c{j}", module),
            node("Reshape", [f"c{j}", "map"], f"m{j}", module),
        ]
        last = f"m{j}"
        if projected:
            nodes.append(node("Conv", [last, f"wo{j}", f"b{j}"], f"o{j}", f"{module}.W"))
            last = f"o{j}"
        nodes.append(node("InstanceNormalization", [last, "ones", "zeros"], f"n{j}", module))
        if gated:
            extra = [f"b{j}"] if bias else []
            nodes += [
                node("Conv", [f"n{j}", f"g{j}", *extra], f"a{j}", f"{module}.gate"),
                node("Relu", [f"a{j}"], f"r{j}", module),
                node("Conv", [f"r{j}", f"h{j}"], f"t{j}", module),
                node("Tanh", [f"t{j}"], f"e{j}", module),
                node("Mul", [f"e{j}", f"n{j}"], f"y{j}", module),
            ]
        else:
            nodes.append(node("Add", [f"n{j}", x], f"y{j}", module))
        x = f"y{j}"
    outputs = [x]
    if shared:
        nodes.append(node("ReduceSum", ["u0"], "seen"))
        outputs.append("seen")
    mask = small(
        nodes,
        {"x": ("batch", C, SIDE, SIDE), "words": ("batch", T), "values": ("batch", SLICES, C, T)},
        outputs,
        weights,
        {"words": TensorProto.BOOL},
    )
    return {"text": text, "mask": mask}


def feeds(case: str = "plain", batch: int = 2) -> Feeds:
    """Inputs of the whole; each case is one that statistics of the weights could fail at."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, C, SIDE, SIDE)).astype(np.float32)
    states = rng.normal(size=(batch, T, E)).astype(np.float32)
    words = np.arange(T)[None] < rng.integers(2, T + 1, (batch, 1))
    if case == "flat attention":
        x *= 1e-4
    elif case == "one word":
        words = np.broadcast_to(np.arange(T) < 1, (batch, T))
    elif case == "equal words":
        states = np.broadcast_to(states[:, :1], states.shape)
    elif case == "large mean":
        states = states * np.float32(1e-2) + np.float32(30.0)
    return {"x": x, "words": np.ascontiguousarray(words), "states": np.ascontiguousarray(states)}


def doubled(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return copy


def in_doubles(models: dict[str, onnx.ModelProto], host: Feeds) -> np.ndarray:
    """Both parts in float64, by onnx's reference evaluator."""
    wide = {n: v.astype(np.float64) if v.dtype == np.float32 else v for n, v in host.items()}
    (values,) = ReferenceEvaluator(doubled(models["text"])).run(None, {"states": wide["states"]})
    given = {"x": wide["x"], "words": wide["words"], "values": values}
    return np.asarray(ReferenceEvaluator(doubled(models["mask"])).run(None, given)[0])


def in_floats(models: dict[str, onnx.ModelProto], host: Feeds) -> np.ndarray:
    values = run(models["text"], {"states": host["states"]})["values"]
    outputs = run(models["mask"], {"x": host["x"], "words": host["words"], "values": values})
    return next(iter(outputs.values()))


def folded(models: dict[str, onnx.ModelProto]) -> list[Fold]:
    return fold_words(models, lambda block: True)


CASES = ("plain", "flat attention", "one word", "equal words", "large mean")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "form",
    [{}, {"bias": True}, {"gated": False}, {"projected": False}, {"shared": True}],
    ids=lambda form: "".join(form) or "slvit",
)
def test_folding_is_exact_in_doubles(form: dict[str, bool], case: str) -> None:
    host, models = feeds(case), parts(**form)
    wanted = in_doubles(models, host)
    folded(models)
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


def test_what_is_folded_is_gone() -> None:
    models = parts()
    done = folded(models)
    assert [f.folded for f in done] == [True, True]
    assert not {"InstanceNormalization", "Reshape_2"} & operators(models["mask"])
    names = [n.name for n in models["mask"].graph.node]
    assert len(set(names)) == len(names)
    # of three convolutions per block the last of the gate is left
    assert sum(n.op_type == "Conv" for n in models["mask"].graph.node) == SLICES
    index = GraphIndex(models["mask"])
    made = {o for n in index.nodes for o in n.output} - index.outputs
    assert {v.name for v in models["mask"].graph.value_info} >= made
    inferred = onnx.shape_inference.infer_shapes(models["mask"], strict_mode=True, data_prop=True)
    for name in made:
        assert GraphIndex(inferred).shape(name) == index.shape(name)


def test_the_text_part_projects_the_values() -> None:
    models = parts()
    borders = [(m.graph.input, m.graph.output) for m in parts().values()]
    work = sum(n.op_type == "MatMul" for n in models["text"].graph.node)
    done = folded(models)
    assert [f.moved for f in done] == [("values",)] * 2
    assert sum(n.op_type == "MatMul" for n in models["text"].graph.node) == work + SLICES
    for model, (inputs, outputs) in zip(models.values(), borders, strict=True):
        assert list(model.graph.input) == list(inputs)
        assert list(model.graph.output) == list(outputs)


def test_values_with_another_reader_stay_what_they_were() -> None:
    models = parts(shared=True)
    before = models["text"].SerializeToString(deterministic=True)
    done = folded(models)
    assert all(f.folded and not f.moved for f in done)
    assert models["text"].SerializeToString(deterministic=True) == before


def test_statistics_stay_in_float32_and_products_do_not() -> None:
    models = parts()
    folded(models)
    high = {n.name.split("/")[-1] for n in models["mask"].graph.node if is_high(n, ())}
    assert {"mean", "centred", "sums", "variance", "columns", "thin_0"} <= high
    assert not {"attended", "wide_0"} & high


def test_a_block_too_small_is_left_and_says_why() -> None:
    models = parts()
    before = models["mask"].SerializeToString(deterministic=True)
    done = fold_words(models)
    assert [f.folded for f in done] == [False, False]
    assert models["mask"].SerializeToString(deterministic=True) == before
    record = asdict(done[0])
    assert record["block"] == {
        "pixels": N, "channels": C, "words": T, "projection": C, "gates": (C,)
    }  # fmt: skip
    assert "µs" in record["why"]


def test_norms_of_other_things_are_not_touched() -> None:
    """A norm with weights of its own, and one behind a product that no softmax made."""
    models = parts()
    for tensor in models["mask"].graph.initializer:
        if tensor.name == "ones":
            tensor.CopyFrom(numpy_helper.from_array(np.full(C, 2.0, np.float32), "ones"))
    assert folded(models) == []
    models = parts()
    for n in models["mask"].graph.node:
        if n.op_type == "Softmax":
            n.op_type = "LogSoftmax"
    assert folded(models) == []


def test_paper_shapes_pay_and_the_fewer_words_the_more() -> None:
    for pixels, channels in ((14400, 64), (3600, 128), (900, 320), (225, 512)):
        assert pays(Block(pixels, channels, 20, channels, (channels,)))
        gains = [
            block.unfolded_us / block.folded_us
            for words in (8, 16, 32)
            for block in [Block(pixels, channels, words, channels, (channels,))]
        ]
        assert all(more > less for more, less in pairwise(gains))
    assert not pays(Block(9, 104, 20, 104, (104,)))


def test_a_folded_network_keeps_its_parity(bundle: Path, tmp_path: Path) -> None:
    """All blocks of the tiny SLViT, whether it pays or not."""
    manifest = open_bundle(bundle).manifest
    files = manifest.canonical.graphs
    models = {name: onnx.load(bundle / file) for name, file in files.items()}
    done = folded(models)
    assert len(done) == 7
    moved = {port for f in done for port in f.moved}
    assert moved == {f"values_{stage}" for stage in (1, 2, 3, 4)}
    paths = {name: tmp_path / f"{name}.onnx" for name in models}
    for name, model in models.items():
        onnx.save(model, paths[name])
    original = open_model("slvit-tiny", words())
    parity = measure(original.model, manifest.parts, paths, {"ort fp32": paths}, moved=moved)
    for row in parity["runs"].values():
        assert row["text"]["sigma"] < 1e-4
        assert row["mask"]["sigma"] < 1e-4
        assert row["end_to_end"]["iou"] >= 0.999
