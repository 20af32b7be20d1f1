from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from refedge.calibration.naive import naive_placement
from refedge.calibration.placement import Placement, macs, place, weighted_macs
from refedge.export.canonical import module_of
from refedge.export.graph import GraphIndex
from refedge.export.qdq import write_qdq
from refedge.export.targets import lint_qdq
from refedge.runtime.bundle import open_bundle
from refedge.runtime.plan import PartPlan, WeightScale

from ..export.small_graphs import node, run, small

W = np.eye(4, dtype=np.float32)
K = np.ones((4, 4, 1, 1), np.float32)
MAP = ("batch", 4, 6, 6)


def placed(model: onnx.ModelProto, *high: str, spared: frozenset[str] = frozenset()) -> Placement:
    return place(GraphIndex(model), high, spared)


def name_of(model: onnx.ModelProto, output: str) -> str:
    return next(n.name for n in model.graph.node if output in n.output)


def plan_of(found: Placement, model: onnx.ModelProto) -> PartPlan:
    """A plan with made-up scales."""
    index = GraphIndex(model)
    weights = {
        name: WeightScale(axis, (0.5,) * (1 if axis is None else index.constant(name).shape[axis]))
        for name, axis in found.weights.items()
    }
    scales = dict.fromkeys((*found.inputs, *found.stored), 0.5)
    return PartPlan("", found.int8, found.high, scales, found.stored, weights, found.factors)


@pytest.fixture(scope="module")
def real(bundle: Path) -> dict[str, tuple[GraphIndex, Placement]]:
    manifest = open_bundle(bundle).manifest
    indices = {p: GraphIndex(onnx.load(bundle / f)) for p, f in manifest.canonical.graphs.items()}
    return {part: (index, place(index, manifest.high)) for part, index in indices.items()}


def test_one_pair_per_tensor() -> None:
    """Three products read x; it is quantized once."""
    model = small(
        [node("MatMul", ["x", w], f"m{w}") for w in ("a", "b", "c")]
        + [node("Add", ["ma", "mb"], "ab"), node("Sub", ["ab", "mc"], "y")],
        {"x": ("batch", 4)},
        ["y"],
        dict.fromkeys("abc", W),
    )
    found = placed(model)
    assert found.inputs == ("x",)
    assert found.stored == ()
    assert set(found.weights) == {"a", "b", "c"}
    assert len(found.int8) == 3
    written = write_qdq(model, plan_of(found, model), unsigned=False, stored=True)
    assert [n.op_type for n in written.graph.node].count("QuantizeLinear") == 1


def test_a_mover_moves_integers() -> None:
    """What a Transpose, Reshape or Resize before a product reads is quantized by its scale."""
    model = small(
        [
            node("Relu", ["x"], "r"),
            node("Transpose", ["r"], "t", perm=[0, 2, 1]),
            node("Reshape", ["t", "shape"], "s"),
            node("MatMul", ["s", "w"], "y"),
        ],
        {"x": ("batch", 4, 4)},
        ["y"],
        {"w": W, "shape": np.int64([-1, 4])},
    )
    found = placed(model)
    assert set(found.inputs) == {"r", "t", "s"}
    assert set(found.same) == {("r", "t"), ("t", "s")}
    # a mover whose result nobody quantizes is left alone
    free = small(
        [node("Relu", ["x"], "r"), node("Transpose", ["r"], "y", perm=[0, 2, 1])],
        {"x": ("batch", 4, 4)},
        ["y"],
    )
    assert placed(free).inputs == ()


def test_a_concat_reads_several() -> None:
    """Each with a scale of its own; a constant beside them has no pair, and needs none."""
    model = small(
        [
            node("Relu", ["x"], "r"),
            node("Sigmoid", ["x"], "s"),
            node("Concat", ["r", "s", "token"], "c", axis=1),
            node("MatMul", ["c", "w"], "y"),
        ],
        {"x": (1, 3, 4)},
        ["y"],
        {"w": W, "token": np.ones((1, 1, 4), np.float32)},
    )
    found = placed(model)
    assert set(found.inputs) == {"c", "r", "s"}
    assert found.same == ()
    written = write_qdq(model, plan_of(found, model), unsigned=True, stored=True)
    onnx.checker.check_model(written, full_check=True)
    assert run(written, {"x": np.ones((1, 3, 4), np.float32)})["y"].shape == (1, 7, 4)


def test_only_convolutions_store_their_output() -> None:
    model = small(
        [
            node("Conv", ["x", "k"], "c"),
            node("Relu", ["c"], "r"),
            node("Conv", ["r", "l"], "d"),
            node("Softmax", ["d"], "p", axis=1),
            node("MatMul", ["p", "w"], "m"),
            node("Softmax", ["m"], "y"),
        ],
        {"x": ("batch", 4, 6, 4)},
        ["y"],
        {"k": K, "l": K, "w": W},
    )
    found = placed(model)
    assert set(found.inputs) == {"x", "r", "p"}
    assert set(found.stored) == {"c", "d"}  # "m", a product's, is not
    assert set(found.high) == {name_of(model, "p"), name_of(model, "y")}


def test_an_output_of_the_part_is_not_stored() -> None:
    model = small([node("Conv", ["x", "k"], "y")], {"x": MAP}, ["y"], {"k": K})
    assert placed(model).inputs == ("x",)
    assert placed(model).stored == ()


def test_chains_of_sums_stay_in_integers() -> None:
    """Of two sums in a row the first is stored; the last, which only a norm reads, is not."""
    model = small(
        [
            node("Conv", ["x", "k"], "a"),
            node("Conv", ["x", "l"], "b"),
            node("Add", ["a", "b"], "ab"),
            node("Mul", ["ab", "a"], "aab"),
            node("Sigmoid", ["aab"], "y"),
        ],
        {"x": MAP},
        ["y"],
        {"k": K, "l": K},
    )
    assert set(placed(model).stored) == {"a", "b", "ab"}


def test_sums_with_a_float_side_are_not_stored() -> None:
    model = small(
        [
            node("Conv", ["x", "k"], "a"),
            node("Sigmoid", ["x"], "s"),
            node("Add", ["a", "s"], "as"),
            node("Add", ["as", "a"], "aas"),
            node("Add", ["aas", "a"], "y"),
        ],
        {"x": MAP},
        ["y"],
        {"k": K},
    )
    assert set(placed(model).stored) == {"a"}


def test_high_modules_and_spared_nodes() -> None:
    model = small(
        [
            node("MatMul", ["x", "a"], "m", module="head.norm"),
            node("MatMul", ["m", "b"], "n", module="head"),
            node("MatMul", ["n", "c"], "o", module="header"),
            node("MatMul", ["o", "d"], "y", module="neck"),
        ],
        {"x": ("batch", 4)},
        ["y"],
        dict.fromkeys("abcd", W),
    )
    assert len(placed(model).int8) == 4
    found = placed(model, "head")
    # "head" is the module and all below it; "header" is another
    assert set(found.high) == {name_of(model, "m"), name_of(model, "n")}
    assert set(found.weights) == {"c", "d"}
    assert set(found.inputs) == {"n", "o"}
    spared = frozenset({name_of(model, "o")})
    found = placed(model, "head", spared=spared)
    assert found.int8 == (name_of(model, "y"),)
    assert name_of(model, "o") not in found.high  # spared nodes run in the rest's precision
    assert found.inputs == ("o",)
    # its weight is small on disk all the same
    assert set(found.weights) == {"c", "d"}


def test_products_of_two_activations_stay_in_float() -> None:
    model = small(
        [node("MatMul", ["x", "x"], "m"), node("Relu", ["m"], "y")], {"x": (1, 4, 4)}, ["y"]
    )
    assert placed(model) == Placement((), (), (), (), {}, ())


def factorised() -> onnx.ModelProto:
    """A convolution's map by pixels, times a constant and times a factor that a ratio gives."""
    return small(
        [
            node("Conv", ["x", "k"], "c"),
            node("Relu", ["c"], "r"),
            node("Transpose", ["r"], "t", perm=[0, 2, 3, 1]),
            node("Reshape", ["t", "shape"], "rows"),
            node("MatMul", ["rows", "f"], "p", "ham"),
            node("Div", ["z", "z2"], "b", "ham"),
            node("MatMul", ["rows", "b"], "q0", "ham"),
            node("MatMul", ["rows", "b"], "q1", "ham"),
            node("Sub", ["q0", "q1"], "q2", "ham"),
            node("Add", ["q2", "q0"], "q", "ham"),
            node("MatMul", ["b", "b"], "g", "ham"),
            node("MatMul", ["q", "g"], "h", "ham"),
            node("Add", ["p", "h"], "y", "ham"),
        ],
        {"x": MAP, "z": ("batch", 4, 4), "z2": ("batch", 4, 4)},
        ["y"],
        {"k": K, "f": W, "shape": np.int64([-1, 36, 4])},
    )


def test_products_of_integers_in_a_high_module() -> None:
    """The map is there in integers; all that is not such a product stays in float."""
    found = placed(factorised(), "ham")
    assert found.factors == ("b",)
    assert set(found.stored) == {"c", "r", "t", "rows", "b"}
    assert found.weights == {"k": 0, "f": 1}
    assert found.inputs == ("x",)
    assert {("r", "t"), ("t", "rows")} <= set(found.same)
    # elsewhere, such as in attention, products of two activations stay in float
    found = placed(factorised(), "other")
    assert found.factors == ()
    assert "b" not in found.stored


@pytest.mark.parametrize("unsigned_weights", [False, True])
def test_a_product_of_integers_computes_what_its_scales_say(unsigned_weights: bool) -> None:
    """The same in both encodings; what else reads the factor reads the float values."""
    model = factorised()
    plan = plan_of(placed(model, "ham"), model)
    written = write_qdq(model, plan, unsigned=True, stored=True, unsigned_weights=unsigned_weights)
    onnx.checker.check_model(written, full_check=True)
    dialect = "ort-u8u8" if unsigned_weights else "ort"
    assert lint_qdq(written, dialect) == []
    kinds = [n.op_type for n in written.graph.node]
    assert kinds.count("MatMulInteger") == 2
    assert sum("b" in n.input for n in written.graph.node if n.op_type == "QuantizeLinear") == 1
    assert kinds.count("LeakyRelu") == 1
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.integers(-5, 6, (2, 4, 6, 6)).astype(np.float32) / 2,
        "z": rng.uniform(-9, 9, (2, 4, 4)).astype(np.float32),
        "z2": np.ones((2, 4, 4), np.float32),
    }
    # steps of a half: the map is exact, the constants 0 and 1 too, the factor is rounded
    summed = np.maximum(feeds["x"].sum(1, keepdims=True), 0.0).repeat(4, 1)
    rows = summed.transpose(0, 2, 3, 1).reshape(2, 36, 4)
    b = feeds["z"]
    wanted = rows + (rows @ (np.rint(b * 2) / 2)) @ (b @ b)
    for optimised in (False, True):
        found = run(written, feeds, optimised=optimised)["y"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3)
    for_tensorrt = write_qdq(model, plan, unsigned=False, stored=False)
    assert [n.input[0] for n in for_tensorrt.graph.node if n.op_type == "QuantizeLinear"] == ["x"]


def test_a_sum_before_a_rectifier_is_made_in_integers() -> None:
    """Its other term is quantized too, and what that was moved from."""
    model = small(
        [
            node("Relu", ["x"], "a"),
            node("Sigmoid", ["z"], "m"),
            node("Transpose", ["m"], "b", perm=[0, 3, 1, 2]),
            node("Add", ["a", "b"], "s"),
            node("Relu", ["s"], "r"),
            node("Conv", ["a", "k"], "c"),
            node("Conv", ["r", "l"], "d"),
            node("Sub", ["c", "d"], "y"),
        ],
        {"x": MAP, "z": ("batch", 6, 6, 4)},
        ["y"],
        {"k": K, "l": K},
    )
    found = placed(model)
    assert set(found.inputs) == {"a", "r"}
    assert set(found.stored) == {"m", "b", "s", "c", "d"}
    assert ("m", "b") in found.same


@pytest.mark.parametrize(
    ("operator", "inputs", "shape", "weight", "attributes", "axis"),
    [
        ("Conv", ["x", "w"], (1, 4, 6, 6), (8, 4, 3, 3), {}, 0),
        ("Conv", ["x", "w"], (1, 4, 6, 6), (4, 1, 3, 3), {"group": 4}, 0),
        ("Gemm", ["x", "w"], (5, 4), (4, 7), {}, 1),
        ("Gemm", ["x", "w"], (5, 4), (7, 4), {"transB": 1}, 0),
        ("MatMul", ["x", "w"], (1, 5, 4), (4, 7), {}, 1),
    ],
)
def test_the_axis_of_output_channels(
    operator: str,
    inputs: list[str],
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    attributes: dict[str, int],
    axis: int,
) -> None:
    """Scaling the weight along the axis scales the output along one axis: checked by running."""
    rng = np.random.default_rng(0)
    value = rng.normal(size=weight).astype(np.float32)
    given = {"x": rng.normal(size=shape).astype(np.float32)}

    def output(weights: np.ndarray) -> np.ndarray:
        nodes = [node(operator, inputs, "y", **attributes)]
        return run(small(nodes, {"x": shape}, ["y"], {"w": weights}), given)["y"]

    model = small([node(operator, inputs, "y", **attributes)], {"x": shape}, ["y"], {"w": value})
    assert placed(model).weights == {"w": axis}
    steps = np.exp2(np.arange(weight[axis])).astype(np.float32)
    scaled = output(value * steps.reshape([-1 if i == axis else 1 for i in range(len(weight))]))
    plain = output(value)
    (along,) = [
        i
        for i in range(plain.ndim)
        if plain.shape[i] == steps.size
        # powers of two scale exactly
        and np.array_equal(
            scaled, plain * steps.reshape([-1 if k == i else 1 for k in range(plain.ndim)])
        )
    ]
    assert plain.shape[along] == weight[axis]


@pytest.mark.parametrize(
    ("inputs", "shape", "weight"),
    [
        (["x", "w"], (3, 5, 4), (3, 4, 7)),
        (["x", "w"], (1, 5, 4), (1, 4, 7)),
        (["w", "x"], (1, 4, 5), (7, 4)),
        (["w", "x"], (3, 4, 5), (3, 7, 4)),
    ],
)
@pytest.mark.parametrize("unsigned_weights", [False, True])
def test_one_scale_where_kernels_take_no_more(
    inputs: list[str], shape: tuple[int, ...], weight: tuple[int, ...], unsigned_weights: bool
) -> None:
    """Per channel, ONNX Runtime's fused product fails when it is run."""
    rng = np.random.default_rng(0)
    nodes = [node("MatMul", inputs, "m"), node("Relu", ["m"], "y")]
    value = rng.uniform(-60, 60, weight).astype(np.float32)
    model = small(nodes, {"x": shape}, ["y"], {"w": value})
    found = placed(model)
    assert found.weights == {"w": None}
    given = {"x": rng.uniform(-60, 60, shape).astype(np.float32)}
    written = write_qdq(
        model, plan_of(found, model), unsigned=True, stored=True, unsigned_weights=unsigned_weights
    )
    fused = run(written, given, optimised=True)["y"]
    # steps of a half make every sum an exact float32
    assert np.array_equal(fused, run(written, given)["y"])


def test_multiply_accumulates_by_hand() -> None:
    model = small(
        [
            node("Conv", ["x", "k"], "c", pads=[1, 1, 1, 1], strides=[2, 2]),
            node("Conv", ["c", "d"], "e", group=8),
            node("Reshape", ["e", "shape"], "f"),
            node("Gemm", ["f", "g"], "h", transB=1),
            node("MatMul", ["h", "m"], "i"),
            node("MatMul", ["i", "i"], "y", module="free"),
        ],
        {"x": (1, 4, 12, 12)},
        ["y"],
        {
            "k": np.ones((8, 4, 3, 3), np.float32),
            "d": np.ones((8, 1, 5, 5), np.float32),
            "g": np.ones((5, 8), np.float32),
            "m": np.ones((5, 4), np.float32),
            "shape": np.int64([4, 8]),
        },
    )
    index = GraphIndex(model)
    counts = {n.output[0]: macs(index, n) for n in index.nodes}
    assert counts == {
        "c": 6 * 6 * 8 * 4 * 3 * 3,
        "e": 2 * 2 * 8 * 5 * 5,
        "f": 0,
        "h": 4 * 5 * 8,
        "i": 4 * 4 * 5,
        "y": 4 * 4 * 4,
    }
    assert sum(weighted_macs(index).values()) == sum(counts.values()) - counts["y"]


def test_the_share_of_the_tiny_model(real: dict[str, tuple[GraphIndex, Placement]]) -> None:
    """Everything with a constant weight but the modules that SLViT keeps high."""
    index, found = real["mask"]
    work = weighted_macs(index)
    modules = {n.name: module_of(n) for n in index.nodes}
    kept = {modules[n] for n in work if n not in found.int8}
    assert kept == {"classifier.hamburger.ham", "classifier.conv1"}
    share = sum(work[n] for n in found.int8) / sum(work.values())
    assert 0.95 < share < 1.0
    # none of the work was taken for nothing because a shape was unknown
    assert all(work.values())
    index, found = real["text"]
    assert set(found.int8) == set(weighted_macs(index))


def test_high_nodes_of_the_tiny_model(real: dict[str, tuple[GraphIndex, Placement]]) -> None:
    for index, found in real.values():
        kinds = {n.name: n.op_type for n in index.nodes}
        for operator in ("Softmax", "LayerNormalization", "InstanceNormalization", "TopK", "Div"):
            assert {n for n, k in kinds.items() if k == operator} <= set(found.high)
        assert not set(found.high) & set(found.int8)
        tensors = {*found.inputs, *found.stored}
        assert not tensors & index.outputs
        assert not tensors & set(index.tensors)
        assert not set(found.inputs) & set(found.stored)
        assert all({a, b} <= tensors for a, b in found.same)
        assert set(found.factors) <= set(found.stored)
    # seven steps of the factorisation, each with a product by the bases and by the coefficients,
    # and the last coefficients; the first bases are constant
    assert len(real["mask"][1].factors) == 2 * 7


def masked(index: GraphIndex) -> set[str]:
    """Tensors that hold the padding mask as large negative numbers, up to the softmax."""
    seen = {"words"}
    for made in index.nodes:
        if not seen & set(made.input):
            continue
        if made.op_type == "Where":
            branches = [index.constant(i) for i in made.input[1:] if i in index.tensors]
            if not any(b.size == 1 and float(b.ravel()[0]) <= -1e4 for b in branches):
                continue
        elif made.op_type not in ("Unsqueeze", "Not", "Add"):
            continue
        seen.update(made.output)
    return seen


def test_the_padding_mask_is_never_quantized(
    real: dict[str, tuple[GraphIndex, Placement]],
) -> None:
    for part, blocks in (("text", 2), ("mask", 7)):
        index, found = real[part]
        tensors = masked(index)
        softmaxes = [n for n in index.nodes if n.op_type == "Softmax" and n.input[0] in tensors]
        assert len(softmaxes) == blocks  # every attention's scores were followed up to the softmax
        assert not tensors & {*found.inputs, *found.stored}
        assert "words" not in found.inputs
        # and the naive plan, which is there for contrast, does just that
        naive = naive_placement(index)
        assert {s.input[0] for s in softmaxes} <= set(naive.inputs)


def test_the_naive_plan_quantizes_every_float_tensor() -> None:
    model = small(
        [
            node("MatMul", ["x", "w"], "m"),
            node("Where", ["words", "m", "low"], "s"),
            node("Softmax", ["s"], "p"),
            node("Relu", ["p"], "y"),
        ],
        {"x": ("batch", 4), "words": ("batch", 4)},
        ["y"],
        {"w": W, "low": np.float32(-1e4)},
        {"words": TensorProto.BOOL},
    )
    found = naive_placement(GraphIndex(model), ("head",), frozenset())
    assert set(found.inputs) == {"x", "m", "s", "p"}
    assert found.weights == {"w": None}
    assert (found.high, found.stored) == ((), ())
