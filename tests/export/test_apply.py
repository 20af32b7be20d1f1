from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from refedge.errors import BundleError, ExportError, RefedgeError
from refedge.export import apply as apply_module
from refedge.export.apply import apply_plan
from refedge.runtime.bundle import open_bundle
from refedge.runtime.plan import PartPlan, Plan, decode_plan


def contents(bundle: Path) -> dict[str, bytes]:
    return {str(p.relative_to(bundle)): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}


def plan_for(bundle: Path, name: str = "mine", rest: str = "fp32") -> Plan:
    """A plan that quantizes nothing."""
    opened = open_bundle(bundle)
    return Plan(
        name,
        rest,
        {
            part: PartPlan(hashlib.sha256(opened.file(file).read_bytes()).hexdigest())
            for part, file in opened.manifest.canonical.graphs.items()
        },
    )


def refused(bundle: Path, plan: Plan, *dialects: str) -> RefedgeError:
    """The error; and the bundle is what it was, with nothing left beside it."""
    before = contents(bundle)
    with pytest.raises(RefedgeError) as caught:
        apply_plan(bundle, plan, dialects)
    assert contents(bundle) == before
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]
    return caught.value


def test_a_plan_and_its_dialects(own_bundle: Path) -> None:
    before = contents(own_bundle)
    plan = plan_for(own_bundle)
    manifest = apply_plan(own_bundle, plan, ("ort", "trt8"))
    opened = open_bundle(own_bundle)
    assert opened.manifest.files == manifest.files
    assert decode_plan(opened.file("plans/mine.json").read_bytes()) == plan
    held = [(d.plan, d.name) for d in manifest.dialects]
    assert held == [("fp32", "ort"), ("mine", "ort"), ("mine", "trt8")]
    after = contents(own_bundle)
    assert all(after[n] == raw for n, raw in before.items() if n != "manifest.json")
    # nothing is written twice: a plan that quantizes nothing has fp32's weights
    assert {n for n in after if n.endswith(".weights")} == {
        n for n in before if n.endswith(".weights")
    }
    for file in opened.dialect(["trt8"], "mine").graphs.values():
        onnx.checker.check_model(str(own_bundle / file), full_check=True)


def test_the_manifest_says_what_was_fused(own_bundle: Path) -> None:
    manifest = apply_plan(own_bundle, plan_for(own_bundle), ("trt10", "trt10-plugin"))
    assert open_bundle(own_bundle).manifest.dialects == manifest.dialects
    plain, plugin = manifest.dialects[1:]
    assert plain.fused == ()
    assert len(plugin.fused) == len(manifest.folding)
    said = {(f["part"], f["operator"], f["why"]) for f in plugin.fused}
    assert said == {("mask", "NormAttention", "")}
    graph = onnx.load(own_bundle / plugin.graphs["mask"], load_external_data=False)
    assert {f["node"] for f in plugin.fused} == {n.name for n in graph.graph.node if n.domain}


def test_a_plan_of_the_same_name_is_replaced(own_bundle: Path) -> None:
    plan = plan_for(own_bundle)
    apply_plan(own_bundle, plan_for(own_bundle, "kept"), ("ort",))
    first = contents(own_bundle)
    apply_plan(own_bundle, replace(plan, rest="fp16"), ("ort", "ort-u8u8", "trt10"))
    halves = contents(own_bundle)
    apply_plan(own_bundle, plan, ("ort",))
    opened = open_bundle(own_bundle)
    assert [(d.plan, d.name) for d in opened.manifest.dialects] == [
        ("fp32", "ort"),
        ("kept", "ort"),
        ("mine", "ort"),
        ("mine", "ort-u8u8"),
        ("mine", "trt10"),
    ]
    # in all its dialects, and what the plan before had is gone
    after = contents(own_bundle)
    graphs = {
        f"graphs/{part}.{dialect}.mine.onnx"
        for part in ("text", "mask")
        for dialect in ("ort", "ort-u8u8", "trt10")
    }
    assert graphs <= set(after)
    assert all(after[n] != halves[n] for n in graphs)
    listed = {"manifest.json", *opened.manifest.files}
    assert set(after) == listed
    assert all(after[n] == raw for n, raw in first.items() if n != "manifest.json")


def test_the_same_plan_gets_more_dialects(own_bundle: Path) -> None:
    plan = plan_for(own_bundle)
    apply_plan(own_bundle, plan, ("ort", "trt8"))
    first = contents(own_bundle)
    apply_plan(own_bundle, plan, ("trt10",))
    opened, after = open_bundle(own_bundle), contents(own_bundle)
    assert [d.name for d in opened.manifest.dialects if d.plan == "mine"] == [
        "ort",
        "trt8",
        "trt10",
    ]
    assert all(after[n] == raw for n, raw in first.items() if n != "manifest.json")


def test_twice_gives_the_same_bytes(own_bundle: Path) -> None:
    plan = plan_for(own_bundle, rest="fp16")
    apply_plan(own_bundle, plan, ("ort", "trt10"))
    once = contents(own_bundle)
    apply_plan(own_bundle, plan, ("ort", "trt10"))
    assert contents(own_bundle) == once


@pytest.mark.parametrize(
    "wrong",
    [
        lambda plan: replace(
            plan, parts={**plan.parts, "mask": replace(plan.parts["mask"], graph="0" * 64)}
        ),
        lambda plan: replace(plan, parts={"text": plan.parts["text"]}),
        lambda plan: replace(plan, parts={}),
    ],
)
def test_the_plan_of_another_graph(own_bundle: Path, wrong: Callable[[Plan], Plan]) -> None:
    error = refused(own_bundle, wrong(plan_for(own_bundle)), "ort")
    assert isinstance(error, BundleError)
    assert error.code == "plan-graph"


def test_a_dialect_that_does_not_exist(own_bundle: Path) -> None:
    error = refused(own_bundle, plan_for(own_bundle), "ort", "trt7")
    assert isinstance(error, ExportError)
    assert error.code == "dialect-unknown"
    assert "trt7" in error.what
    assert "trt8" in error.why


def test_a_failure_half_way(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second dialect is not fit for its target; the first was written already."""
    calls = []

    def unfit(model: onnx.ModelProto, dialect: str) -> None:
        calls.append(dialect)
        if dialect == "trt8":
            raise ExportError("export-target", "not fit", why="a test", fix="none")

    monkeypatch.setattr(apply_module, "require_target", unfit)
    error = refused(own_bundle, plan_for(own_bundle), "ort", "trt8")
    assert error.code == "export-target"
    assert calls == ["ort", "ort", "trt8"]
