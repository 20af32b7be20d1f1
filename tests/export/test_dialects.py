"""All dialects of a plan compute the same, each as far as it can."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from refedge.calibration.quantize import quantize
from refedge.data.refshapes.dataset import RefShapes
from refedge.export import lower, qdq
from refedge.export.dialects import DIALECTS, write_dialect
from refedge.export.graph import GraphIndex, attribute
from refedge.runtime.bundle import open_bundle
from refedge.runtime.plan import Plan, decode_plan
from refedge.runtime.segmenter import load

from .small_graphs import operators, run

SCENES = 4  # of five expressions: 20 masks


@cache
def samples() -> tuple[object, ...]:
    shapes = RefShapes("val", size=96, scenes=SCENES)
    return tuple(shapes[i] for i in range(SCENES))


@cache
def logits(bundle: Path, plan: str, dialect: str) -> np.ndarray:
    """[20, 96, 96], as a user gets them: with every optimisation of ONNX Runtime."""
    segmenter = load(bundle, plan=plan, threads=1, dialect=dialect)
    return np.stack(
        [
            mask.logits
            for sample in samples()
            for mask in segmenter.scene(sample.image).segment([e.text for e in sample.expressions])
        ]
    )


def ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each mask; 1 where both are empty."""
    both, either = ((a > 0) & (b > 0)).sum((1, 2)), ((a > 0) | (b > 0)).sum((1, 2))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def sigmas(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, in standard deviations of the first."""
    return float(np.abs(a - b).max() / a.std())


@pytest.fixture
def same_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """What trt10 and trt8 compute in float alike, as far as it goes: layer norms in place of
    instance norms round otherwise, and so does Gelu in pieces of depthwise maps in integers, where
    a step for one integer is one for all pixels that have it. Quantizers are what is compared;
    ``test_lower.py`` holds the norms against each other."""
    monkeypatch.setattr(lower, "_instance_norm", lambda index, node: [lower._lowered(index, node)])
    monkeypatch.setattr(qdq, "_depthwise", lambda index, name, plan: False)


@pytest.mark.usefixtures("same_floats")
@pytest.mark.parametrize("plan", ["fp16", "int8"])
def test_equal_quantizers_give_equal_masks(quantized: Path, plan: str, tmp_path: Path) -> None:
    """ort and ort-u8u8 differ in weights' zero-points only, trt8 and an fp32-rest trt10 in opset
    and Gelu. Fused integer kernels are exact on int32 sums; what is left is the order of float32
    sums and two forms of erf, about 1e-6 of a logit, which a rounding to int8 may turn into a
    step. 20 masks show none of it; a thousandth of a pixel's share is left."""
    from refedge.runtime.cpu import int8_dialects

    quantized = Path(shutil.copytree(quantized, tmp_path / "own.refedge"))
    quantize(quantized, plan, dialects=["trt8", "trt10"])
    pairs = []
    if plan == "fp16" or "ort" in int8_dialects():  # else its kernels saturate, as cpu.py says
        pairs.append(("ort", "ort-u8u8"))
    if plan == "int8":
        pairs.append(("trt10", "trt8"))
    for one, two in pairs:
        a, b = (logits(quantized, plan, d) for d in (one, two))
        assert ious(a, b).min() >= 0.999
        assert np.quantile(np.abs(a - b), 0.999) <= 1e-3 * a.std()


def test_stored_tensors_are_the_only_difference(quantized: Path) -> None:
    """The ort dialects round more tensors than TensorRT's, so masks differ. They are no further
    from each other than int8 is from fp32: both are the same plan's rounding errors."""
    reference = logits(quantized, "fp32", "ort")
    ort, trt = (logits(quantized, "int8", d) for d in ("ort-u8u8", "trt10"))
    apart = ious(ort, trt).mean()
    assert apart >= min(ious(reference, ort).mean(), ious(reference, trt).mean())
    # 0.955 was measured with this calibration; a wrong scale or zero-point leaves below 0.5
    assert apart >= 0.9
    for found in (ort, trt):
        assert ious(reference, found).mean() >= 0.85


def batch(bundle: Path) -> dict[str, np.ndarray]:
    """What the mask part takes, for one scene, from the fp32 text part."""
    segmenter = load(bundle, threads=1)
    sample = samples()[0]
    tokens = [segmenter.tokenize(e.text) for e in sample.expressions]
    ids, words = (np.stack([getattr(t, n) for t in tokens]) for n in ("ids", "words"))
    pixels = np.repeat(sample.image[None], len(tokens), axis=0)
    return {**segmenter.run_text(ids, words), "pixels": pixels}


def read(bundle: Path, plan: str) -> tuple[Plan, onnx.ModelProto]:
    opened = open_bundle(bundle)
    made = decode_plan(opened.file(opened.manifest.plans[plan]).read_bytes())
    return made, onnx.load(opened.file(opened.manifest.canonical.graphs["mask"]))


def test_the_dialects_of_tensorrt_are_as_good(quantized: Path) -> None:
    """Norms and Gelu round otherwise in trt8, which moves a few integers; no further from fp32."""
    reference = logits(quantized, "fp32", "ort")
    one, two = (logits(quantized, "int8", d) for d in ("trt10", "trt8"))
    assert ious(one, two).mean() >= 0.98
    assert abs(ious(reference, one).mean() - ious(reference, two).mean()) <= 0.01


@pytest.mark.usefixtures("same_floats")
@pytest.mark.parametrize("plan", ["int8", "naive"])
def test_without_stored_tensors_every_dialect_is_the_same(quantized: Path, plan: str) -> None:
    """One quantizer: with the same pairs and nothing optimised, four graphs, the same numbers.
    trt8 computes Gelu in pieces, so an integer may come out one step off."""
    made, model = read(quantized, plan)
    part = made.parts["mask"]
    kept = {n: s for n, s in part.activations.items() if n not in part.stored}
    # nor the constants that only ONNX Runtime has in int8, those of nodes outside ``int8``
    index = GraphIndex(model)
    used = {i for n in index.nodes if n.name in part.int8 for i in n.input}
    weights = {n: s for n, s in part.weights.items() if n in used}
    part = replace(part, activations=kept, stored=(), factors=(), weights=weights)
    given = batch(quantized)
    found = {}
    for dialect in DIALECTS:
        written, *_ = write_dialect(model, dialect, made, part)
        taken = {i.name: given[i.name] for i in written.graph.input}
        found[dialect] = run(written, taken)["logits"]
    for dialect in ("ort-u8u8", "trt10"):
        assert np.array_equal(found["ort"], found[dialect])
    if plan == "int8":  # the masks of the naive plan are noise
        assert ious(found["ort"], found["trt8"]).min() >= 0.98
    # whatever single steps do in what follows, most logits do not see them
    close = np.abs(found["ort"] - found["trt8"]) <= 1e-2 * found["ort"].std()
    assert close.mean() >= 0.99


def test_half_precision(quantized: Path) -> None:
    """ort stores float16 weights and computes in float32; trt10 computes in float16, with the
    sensitive nodes in float32; trt8 leaves it to the builder, so its graph is fp32's."""
    reference = logits(quantized, "fp32", "ort")
    ort, trt10, trt8 = (logits(quantized, "fp16", d) for d in ("ort", "trt10", "trt8"))
    # opset 17 has Gelu in pieces: float32 noise
    assert sigmas(reference, trt8) <= 1e-3
    for found in (ort, trt10):
        # 11 bits through some 60 layers: 0.02 and 0.03 σ were measured, 0.999 of the masks' area
        assert sigmas(reference, found) <= 0.1
        assert ious(reference, found).mean() >= 0.995
        assert not np.array_equal(reference, found)


def test_what_half_weights_save(quantized: Path) -> None:
    opened = open_bundle(quantized)

    def size(plan: str, dialect: str) -> int:
        spec = opened.dialect([dialect], plan)
        return sum(opened.manifest.files[f].bytes for f in spec.files if f.endswith(".weights"))

    whole = size("fp32", "ort")
    # vectors such as biases stay in float32 in "ort"
    assert 0.45 * whole <= size("fp16", "ort") <= 0.6 * whole
    assert size("fp16", "trt10") <= 0.6 * whole
    # a byte instead of four for matrices, whether or not their node computes in integers
    assert size("int8", "ort") <= 0.3 * whole


def test_weights_that_dialects_share(quantized: Path) -> None:
    """int8 weights are the same bytes for ort and trt8; nothing is stored twice."""
    opened = open_bundle(quantized)
    weights = {
        (d.name, d.plan): {f for f in d.files if f.endswith(".weights")}
        for d in opened.manifest.dialects
    }
    held = {}
    for dialect in ("ort", "trt8"):
        file = opened.dialect([dialect], "int8").graphs["mask"]
        model = onnx.load(opened.file(file))
        held[dialect] = {
            t.name: numpy_helper.to_array(t).tobytes()
            for t in model.graph.initializer
            if t.name.endswith("/int8")
        }
    # the first bases are a factor of a product that only ONNX Runtime makes in integers
    bases = held["ort"].pop("classifier.hamburger.ham/MatMul/factor/int8")
    assert len(bases) == 48 * 16
    assert held["ort"] == held["trt8"]
    assert weights["ort", "fp16"] == weights["ort-u8u8", "fp16"]
    assert weights["trt8", "fp16"] == weights["ort", "fp32"]


@pytest.mark.parametrize("plan", ["fp16", "int8"])
def test_the_sidecar_of_trt8(quantized: Path, plan: str) -> None:
    """It names the layers that the builder must keep in float32, and they are in the graph."""
    opened = open_bundle(quantized)
    spec = opened.dialect(["trt8"], plan)
    for file in spec.graphs.values():
        record = json.loads(opened.file(f"{file}.layers.json").read_bytes())
        assert record["precision"] == ("fp16" if plan == "fp16" else "fp32")
        names = {n.name for n in onnx.load(opened.file(file), load_external_data=False).graph.node}
        assert record["float32"] == sorted(record["float32"])
        assert set(record["float32"]) <= names
        assert len(record["float32"]) > 5
    for other in ("ort", "ort-u8u8", "trt10"):
        assert all(f.endswith(".weights") for f in opened.dialect([other], plan).files)


def test_a_graph_says_what_it_is(quantized: Path) -> None:
    opened = open_bundle(quantized)
    for spec in opened.manifest.dialects:
        for file in spec.graphs.values():
            model = onnx.load(opened.file(file), load_external_data=False)
            said = {p.key: p.value for p in model.metadata_props}
            assert said == {"refedge.dialect": spec.name, "refedge.plan": spec.plan}


def test_the_source_is_not_changed(quantized: Path) -> None:
    made, model = read(quantized, "int8")
    before = model.SerializeToString()
    for dialect in DIALECTS:
        written, *_ = write_dialect(model, dialect, replace(made, rest="fp16"), made.parts["mask"])
        assert "QuantizeLinear" in operators(written)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("dialect", ["trt10", "trt8"])
def test_depthwise_convolutions_in_integers_write_integers(quantized: Path, dialect: str) -> None:
    """TensorRT would fuse a Gelu into such a node, and has no kernel for that in int8."""
    opened = open_bundle(quantized)
    model = onnx.load(opened.file(opened.dialect([dialect], "int8").graphs["mask"]))
    index, seen = GraphIndex(model), 0
    for node in index.nodes:
        made = [index.maker.get(name) for name in node.input[:2]]
        whole = all(m is not None and m.op_type == "DequantizeLinear" for m in made)
        if node.op_type == "Conv" and attribute(node, "group", 1) != 1 and whole:
            seen += 1
            kinds = {reader.op_type for reader in index.readers[node.output[0]]}
            assert kinds <= {"QuantizeLinear", "Relu"}, node.name
    assert seen > 20
