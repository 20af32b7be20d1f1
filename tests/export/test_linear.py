"""Reordering is exact: the same function before and after, for fewer multiplications."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from refedge.calibration.placement import macs
from refedge.export.graph import GraphIndex
from refedge.export.linear import reorder

from .small_graphs import node, run, small

RANK, WIDTH, OUT, SIZE = 3, 8, 6, (5, 4)
PIXELS = SIZE[0] * SIZE[1]


def rebuilt(bias: bool = True, rank: int = RANK) -> onnx.ModelProto:
    """``relu(x + conv(a @ c^T))`` and a convolution of it, as the Hamburger has them."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(OUT, WIDTH, 1, 1)).astype(np.float32),
        "v": rng.normal(size=(2, OUT, 1, 1)).astype(np.float32),
        "shape": np.int64([-1, WIDTH, *SIZE]),
    }
    if bias:
        weights["b"] = rng.normal(size=OUT).astype(np.float32)
    return small(
        [
            node("Transpose", ["c"], "t", perm=[0, 2, 1]),
            node("MatMul", ["a", "t"], "p", "ham"),
            node("Reshape", ["p", "shape"], "m", "ham"),
            node("Conv", ["m", "w", *(["b"] if bias else [])], "o", "out"),
            node("Add", ["x", "o"], "s"),
            node("Relu", ["s"], "r"),
            node("Conv", ["r", "v"], "y"),
        ],
        {
            "a": ("batch", WIDTH, rank),
            "c": ("batch", PIXELS, rank),
            "x": ("batch", OUT, *SIZE),
        },
        ["y"],
        weights,
    )


def feeds(batch: int, rank: int = RANK) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"a": (WIDTH, rank), "c": (PIXELS, rank), "x": (OUT, *SIZE)}
    return {n: rng.normal(size=(batch, *s)).astype(np.float32) for n, s in shapes.items()}


def work(model: onnx.ModelProto) -> int:
    index = GraphIndex(model)
    return sum(macs(index, n) for n in index.nodes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_convolution_of_a_thin_product(bias: bool, batch: int) -> None:
    model = rebuilt(bias)
    found, before = run(model, feeds(batch))["y"], work(model)
    reorder(model)
    onnx.checker.check_model(model, full_check=True)
    # sums of 8 and 3 terms in another order
    np.testing.assert_allclose(run(model, feeds(batch))["y"], found, rtol=1e-4, atol=1e-5)
    spared = WIDTH * PIXELS * (RANK + OUT) - RANK * OUT * (WIDTH + PIXELS)
    assert work(model) == before - spared
    index = GraphIndex(model)
    assert [n.op_type for n in index.nodes].count("Conv") == 1
    # rows of channels up to the next convolution, and every tensor's shape is known
    (conv,) = (n for n in index.nodes if n.op_type == "Conv")
    assert index.maker[conv.input[0]].op_type == "Transpose"
    assert index.maker[index.maker[conv.input[0]].input[0]].op_type == "Relu"
    made = {o for n in index.nodes for o in n.output} - index.outputs
    assert {v.name for v in model.graph.value_info} >= made
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    for name in made:
        assert GraphIndex(inferred).shape(name) == index.shape(name)


def test_products_stay_in_their_module() -> None:
    """What a model keeps in float32 stays there."""
    model = reorder(rebuilt())
    modules = {n.metadata_props[0].value for n in model.graph.node if n.op_type == "MatMul"}
    assert modules == {"ham"}


def test_a_thick_product_stays() -> None:
    """7 columns would cost more than they spare."""
    model = rebuilt(rank=7)
    before = model.SerializeToString(deterministic=True)
    assert reorder(model).SerializeToString(deterministic=True) == before


def test_a_constant_factor_is_a_matrix_of_its_own() -> None:
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(1, 4, 3)).astype(np.float32)
    model = small(
        [node("MatMul", ["x", "f"], "m"), node("Mul", ["m", "f"], "y")],
        {"x": ("batch", 4, 4)},
        ["y"],
        {"f": factor},
    )
    x = {"x": rng.normal(size=(2, 4, 4)).astype(np.float32)}
    found = run(model, x)["y"]
    reorder(model)
    np.testing.assert_array_equal(run(model, x)["y"], found)
    index = GraphIndex(model)
    product = next(n for n in index.nodes if n.op_type == "MatMul")
    assert index.constant(product.input[1]).shape == (4, 3)
    assert "f" in index.tensors  # for its other reader
