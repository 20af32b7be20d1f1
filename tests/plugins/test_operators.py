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
from refedge.plugins.onnx_function import DOMAIN, OPSET, PLUGIN, attach, function, node

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
        given = {"x": normal(batch, pixels, width), "keys": normal(batch, width, heads, words)}
        given |= {"values": normal(batch, heads, words, out), "words": valid}
        return given | {"offset": normal(batch, heads, words)}
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
    opsets = [helper.make_opsetid("", OPSET)]
    model = attach(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    onnx.checker.check_model(model)
    return on_runtime(model, fed)


def on_runtime(model: onnx.ModelProto, fed: Feeds) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(None, fed)
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
        for dtype in ("float32", "float16", "bfloat16"):
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


class AllOperators(torch.nn.Module):
    """Each operator once; the inputs of one after those of another."""

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out: list[torch.Tensor] = []
        rest = list(given)
        for operator in REFERENCES:
            taken = [rest.pop(0) for _ in range(COUNTS[operator])]
            found = torch_op.apply(operator, *taken)
            out += found if isinstance(found, tuple) else [found]
        return tuple(out)


COUNTS = {"CrossAttention": 5, "NormAttention": 6, "MutualAttention": 5}


def test_torch_exports_one_node_each() -> None:
    """As ``export.from_torch`` exports, with a dynamic batch; run at another than was traced."""
    feeds = {o: inputs(o, 3, 20, 5, 2, seed) for seed, o in enumerate(REFERENCES)}
    flat = {f"{o}_{n}": v for o, given in feeds.items() for n, v in given.items()}
    traced = tuple(torch.from_numpy(v[:2]) for v in flat.values())
    # weights of the gate have no batch
    batch = torch.export.Dim("batch", min=1, max=8)
    sizes = tuple({} if n.endswith(("first", "second")) else {0: batch} for n in flat)
    traced = tuple(
        torch.from_numpy(v) if not size else t for v, size, t in
        zip(flat.values(), sizes, traced, strict=True)
    )  # fmt: skip
    with torch.no_grad():
        program = torch.onnx.export(
            AllOperators(), traced, dynamo=True, opset_version=OPSET, optimize=True,
            verbose=False, input_names=list(flat), dynamic_shapes=(sizes,),
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    assert [(n.domain, n.op_type) for n in model.graph.node] == [
        (DOMAIN, f"{operator}_float32") for operator in REFERENCES
    ]
    for item in model.graph.node:
        settings = {a.name: helper.get_attribute_value(a).decode() for a in item.attribute}
        assert settings == PLUGIN
    attach(model)
    onnx.checker.check_model(model, full_check=True)
    found = on_runtime(model, flat)
    wanted = [value for o, given in feeds.items() for value in expected(o, given)]
    for mine, value in zip(found, wanted, strict=True):
        size = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(mine, value, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("operator", list(REFERENCES))
def test_bfloat16_is_well_typed(operator: str) -> None:
    """ONNX Runtime's processor kernels have no such product, so types are all that is checked."""
    feeds = inputs(operator, 1, 9, 4, 2, 0)
    half = TensorProto.BFLOAT16
    outputs = [f"out{i}" for i in range(len(RANKS[operator]))]
    graph = helper.make_graph(
        [node(operator, list(feeds), outputs, "bfloat16")],
        "one",
        [
            helper.make_tensor_value_info(n, TensorProto.BOOL if v.dtype == bool else half, v.shape)
            for n, v in feeds.items()
        ],
        [
            helper.make_tensor_value_info(n, half if i == 0 else TensorProto.FLOAT, [None] * rank)
            for i, (n, rank) in enumerate(zip(outputs, RANKS[operator], strict=True))
        ],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = attach(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    onnx.checker.check_model(model, full_check=True)
    assert [f.name for f in model.functions] == [f"{operator}_bfloat16"]
