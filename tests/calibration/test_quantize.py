from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refedge.calibration import quantize as quantize_module
from refedge.calibration.placement import weighted_macs
from refedge.calibration.quantize import _unify, quantize
from refedge.calibration.sensitivity import Arrays
from refedge.data.refshapes.dataset import RefShapes
from refedge.errors import DataError, RefedgeError
from refedge.export.dialects import write_dialect
from refedge.export.graph import GraphIndex
from refedge.export.weights import split_weights
from refedge.runtime.bundle import open_bundle
from refedge.runtime.plan import PartPlan, Plan, decode_plan, encode_plan
from refedge.runtime.segmenter import load

CALIBRATION = "refshapes:calibration"


def contents(bundle: Path) -> dict[str, bytes]:
    return {str(p.relative_to(bundle)): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}


def plan_in(bundle: Path, name: str) -> Plan:
    opened = open_bundle(bundle)
    return decode_plan(opened.file(opened.manifest.plans[name]).read_bytes())


def cheap_errors(
    model: onnx.ModelProto,
    plan: PartPlan,
    inputs: Arrays,
    logits: Callable[[Arrays], Any],
    progress: Callable[[Any], Any] = iter,
) -> dict[str, float]:
    """Stands for ``node_errors``, which runs the whole model once per node: half a minute."""
    return {name: 1.0 / (1 + i) for i, name in enumerate(progress(plan.int8))}


BAD: list[tuple[str, dict[str, Any]]] = [
    ("calibrate-data", {}),
    ("calibrate-data", {"data": ""}),
    ("calibrate-samples", {"data": CALIBRATION, "samples": 0}),
    ("calibrate-samples", {"data": CALIBRATION, "samples": -3}),
    *(
        ("calibrate-split", {"data": data})
        for data in (
            "refshapes:test",
            "refshapes-full:val",
            "refcoco:testA",
            "refcoco+:testB",
            "refcocog:test",
            "refclef:testC",
            "refclef:testAB",
        )
    ),
    ("calibrate-method", {"data": CALIBRATION, "method": "median"}),
    *(
        ("calibrate-spare", {"data": CALIBRATION, "spare": spare})
        for spare in (-0.1, 1.0, 7.0, float("nan"))
    ),
    ("dialect-unknown", {"data": CALIBRATION, "samples": 1, "spare": 0.0, "dialects": ("trt7",)}),
    ("data-unknown", {"data": "coco:train"}),
    ("data-unknown", {"data": "refshapes:nosplit"}),
    ("data-root", {"data": "refcoco:train"}),
    ("data-range", {"data": CALIBRATION, "samples": 1001}),
]


@pytest.mark.parametrize(("code", "options"), BAD, ids=[f"{c}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_loses_nothing(own_bundle: Path, code: str, options: dict[str, Any]) -> None:
    before = contents(own_bundle)
    with pytest.raises(RefedgeError) as caught:
        quantize(own_bundle, "int8", **options)
    assert caught.value.code == code
    assert contents(own_bundle) == before
    assert [p.name for p in own_bundle.parent.iterdir()] == [own_bundle.name]


def test_an_empty_folder_is_no_calibration_set(own_bundle: Path, tmp_path: Path) -> None:
    before = contents(own_bundle)
    with pytest.raises(RefedgeError) as caught:
        quantize(own_bundle, "int8", data="folder", root=tmp_path / "none")
    assert caught.value.code == "data-missing"
    assert contents(own_bundle) == before


def test_a_failure_in_the_middle_loses_nothing(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranges were seen already."""
    before = contents(own_bundle)

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_module, "_int8_macs", broken)
    with pytest.raises(KeyboardInterrupt):
        quantize(own_bundle, "int8", data=CALIBRATION, samples=1, spare=0.0)
    assert contents(own_bundle) == before


def test_the_same_twice(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte: the plan, and with it every file of the bundle."""
    monkeypatch.setattr(quantize_module, "node_errors", cheap_errors)
    other = Path(shutil.copytree(own_bundle, own_bundle.with_name("other.refedge")))
    made = {
        path: quantize(
            path, "int8", data=CALIBRATION, samples=3, spare=0.05, dialects=("ort", "trt8")
        )[0]
        for path in (own_bundle, other)
    }
    assert contents(own_bundle) == contents(other)
    assert made[own_bundle] == made[other] == plan_in(other, "int8")


def test_the_plan_says_what_was_seen(own_bundle: Path) -> None:
    plan, manifest = quantize(
        own_bundle, "int8", data=CALIBRATION, samples=7, spare=0.0, method="minmax"
    )
    assert plan == plan_in(own_bundle, "int8")
    assert manifest.plans["int8"] == "plans/int8.json"
    seen = plan.calibration
    assert seen is not None
    assert (seen.data, seen.method) == (CALIBRATION, "minmax")
    shapes = RefShapes("calibration", size=96, scenes=7)
    # one expression of each scene, in turn over the families
    assert seen.ids == tuple(f"{shapes.name(i)}/{i % len(shapes[i].expressions)}" for i in range(7))
    opened = open_bundle(own_bundle)
    pairs = quantize_module.calibration_pairs(opened, CALIBRATION, 7, None)
    tokenize = load(own_bundle, threads=1).tokenize
    for i in range(7):
        expected = tokenize(shapes[i].expressions[i % 5].text)
        np.testing.assert_array_equal(pairs[i][1]["text"]["ids"][0], expected.ids)
        np.testing.assert_array_equal(pairs[i][1]["mask"]["pixels"][0], shapes[i].image)
    for part in plan.parts.values():
        scales = [*part.activations.values(), *(s for w in part.weights.values() for s in w.scales)]
        assert all(float(np.float16(s)) == s for s in scales)  # every dialect holds the same


def test_the_share_in_integers(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the plan notes it, counted again from the graphs; and what is spared is within budget."""
    monkeypatch.setattr(quantize_module, "node_errors", cheap_errors)
    plan, _ = quantize(own_bundle, "int8", data=CALIBRATION, samples=1, spare=0.1)
    opened = open_bundle(own_bundle)
    done = total = 0
    for name, file in opened.manifest.canonical.graphs.items():
        work = weighted_macs(GraphIndex(onnx.load(opened.file(file))))
        part = sum(work[n] for n in plan.parts[name].int8)
        assert plan.notes["int8_macs"][name] == pytest.approx(part / sum(work.values()), abs=1e-6)
        done, total = done + part, total + sum(work.values())
    assert plan.notes["int8_macs"]["all"] == pytest.approx(done / total, abs=1e-6)
    assert 0.9 <= done / total < 0.98  # without sparing it is 0.985
    whole, _ = quantize(own_bundle, "int8", data=CALIBRATION, samples=1, spare=0.0)
    kept = {n for name in whole.parts for n in whole.parts[name].int8}
    assert {n for p in plan.parts.values() for n in p.int8} < kept


def test_sparing_is_for_trained_weights(own_bundle: Path) -> None:
    opened = open_bundle(own_bundle)
    assert opened.manifest.provenance["trained"]
    assert quantize_module._spare(opened, None) == quantize_module.SPARE
    opened.manifest.provenance["trained"] = False
    assert quantize_module._spare(opened, None) == 0.0
    assert quantize_module._spare(opened, 0.3) == 0.3


def test_a_plan_is_replaced_and_the_rest_is_kept(own_bundle: Path) -> None:
    quantize(own_bundle, "fp16", dialects=("ort", "trt10"))
    before = contents(own_bundle)
    quantize(own_bundle, "int8", data=CALIBRATION, samples=1, spare=0.0, dialects=("ort", "trt8"))
    first = contents(own_bundle)
    quantize(own_bundle, "int8", data=CALIBRATION, samples=2, spare=0.0, method="minmax")
    opened = open_bundle(own_bundle)
    after = contents(own_bundle)
    assert after["plans/int8.json"] != first["plans/int8.json"]
    assert [d.name for d in opened.manifest.dialects if d.plan == "int8"] == ["ort", "trt8"]
    # nothing of the first int8 is left, and all else is there byte for byte
    assert set(after) == {"manifest.json", *opened.manifest.files}
    for name, raw in before.items():
        assert name == "manifest.json" or after[name] == raw
    gained = sorted(set(after) - set(before))
    assert [n for n in gained if not n.endswith(".weights")] == [
        "graphs/mask.ort.int8.onnx",
        "graphs/mask.trt8.int8.onnx",
        "graphs/mask.trt8.int8.onnx.layers.json",
        "graphs/text.ort.int8.onnx",
        "graphs/text.trt8.int8.onnx",
        "graphs/text.trt8.int8.onnx.layers.json",
        "plans/int8.json",
    ]
    old = {n for n in first if n.endswith(".weights")} - set(before)
    new = {n for n in gained if n.endswith(".weights")}
    assert not {n for n in old & new if n.startswith("graphs/mask")}, "other scales, other weights"


def test_a_plan_that_is_there_gets_more_dialects(own_bundle: Path) -> None:
    made, _ = quantize(
        own_bundle, "int8", data=CALIBRATION, samples=1, spare=0.0, dialects=("ort", "trt8")
    )
    before = contents(own_bundle)
    again, manifest = quantize(own_bundle, "int8", dialects=("ort", "trt10"))
    after = contents(own_bundle)
    assert again == made
    assert [d.name for d in manifest.dialects if d.plan == "int8"] == ["trt8", "ort", "trt10"]
    kept = [n for n in before if n != "manifest.json"]
    assert all(after[n] == before[n] for n in kept), "written again or not: engines stay valid"
    half, manifest = quantize(own_bundle, "int8", rest="fp16", dialects=("trt8",))
    assert half == replace(made, rest="fp16"), "scales do not depend on it"
    assert {d.name for d in manifest.dialects if d.plan == "int8"} == {"trt8", "ort", "trt10"}
    for more in ({"method": "entropy"}, {"samples": 8}, {"spare": 0.3}):
        with pytest.raises(DataError, match="how to calibrate"):
            quantize(own_bundle, "int8", dialects=("ort",), **more)  # type: ignore[arg-type]
    with pytest.raises(DataError):  # there is no naive plan yet
        quantize(own_bundle, "naive", dialects=("ort",))


def test_a_plan_that_comes_from_its_file_writes_the_same_graphs(quantized: Path) -> None:
    opened = open_bundle(quantized)
    raw = opened.file(opened.manifest.plans["int8"]).read_bytes()
    assert encode_plan(decode_plan(raw)) == raw
    plan = decode_plan(raw)
    held = opened.dialect(["trt10"], "int8")
    for part, file in held.graphs.items():
        model = onnx.load(opened.file(opened.manifest.canonical.graphs[part]))
        written, _, _ = write_dialect(model, "trt10", plan, plan.parts[part])
        split_weights(written)
        assert written.SerializeToString(deterministic=True) == opened.file(file).read_bytes()


def scores(bundle: Path) -> dict[str, set[str]]:
    """Of each part: what its masked softmaxes read."""
    opened = open_bundle(bundle)
    found = {}
    for name, file in opened.manifest.canonical.graphs.items():
        index = GraphIndex(onnx.load(opened.file(file)))
        read = {n.input[0] for n in index.nodes if n.op_type == "Softmax"}
        made = {o for n in index.nodes if n.op_type == "Where" for o in n.output}
        # masked at once, or by the sum of scores and a mask
        found[name] = {r for r in read if made & {r, *index.maker[r].input}}
    return found


def test_only_the_naive_plan_quantizes_masked_scores(quantized: Path) -> None:
    masked = scores(quantized)
    assert {name: len(found) for name, found in masked.items()} == {"text": 2, "mask": 7}
    good, naive = (plan_in(quantized, name) for name in ("int8", "naive"))
    for part, tensors in masked.items():
        assert tensors <= set(naive.parts[part].activations)
        assert not tensors & set(good.parts[part].activations)
        # -1e4 in 127 steps: one step holds every score that a word can have
        assert all(naive.parts[part].activations[t] > 10 for t in tensors)
        assert naive.parts[part].high == ()
        assert all(w.axis is None for w in naive.parts[part].weights.values())
        assert len(good.parts[part].high) > 5


def test_what_naive_costs(quantized: Path) -> None:
    """On 25 expressions: the plan follows fp32's masks, the naive one has lost them."""
    samples = [RefShapes("val", size=96, scenes=5)[i] for i in range(5)]

    def masks(plan: str) -> np.ndarray:
        segmenter = load(
            quantized, plan=plan, threads=1, dialect="ort-u8u8" if plan != "fp32" else "ort"
        )
        return np.stack(
            [
                mask.logits > 0
                for s in samples
                for mask in segmenter.scene(s.image).segment([e.text for e in s.expressions])
            ]
        )

    reference = masks("fp32")

    def agreement(plan: str) -> float:
        found = masks(plan)
        return float((found & reference).sum() / (found | reference).sum())

    # measured: 0.92 and 0.03, with 48 calibration samples and nothing spared
    assert agreement("int8") >= 0.85
    assert agreement("naive") <= 0.5


def test_half_precision_needs_no_data(own_bundle: Path) -> None:
    plan, manifest = quantize(own_bundle, "fp16")
    assert plan.calibration is None
    assert plan.rest == "fp16"
    assert all(p.int8 == () and p.activations == {} for p in plan.parts.values())
    assert [d.plan for d in manifest.dialects] == ["fp32", "fp16"]


def test_progress_tells_every_sample(own_bundle: Path) -> None:
    told: dict[str, int] = {}

    def progress(items: Any, label: str) -> Any:
        kept = list(items)
        told[label] = len(kept)
        return kept

    quantize(own_bundle, "int8", data=CALIBRATION, samples=3, spare=0.0, progress=progress)
    assert told == {"channels": 3, "ranges": 3}


names = st.sampled_from("abcdef")


@given(
    st.dictionaries(names, st.floats(0.1, 100), min_size=1),
    st.lists(st.tuples(names, names), max_size=8),
)
@settings(max_examples=200, deadline=None)
def test_both_sides_of_a_mover_have_one_scale(
    scales: dict[str, float], same: list[tuple[str, str]]
) -> None:
    """The larger one, so that nothing is clipped; along whole chains, and nowhere else."""
    before = dict(scales)
    _unify(scales, same)
    groups = {n: {n} for n in scales}
    for a, b in same:
        if a in scales and b in scales and groups[a] is not groups[b]:
            merged = groups[a] | groups[b]
            for member in merged:
                groups[member] = merged
    assert scales == {n: max(before[m] for m in groups[n]) for n in before}
