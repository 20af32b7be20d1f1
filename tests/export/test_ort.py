"""The ``ort`` dialects' own forms compute the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from refedge.export.ort import for_ort

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
