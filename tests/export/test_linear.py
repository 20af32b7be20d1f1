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


def require_declared(model: onnx.ModelProto) -> None:
    """Every tensor has the shape that onnx infers."""
    index = GraphIndex(model)
    made = {o for n in index.nodes for o in n.output} - index.outputs
    assert {v.name for v in model.graph.value_info} >= made
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    for name in made:
        assert GraphIndex(inferred).shape(name) == index.shape(name)


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
    require_declared(model)


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


SIDES = {"a": 8, "b": 4, "c": 2}  # of maps that are brought to the size of the first
WIDTHS = {"a": 3, "b": 6, "c": 5}


def pyramid(bias: bool, large: tuple[str, ...] = ("a",), mode: str = "linear") -> onnx.ModelProto:
    """A 1x1 convolution of three maps at the size of the largest, as a decoder begins."""
    rng = np.random.default_rng(0)
    names = [n for n in "abc" if n in (*large, "b", "c")]
    width = sum(WIDTHS[n] for n in names)
    weights = {
        "w": rng.normal(size=(2, width, 1, 1)).astype(np.float32),
        **{f"scales_{n}": np.float32([1, 1, 8 / SIDES[n], 8 / SIDES[n]]) for n in "bc"},
    }
    if bias:
        weights["v"] = rng.normal(size=2).astype(np.float32)
    ups = [
        node("Resize", [n, "", f"scales_{n}"], f"up_{n}", mode=mode,
             coordinate_transformation_mode="half_pixel")
        for n in "bc"
    ]  # fmt: skip
    merged = ["up_c", *(n for n in large), "up_b"]
    conv = node("Conv", ["m", "w", *(["v"] if bias else [])], "o", "squeeze")
    return small(
        [*ups, node("Concat", merged, "m", axis=1), conv, node("Relu", ["o"], "y")],
        {n: ("batch", WIDTHS[n], SIDES[n], SIDES[n]) for n in names},
        ["y"],
        weights,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("large", [("a",), ()], ids=["with the largest", "upsampled alone"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_a_convolution_comes_before_the_upsampling(
    bias: bool, large: tuple[str, ...], mode: str
) -> None:
    model = pyramid(bias, large, mode)
    rng = np.random.default_rng(1)
    x = {
        v.name: rng.normal(size=(2, WIDTHS[v.name], SIDES[v.name], SIDES[v.name])).astype(
            np.float32
        )
        for v in model.graph.input
    }
    found, before = run(model, x)["y"], work(model)
    reorder(model)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model, x)["y"], found, rtol=1e-4, atol=1e-5)
    kept = 2 * WIDTHS["a"] * 64 if large else 0
    assert work(model) == kept + 2 * (WIDTHS["b"] * 16 + WIDTHS["c"] * 4) < before
    index = GraphIndex(model)
    assert all(
        index.maker[n.input[0]].op_type == "Conv" for n in index.nodes if n.op_type == "Resize"
    )
    require_declared(model)


def test_few_channels_are_upsampled_first() -> None:
    """To 200 channels from 3: upsampling them all would cost more than the multiplications."""
    rng = np.random.default_rng(0)
    model = small(
        [
            node("Resize", ["x", "", "scales"], "u", mode="linear"),
            node("Conv", ["u", "w"], "y"),
        ],
        {"x": ("batch", 3, 4, 4)},
        ["y"],
        {
            "scales": np.float32([1, 1, 2, 2]),
            "w": rng.normal(size=(200, 3, 1, 1)).astype(np.float32),
        },
    )
    before = model.SerializeToString(deterministic=True)
    assert reorder(model).SerializeToString(deterministic=True) == before
