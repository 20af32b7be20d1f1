"""One definition, three faces: the NumPy reference, the ONNX functions and the torch operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from refedge.plugins import reference, torch_op
from refedge.plugins.onnx_function import DOMAIN, OPSET, function, node

Feeds = dict[str, np.ndarray]
REFERENCES: dict[str, Callable[..., Any]] = {
    "CrossAttention": reference.cross_attention,
    "NormAttention": reference.norm_attention,
    "MutualAttention": reference.mutual_attention,
}

RANKS = {"CrossAttention": (3,), "NormAttention": (3, 2), "MutualAttention": (3, 3)}


def inputs(operator: str, batch: int, pixels: int, words: int, heads: int, seed: int) -> Feeds:
    """Random inputs of an operator in its order; at least one word each."""
    rng = np.random.default_rng(seed)
    depth, width, out = 4, 6, 5

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    valid = np.arange(words)[None] < rng.integers(1, words + 1, (batch, 1))
    if operator == "CrossAttention":
        keys, values = normal(batch, heads, width, words), normal(batch, heads, words, out)
        return {"x": normal(batch, pixels, width), "keys": keys, "values": values, "words": valid}
    if operator == "NormAttention":
        given = {"query": normal(batch, width, pixels), "keys": normal(batch, words, width)}
        given |= {"values": normal(batch, width, words), "words": valid}
        return given | {"first": normal(width, width), "second": normal(width, width)}
    given = {
        "keys": normal(batch, heads, words, depth),
        "values": normal(batch, heads, words, depth),
    }
    seen = {"seen_keys": normal(batch, heads, depth, pixels)}
    return given | {"words": valid} | seen | {"seen_values": normal(batch, heads, pixels, depth)}


def by_onnx(operator: str, feeds: Feeds, dtype: str = "float32") -> list[np.ndarray]:
    """A model of one node and its function, on ONNX Runtime."""
    kind = TensorProto.FLOAT if dtype == "float32" else TensorProto.FLOAT16
    fed = {n: v if v.dtype == bool else v.astype(dtype) for n, v in feeds.items()}
    outputs = [f"out{i}" for i in range(len(RANKS[operator]))]
    graph = helper.make_graph(
        [node(operator, list(fed), outputs, dtype)],
        "one",
        [
            helper.make_tensor_value_info(n, TensorProto.BOOL if v.dtype == bool else kind, v.shape)
            for n, v in fed.items()
        ],
        [
            helper.make_tensor_value_info(n, kind if i == 0 else TensorProto.FLOAT, [None] * rank)
            for i, (n, rank) in enumerate(zip(outputs, RANKS[operator], strict=True))
        ],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        graph, opset_imports=opsets, functions=[function(operator, dtype)], ir_version=10
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(outputs, fed)
    return found


def expected(operator: str, feeds: Feeds) -> list[np.ndarray]:
    found = REFERENCES[operator](*feeds.values())
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("operator", list(REFERENCES))
@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 3),
    pixels=st.integers(2, 40),
    words=st.integers(1, 8),
    heads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_the_faces_agree(
    operator: str, batch: int, pixels: int, words: int, heads: int, seed: int
) -> None:
    feeds = inputs(operator, batch, pixels, words, heads, seed)
    wanted = expected(operator, feeds)
    ran = torch_op.apply(operator, *(torch.from_numpy(v) for v in feeds.values()))
    by_torch = [t.numpy() for t in (ran if isinstance(ran, tuple) else (ran,))]
    for face in (by_onnx(operator, feeds), by_torch):
        for found, value in zip(face, wanted, strict=True):
            assert found.shape == value.shape
            np.testing.assert_allclose(
                found, value, rtol=1e-3, atol=1e-4 * max(1, np.abs(value).max())
            )


@pytest.mark.parametrize("operator", list(REFERENCES))
def test_half_precision_keeps_what_a_flat_attention_holds(operator: str) -> None:
    """Centred before it is rounded: scores a hundredth apart still give the reference's map."""
    feeds = inputs(operator, 1, 64, 4, 2, 0)
    for name in ("x", "query", "seen_keys"):
        if name in feeds:
            feeds[name] *= 1e-2
    for found, value in zip(
        by_onnx(operator, feeds, "float16"), expected(operator, feeds), strict=True
    ):
        np.testing.assert_allclose(found, value, atol=2e-2 * np.abs(value).max())


def test_functions_cast_to_a_named_type() -> None:
    for operator in REFERENCES:
        for dtype in ("float32", "float16"):
            kinds = {n.op_type for n in function(operator, dtype).node}
            assert "CastLike" not in kinds


def test_padded_words_take_no_part() -> None:
    feeds = inputs("NormAttention", 2, 9, 5, 1, 3)
    wanted = expected("NormAttention", feeds)
    padded = ~feeds["words"]
    feeds["keys"][padded] = 50.0
    feeds["values"].transpose(0, 2, 1)[padded] = 50.0
    for found, value in zip(expected("NormAttention", feeds), wanted, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-12)
    for found, value in zip(by_onnx("NormAttention", feeds), wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-3)
