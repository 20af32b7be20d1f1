"""Channels are scaled and nothing changes: every kind of writer, reader and passage."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refedge.export.equalize import Stream, equalize, streams
from refedge.export.fuse import fuse
from refedge.export.graph import GraphIndex
from refedge.runtime.plan import ChannelScale

from .small_graphs import node, run, small
from .test_fuse import given as fuse_inputs
from .test_fuse import mask_part, with_functions

C = 4
RNG = np.random.default_rng(3)


def weights(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def network() -> onnx.ModelProto:
    """A stem, a residual block with a depthwise branch and a gate, norms of both kinds, a head."""
    kernel = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    return small(
        [
            node("Conv", ["x", "w0", "b0"], "stem", **kernel),
            node("Conv", ["stem", "w1", "b1"], "wide"),
            node("Relu", ["wide"], "rectified"),
            node("Conv", ["rectified", "w2", "b2"], "deep", group=2 * C, **kernel),
            node("Conv", ["deep", "w3"], "thin"),
            node("Gelu", ["stem"], "smooth"),
            node("Mul", ["thin", "smooth"], "gated"),
            node("Conv", ["gated", "w4"], "branch"),
            node("Add", ["stem", "branch"], "sum"),
            node("Add", ["sum", "shift"], "shifted"),
            node("Conv", ["shifted", "w5"], "query"),
            node("InstanceNormalization", ["query", "ones", "zeros"], "normal", epsilon=1e-12),
            node("Conv", ["normal", "w6"], "mapped"),
            node("Add", ["mapped", "shifted"], "out"),
            node("Transpose", ["out"], "last", perm=[0, 2, 3, 1]),
            node("Reshape", ["last", "rows"], "tokens"),
            node("LayerNormalization", ["tokens", "scale", "offset"], "even", axis=-1),
            node("MatMul", ["even", "w7"], "found"),
            node("Softmax", ["found"], "y", axis=-1),
        ],
        {"x": ("batch", 3, 6, 6)},
        ["y"],
        {
            "w0": weights(C, 3, 3, 3),
            "b0": weights(C),
            "w1": weights(2 * C, C, 1, 1),
            "b1": weights(2 * C),
            "w2": weights(2 * C, 1, 3, 3),
            "b2": weights(2 * C),
            "w3": weights(C, 2 * C, 1, 1),
            "w4": weights(C, C, 1, 1),
            "shift": weights(1, C, 1, 1),
            "w5": weights(C, C, 1, 1),
            "ones": np.ones(C, np.float32),
            "zeros": np.zeros(C, np.float32),
            "w6": weights(C, C, 1, 1),
            "rows": np.array([0, 36, C], np.int64),
            "scale": weights(C),
            "offset": weights(C),
            "w7": weights(C, C),
        },
    )


def scaled(found: list[Stream], model: onnx.ModelProto, seed: int) -> list[ChannelScale]:
    rng, index = np.random.default_rng(seed), GraphIndex(model)
    made = []
    for stream in found:
        name, axis = next(iter(stream.tensors.items()))
        factors = 2.0 ** rng.uniform(0.0, 6.0, (index.shape(name) or ())[axis])
        made.append(
            ChannelScale(stream.tensors, tuple(factors.tolist()), stream.readers, stream.writers)
        )
    return made


def test_what_is_one_stream() -> None:
    """Through sums and rectifiers, up to weights; who cannot take a factor is named."""
    found = {frozenset(s.tensors): s for s in streams(GraphIndex(network()))}
    names = {"stem", "branch", "sum", "shifted", "mapped", "out", "last", "tokens"}
    residual = found[frozenset(names)]
    assert residual.readers == ("stem", "tokens")  # for a Gelu and a norm over channels
    assert residual.writers == ()
    assert [residual.tensors[n] for n in ("stem", "last", "tokens")] == [1, 3, 2]
    assert frozenset({"wide", "rectified"}) in found
    assert frozenset({"deep"}) in found
    assert found[frozenset({"thin", "gated"})].readers == ()
    assert found[frozenset({"query"})] == Stream({"query": 1})
    assert found[frozenset({"even"})] == Stream({"even": 2})
    assert not any("smooth" in tensors for tensors in found)  # no weights on either side


def test_outputs_keep_their_size() -> None:
    """A stream that reaches an output of the graph is none."""
    model = network()
    model.graph.output.append(onnx.helper.make_tensor_value_info("tokens", 1, [None, 36, C]))
    assert not any("stem" in s.tensors for s in streams(GraphIndex(model)))


@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_no_output_changes(seed: int) -> None:
    """Factors up to 64 on every stream at once; float32 rounds each of some ten layers."""
    model = network()
    scales = scaled(streams(GraphIndex(model)), model, seed)
    x = np.random.default_rng(seed).normal(size=(2, 3, 6, 6)).astype(np.float32)
    wanted, got = run(model, {"x": x}), run(equalize(model, scales), {"x": x})
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=2e-4, atol=2e-4)


def test_the_named_tensors_are_larger_by_their_factors() -> None:
    model = network()
    scales = scaled(streams(GraphIndex(model)), model, 1)
    by_name = {n: (a, np.array(s.factors)) for s in scales for n, a in s.tensors.items()}
    kinds = dict.fromkeys(by_name, onnx.TensorProto.FLOAT)
    x = {"x": weights(1, 3, 6, 6)}
    before, after = run(model, x, kinds), run(equalize(model, scales), x, kinds)
    for name, (axis, factors) in by_name.items():
        along = factors.reshape([-1 if i == axis else 1 for i in range(before[name].ndim)])
        np.testing.assert_allclose(after[name], before[name] * along, rtol=1e-3, atol=1e-3)


ODD: dict[str, tuple[list[onnx.NodeProto], dict[str, tuple[int, ...]]]] = {
    "grouped": (
        [node("Conv", ["x", "a"], "h"), node("Conv", ["h", "b"], "y", group=2)],
        {"a": (C, 3, 1, 1), "b": (C, C // 2, 1, 1)},
    ),
    "several kernels a channel": (
        [node("Conv", ["x", "a"], "h"), node("Conv", ["h", "b"], "y", group=C)],
        {"a": (C, 3, 1, 1), "b": (2 * C, 1, 1, 1)},
    ),
    "squared": (
        [
            node("Conv", ["x", "a"], "h"),
            node("Mul", ["h", "h"], "m"),
            node("Conv", ["m", "b"], "y"),
        ],
        {"a": (C, 3, 1, 1), "b": (2, C, 1, 1)},
    ),
    "transposed by default": (
        [node("Conv", ["x", "a"], "h"), node("Transpose", ["h"], "t"), node("Relu", ["t"], "y")],
        {"a": (C, 3, 1, 1)},
    ),
    "transposed and added to itself": (
        [
            node("Conv", ["x", "a"], "h"),
            node("Transpose", ["h"], "t", perm=[0, 3, 2, 1]),
            node("Add", ["h", "t"], "s"),
            node("Conv", ["s", "b"], "y"),
        ],
        {"a": (6, 3, 1, 1), "b": (2, 6, 1, 1)},
    ),
    "shared weights, one map with a reader of its own": (
        [
            node("Conv", ["x", "a"], "h"),
            node("Conv", ["h", "b"], "p"),
            node("Conv", ["p", "b"], "q"),
            node("Gelu", ["h"], "g"),
            node("Add", ["g", "q"], "y"),
        ],
        {"a": (C, 3, 1, 1), "b": (C, C, 1, 1)},
    ),
    "a constant first": (
        [
            node("Conv", ["x", "a"], "h"),
            node("Add", ["c", "h"], "s"),
            node("Conv", ["s", "b"], "y"),
        ],
        {"a": (C, 3, 1, 1), "b": (2, C, 1, 1), "c": (C, 1, 1)},
    ),
    "a constant alone": (
        [
            node("Conv", ["c", "a"], "k"),
            node("Conv", ["x", "b"], "h"),
            node("Add", ["h", "k"], "y"),
        ],
        {"a": (C, 3, 1, 1), "b": (C, 3, 1, 1), "c": (1, 3, 6, 6)},
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_graphs_compute_the_same(name: str) -> None:
    """Where factors cannot go, none are asked for; where they can, nothing changes."""
    nodes, shapes = ODD[name]
    model = small(
        nodes, {"x": ("batch", 3, 6, 6)}, ["y"], {n: weights(*s) for n, s in shapes.items()}
    )
    changed = equalize(model, scaled(streams(GraphIndex(model)), model, 5))
    x = {"x": weights(1, 3, 6, 6)}
    np.testing.assert_allclose(run(changed, x)["y"], run(model, x)["y"], rtol=2e-4, atol=2e-4)


def test_one_dimensional_convolutions_are_left_alone() -> None:
    model = small(
        [node("Conv", ["x", "a"], "h"), node("Conv", ["h", "b"], "y")],
        {"x": ("batch", 3, 6)},
        ["y"],
        {"a": weights(C, 3, 1), "b": weights(2, C, 1)},
    )
    assert streams(GraphIndex(model)) == []


def test_shared_constants_stay_what_they_were() -> None:
    """Two norms share a scale of ones; one of them gets factors."""
    model = small(
        [
            node("InstanceNormalization", ["x", "ones", "zeros"], "a"),
            node("InstanceNormalization", ["x", "ones", "zeros"], "b"),
            node("Conv", ["a", "w"], "y"),
        ],
        {"x": ("batch", C, 5, 5)},
        ["y", "b"],
        {
            "ones": np.ones(C, np.float32),
            "zeros": np.zeros(C, np.float32),
            "w": weights(C, C, 1, 1),
        },
    )
    scale = ChannelScale({"a": 1}, (1.0, 2.0, 4.0, 8.0))
    x = {"x": weights(1, C, 5, 5)}
    wanted, got = run(model, x), run(equalize(model, [scale]), x)
    np.testing.assert_array_equal(got["b"], wanted["b"])
    np.testing.assert_allclose(got["y"], wanted["y"], rtol=1e-5, atol=1e-5)


def test_what_no_factor_touches_stays_byte_by_byte() -> None:
    """Weights that two convolutions share are not split by factors elsewhere, or by none."""
    nodes, shapes = ODD["shared weights, one map with a reader of its own"]
    constants = {name: weights(*shape) for name, shape in shapes.items()}
    model = small(nodes, {"x": ("batch", 3, 6, 6)}, ["y"], constants)
    assert equalize(model, []) == model


def test_a_block_of_attention_is_still_one_node() -> None:
    """Dialects with the plugin fuse what equalization has gone over."""
    model = mask_part(folded=False)
    every = streams(GraphIndex(model))
    found = [s for s in every if len(s.tensors) > len(s.readers) + len(s.writers)]
    changed = equalize(model, scaled(found, model, 2))
    nodes = len(fuse(mask_part(folded=False)))
    assert len(fuse(changed)) == nodes > 0
    inputs = fuse_inputs()
    wanted, got = run(model, inputs), run(with_functions(changed), inputs)
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=2e-3, atol=2e-3)
