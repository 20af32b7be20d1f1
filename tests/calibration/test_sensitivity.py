from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refedge.calibration.ranges import step, weight_scales
from refedge.calibration.sensitivity import Node, node_errors, run_part, spared
from refedge.runtime.plan import PartPlan, WeightScale

from ..export.small_graphs import node, run, small

RNG = np.random.default_rng(11)
X = RNG.normal(size=(16, 8)).astype(np.float32)
LAYERS = ("a", "b", "c")

nodes_of = st.tuples(st.sampled_from(("text", "mask")), st.text("abcdef", min_size=1, max_size=2))
work_of = st.dictionaries(nodes_of, st.integers(0, 10**9), min_size=1, max_size=12)


@given(work_of, st.data(), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_the_budget_is_never_exceeded(
    work: dict[Node, int], data: st.DataObject, budget: float
) -> None:
    """Nodes without an error stay in float anyway, and are paid for first."""
    known = data.draw(st.sets(st.sampled_from(sorted(work))))
    errors = {n: data.draw(st.floats(0, 1e3, allow_nan=False)) for n in known}
    chosen = spared(work, errors, budget)
    assert chosen <= set(errors)
    fixed = sum(work[n] for n in work if n not in errors)
    spent = fixed + sum(work[n] for n in chosen)
    if chosen:
        assert spent <= budget * sum(work.values())
    # and it is used: no node that is left would have fitted
    for name in set(errors) - chosen:
        assert spent + work[name] > budget * sum(work.values())


@given(work_of, st.data())
@settings(max_examples=50, deadline=None)
def test_it_is_the_same_in_any_order(work: dict[Node, int], data: st.DataObject) -> None:
    """Ties are broken by name, so equal errors give equal plans."""
    errors = dict.fromkeys(work, 0.25)
    mixed = data.draw(st.permutations(sorted(work)))
    turned = spared({n: work[n] for n in mixed}, {n: errors[n] for n in mixed}, 0.5)
    assert turned == spared(work, errors, 0.5)


def test_the_most_error_for_the_least_work_comes_first() -> None:
    work = {("mask", "large"): 900, ("mask", "small"): 50, ("text", "harmless"): 50}
    errors = {("mask", "large"): 1.0, ("mask", "small"): 0.9, ("text", "harmless"): 0.0}
    assert spared(work, errors, 0.05) == {("mask", "small")}
    # taken by error alone, the large one would leave no room for the others
    assert spared(work, errors, 0.9) == {("mask", "small"), ("text", "harmless")}
    # work of nodes that are high anyway takes its part of the budget
    assert spared({**work, ("mask", "high"): 50}, errors, 0.05) == frozenset()
    assert spared(work, errors, 0.0) == frozenset()


def network() -> tuple[onnx.ModelProto, PartPlan]:
    """Three layers side by side, each with a Relu of its own before it, and their sum."""
    nodes = [node("Relu", ["x"], "y"), node("Neg", ["x"], "n"), node("Abs", ["x"], "u")]
    inputs = dict(zip(LAYERS, ("y", "n", "u"), strict=True))
    nodes += [node("MatMul", [inputs[i], i], f"m{i}", f"neck.{i}") for i in LAYERS]
    nodes.append(node("Sum", [f"m{i}" for i in LAYERS], "logits"))
    weights = {i: (RNG.normal(size=(8, 8)) * 0.3).astype(np.float32) for i in LAYERS}
    model = small(nodes, {"x": ("batch", 8)}, ["logits"], weights)
    plan = PartPlan(
        "",
        tuple(f"neck.{i}/MatMul:m{i}" for i in LAYERS),
        activations=dict.fromkeys(("y", "n", "u"), step(float(np.abs(X).max()))),
        weights={i: WeightScale(1, weight_scales(w, 1)) for i, w in weights.items()},
    )
    return model, plan


def errors_of(plan: PartPlan) -> dict[str, float]:
    model, _ = network_once()
    return node_errors(model, plan, {"x": X}, lambda outputs: outputs["logits"])


_NETWORK: list[tuple[onnx.ModelProto, PartPlan]] = []


def network_once() -> tuple[onnx.ModelProto, PartPlan]:
    if not _NETWORK:
        _NETWORK.append(network())
    return _NETWORK[0]


@pytest.mark.parametrize("bad", LAYERS)
@pytest.mark.parametrize("what", ["weights", "activations"])
def test_a_node_made_bad_is_ranked_first(bad: str, what: str) -> None:
    """Steps 30 times too coarse, of its weights or of what it reads."""
    _, plan = network_once()
    if what == "weights":
        found = plan.weights[bad]
        coarse = replace(found, scales=tuple(s * 30 for s in found.scales))
        worse = replace(plan, weights={**plan.weights, bad: coarse})
    else:
        tensor = dict(zip(LAYERS, ("y", "n", "u"), strict=True))[bad]
        scales = {**plan.activations, tensor: plan.activations[tensor] * 30}
        worse = replace(plan, activations=scales)
    errors = errors_of(worse)
    assert list(errors) == list(plan.int8)
    worst = max(errors, key=errors.__getitem__)
    assert worst == f"neck.{bad}/MatMul:m{bad}"
    others = [e for n, e in errors.items() if n != worst]
    assert errors[worst] > 20 * max(others)  # squared: 30 x the step is some 900 x the error
    work = {("mask", n): 64 for n in errors}
    chosen = spared(work, {("mask", n): e for n, e in errors.items()}, 0.4)
    assert chosen == {("mask", worst)}


def test_each_node_is_alone_in_int8() -> None:
    """An error does not depend on how bad the others are."""
    _, plan = network_once()
    before = errors_of(plan)
    coarse = {i: replace(plan.weights[i], scales=(0.5,) * 8) for i in ("b", "c")}
    after = errors_of(replace(plan, weights={**plan.weights, **coarse}))
    first = plan.int8[0]
    assert after[first] == before[first] > 0
    assert all(after[n] > before[n] for n in plan.int8[1:])


def test_an_error_is_that_of_the_probabilities() -> None:
    """Computed by hand from the two graphs; and what cannot flip a pixel counts for little."""
    model, plan = network_once()
    (only,) = plan.int8[:1]
    weight = plan.weights["a"]
    from refedge.export.qdq import write_qdq

    alone = PartPlan("", (only,), (), {"y": plan.activations["y"]}, (), {"a": weight})
    one = run(write_qdq(model, alone, unsigned=True, stored=True), {"x": X})["logits"]
    two = run(model, {"x": X})["logits"]
    wanted = float(np.mean((1 / (1 + np.exp(-one)) - 1 / (1 + np.exp(-two))) ** 2))
    # fused kernels and float32 sums: six digits of each probability
    assert errors_of(plan)[only] == pytest.approx(wanted, rel=1e-2)
    far = node_errors(model, plan, {"x": X}, lambda outputs: outputs["logits"] + 50.0)
    assert all(e < 1e-12 for e in far.values())


def test_parts_before_the_last_are_judged_by_the_mask() -> None:
    model, plan = network_once()
    seen = []

    def further(outputs: dict[str, np.ndarray]) -> np.ndarray:
        seen.append(set(outputs))
        return outputs["logits"] * 0.0

    errors = node_errors(model, plan, {"x": X, "unrelated": X}, further)
    assert set(errors.values()) == {0.0}
    assert seen == [{"logits"}] * 4


def test_progress_sees_every_node() -> None:
    model, plan = network_once()
    told: list[str] = []

    def progress(names: tuple[str, ...]) -> object:
        for name in names:
            told.append(name)
            yield name

    node_errors(model, plan, {"x": X}, lambda o: o["logits"], progress)  # type: ignore[arg-type]
    assert told == list(plan.int8)


def test_a_part_takes_what_it_needs() -> None:
    model, _ = network_once()
    found = run_part(model, {"x": X, "unrelated": X})
    assert set(found) == {"logits"}
    np.testing.assert_allclose(found["logits"], run(model, {"x": X})["logits"], rtol=1e-5)
