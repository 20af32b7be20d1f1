"""The ``ort`` dialects' own forms compute the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from refedge.export.ort import for_ort
from refedge.export.weights import split_weights

from .small_graphs import node, run, small


def masked(axis: int, value: float = -1e4) -> onnx.ModelProto:
    return small(
        [
            node("Where", ["words", "scores", "masked"], "w"),
            node("Softmax", ["w"], "y", axis=axis),
        ],
        {"scores": ("batch", 5, 7), "words": ("batch", 5, 7)},
        ["y"],
        {"masked": np.float32(value)},
        {"words": TensorProto.BOOL},
    )


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shift", [0.0, -2e3, 2e3])
def test_floored_scores_give_the_same_weights(axis: int, shift: float) -> None:
    rng = np.random.default_rng(0)
    scores = (rng.normal(size=(2, 5, 7)) * 20 + shift).astype(np.float32)
    words = rng.random((2, 5, 7)) < 0.6
    words[:, 0, :] = words[:, :, 0] = True
    model = masked(axis)
    x = {"scores": scores, "words": words}
    found = run(model, x)["y"]
    for_ort(model)
    onnx.checker.check_model(model, full_check=True)
    weights = run(model, x)["y"]
    np.testing.assert_allclose(weights, found, rtol=1e-6, atol=1e-12)
    assert weights.min() > np.finfo(np.float32).tiny  # nothing falls out of the fast path


def test_a_softmax_without_a_mask_stays() -> None:
    model = masked(1, 0.0)
    before = model.SerializeToString(deterministic=True)
    assert for_ort(model).SerializeToString(deterministic=True) == before


def kinds(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def checked(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> float:
    """Largest difference that the rules make for random inputs, beside the largest value."""
    rng = np.random.default_rng(seed)
    x = {name: rng.normal(size=dims).astype(np.float32) for name, dims in shapes.items()}
    x |= {n: (rng.random(d) * 255).astype(np.uint8) for n, d in shapes.items() if n == "pixels"}
    found = run(model, x)
    for_ort(model)
    onnx.checker.check_model(model, full_check=True)
    after = run(model, x)
    return max(float(np.abs(after[k] - found[k]).max() / np.abs(found[k]).max()) for k in found)


def integers(name: str, step: float = 0.02) -> list[onnx.NodeProto]:
    """``name`` as int8 and back, which is ``name/real``."""
    return [
        node("QuantizeLinear", [name, "step", "zero"], f"{name}/int8"),
        node("DequantizeLinear", [f"{name}/int8", "step", "zero"], f"{name}/real"),
    ]


STEP = {"step": np.float32(0.02), "zero": np.int8(0)}


def pixels(quantized: bool, mean: np.ndarray) -> onnx.ModelProto:
    steps = [
        node("Cast", ["pixels"], "real", to=TensorProto.FLOAT),
        node("Transpose", ["real"], "turned", perm=[0, 3, 1, 2]),
        node("Mul", ["turned", "scale"], "scaled"),
        node("Sub", ["scaled", "mean"], "x"),
    ]
    out = "x/real" if quantized else "x"
    return small(
        [*steps, *(integers("x") if quantized else [])],
        {"pixels": ("batch", 6, 8, 3)},
        [out],
        {"scale": np.float32(1 / 255), "mean": mean.astype(np.float32), **STEP},
        {"pixels": TensorProto.UINT8},
    )


MEAN = np.array([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)


def test_a_picture_is_normalised_row_by_row() -> None:
    model = pixels(True, MEAN)
    assert checked(model, {"pixels": (2, 6, 8, 3)}) == 0.0
    order = ["Cast", "Reshape", "Mul", "Sub", "Reshape", "Transpose"]
    assert kinds(model)[: len(order)] == order


@pytest.mark.parametrize(("quantized", "mean"), [(False, MEAN), (True, np.array(0.5))])
def test_a_picture_stays_where_rows_bring_nothing(quantized: bool, mean: np.ndarray) -> None:
    model = pixels(quantized, mean)
    assert checked(model, {"pixels": (1, 6, 8, 3)}) == 0.0
    assert kinds(model)[:3] == ["Cast", "Transpose", "Mul"]


def upsampled(
    height: int, width: int, mode: str = "linear", corners: str = "half_pixel", after: int = 12
) -> onnx.ModelProto:
    return small(
        [
            *integers("x"),
            node(
                "Resize",
                ["x/real", "", "", "sizes"],
                "up",
                mode=mode,
                coordinate_transformation_mode=corners,
            ),
            node("Add", ["up", "y"], "z"),
        ],
        {"x": ("batch", 5, height, width), "y": ("batch", 5, after, 2 * after)},
        ["z"],
        {"sizes": np.array([1, 5, after, 2 * after]), **STEP},
    )


@pytest.mark.parametrize("corners", ["half_pixel", "pytorch_half_pixel"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (6, 24), (12, 8), (4, 1)])
def test_integers_are_upsampled_by_products(height: int, width: int, corners: str) -> None:
    model = upsampled(height, width, corners=corners)
    shapes = {"x": (1, 5, height, width), "y": (1, 5, 12, 24)}
    assert checked(model, shapes) < 1e-6
    assert "Resize" not in kinds(model)
    assert kinds(model).count("MatMul") == 2


@pytest.mark.parametrize(
    "model",
    [
        upsampled(3, 2, mode="nearest"),
        upsampled(3, 2, corners="align_corners"),
        upsampled(5, 7),
    ],
)
def test_other_resizes_stay(model: onnx.ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    assert for_ort(model).SerializeToString(deterministic=True) == before


def test_a_resize_of_floats_stays() -> None:
    model = upsampled(3, 2)
    del model.graph.node[:2]
    model.graph.node[0].input[0] = "x"
    assert "Resize" in kinds(for_ort(model))


def test_a_resize_between_integers_stays() -> None:
    model = upsampled(3, 2)
    model.graph.node[-1].CopyFrom(node("QuantizeLinear", ["up", "step", "zero"], "z"))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT8
    assert "Resize" in kinds(for_ort(model))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_sum_of_upsampled_maps_is_one_product(batch: int) -> None:
    """``((y + up(a)) + up(b)) + up(c)``, as the squeeze of SLViT."""
    sizes = {"a": 2, "b": 4, "c": 6}
    steps = [step for name in sizes for step in integers(name)]
    steps += [node("Resize", [f"{n}/real", "", f"{n}/by"], f"{n}/up", mode="linear") for n in sizes]
    total = "y"
    for name in sizes:
        steps.append(node("Add", [total, f"{name}/up"], f"{name}/sum"))
        total = f"{name}/sum"
    model = small(
        steps,
        {n: ("batch", 5, s, s) for n, s in sizes.items()} | {"y": ("batch", 5, 12, 12)},
        [total],
        {f"{n}/by": np.array([1, 1, 12 / s, 12 / s], np.float32) for n, s in sizes.items()} | STEP,
    )
    shapes = {n: (batch, 5, s, s) for n, s in sizes.items()} | {"y": (batch, 5, 12, 12)}
    assert checked(model, shapes) < 1e-6
    found = kinds(model)
    assert [found.count(k) for k in ("MatMul", "Concat", "Add", "Resize")] == [4, 1, 1, 0]


def test_products_of_floats_stay_though_their_weights_lie_elsewhere() -> None:
    rng = np.random.default_rng(0)
    model = small(
        [
            node("MatMul", ["a", "x"], "u"),
            node("MatMul", ["b", "y"], "v"),
            node("Add", ["u", "v"], "z"),
        ],
        {"x": ("batch", 32, 4), "y": ("batch", 32, 4)},
        ["z"],
        {n: rng.normal(size=(32, 32)).astype(np.float32) for n in ("a", "b")},
    )
    split_weights(model)
    assert kinds(for_ort(model)) == ["MatMul", "MatMul", "Add"]


def test_a_sum_of_products_of_unknown_shape_stays() -> None:
    model = upsampled(3, 2)
    products = [node("MatMul", ["m", "x/real"], "u"), node("MatMul", ["m", "x/again"], "v")]
    again = node("DequantizeLinear", ["x/int8", "step", "zero"], "x/again")
    del model.graph.node[2:]
    model.graph.node.extend([again, *products, node("Add", ["u", "v"], "z")])
    model.graph.initializer.append(numpy_helper.from_array(np.eye(3, dtype=np.float32), "m"))
    del model.graph.value_info[:]
    assert kinds(for_ort(model))[-3:] == ["MatMul", "MatMul", "Add"]


def affine(shift: tuple[int, ...]) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    return small(
        [node("Mul", ["x", "scale"], "scaled"), node("Add", ["scaled", "shift"], "y")],
        {"x": ("batch", 5, 3, 4)},
        ["y"],
        {
            "scale": rng.normal(size=(5, 1, 1)).astype(np.float32),
            "shift": rng.normal(size=shift).astype(np.float32),
        },
    )


def test_a_number_per_channel_times_and_plus_is_one_pass() -> None:
    model = affine((5, 1, 1))
    assert checked(model, {"x": (2, 5, 3, 4)}) < 1e-6
    assert kinds(model) == ["Reshape", "Reshape", "BatchNormalization"]


def test_what_is_no_affine_of_channels_stays() -> None:
    model = affine((5, 3, 4))
    assert checked(model, {"x": (2, 5, 3, 4)}) == 0.0
    assert kinds(model) == ["Mul", "Add"]
