from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import refedge
from PIL import Image
from refedge.data.refshapes.dataset import RefShapes
from refedge.errors import BackendError, BundleError, InputError, RefedgeWarning
from refedge.runtime.segmenter import Segmenter, load


@pytest.fixture(scope="module")
def segmenter(bundle: Path) -> Segmenter:
    return load(bundle, threads=1)


def test_the_first_example(bundle: Path, tmp_path: Path) -> None:
    """The first lines a user writes, on a file."""
    sample = RefShapes("val", size=160)[0]
    path = tmp_path / "photo.png"
    Image.fromarray(sample.image).save(path)
    segmenter = refedge.load(bundle)
    mask = segmenter.segment(path, sample.expressions[0].text)
    assert mask.array.shape == (160, 160)
    assert mask.array.dtype == bool
    assert 0 <= mask.score <= 1
    assert mask.overlay().size == (160, 160)
    assert set(mask.rle()) == {"size", "counts"}
    assert mask.timings.total > 0


def test_it_finds_what_is_meant(segmenter: Segmenter) -> None:
    """The trained checkpoint, on attributes of unseen scenes: well above chance (about 0.15)."""
    ious = []
    for sample in RefShapes("val", scenes=40, families=("attribute",)):
        (expression,) = sample.expressions
        found = segmenter.segment(sample.image, expression.text).array
        truth = sample.mask(expression)
        ious.append(np.count_nonzero(found & truth) / np.count_nonzero(found | truth))
    assert np.mean(ious) > 0.5


def test_a_scene_gives_what_single_calls_give(segmenter: Segmenter) -> None:
    sample = RefShapes("val")[1]
    texts = [e.text for e in sample.expressions] * 5  # more than the largest batch
    together = segmenter.scene(sample.image).segment(texts)
    assert [m.expression for m in together] == texts
    for mask in together[:5]:
        alone = segmenter.segment(sample.image, mask.expression)
        # the same graph at another batch size: rounding only
        assert np.abs(mask.logits - alone.logits).max() <= 1e-3 * alone.logits.std()


def test_one_expression_may_come_without_a_list(segmenter: Segmenter) -> None:
    scene = segmenter.scene(RefShapes("val")[1].image)
    assert len(scene.segment("the red circle")) == 1
    assert scene.segment([]) == []


def test_texts_are_cached(bundle: Path) -> None:
    segmenter = load(bundle, threads=1)
    image = RefShapes("val")[2].image
    first = segmenter.segment(image, "the red circle")
    second = segmenter.segment(image, "  the RED circle")
    assert not first.timings.text_cached
    assert second.timings.text_cached
    assert np.array_equal(first.logits, second.logits)


def test_another_text_gives_another_mask(segmenter: Segmenter) -> None:
    image = RefShapes("val")[2].image
    a, b = segmenter.scene(image).segment(["the red circle", "the leftmost blue square"])
    assert np.abs(a.logits - b.logits).max() > 0.1


def test_expressions_longer_than_the_model_reads(segmenter: Segmenter) -> None:
    image = RefShapes("val")[2].image
    words = segmenter.manifest.tokenizer.words
    with pytest.warns(RefedgeWarning, match="was cut"):
        cut = segmenter.segment(image, "red " * (words + 5))
    full = segmenter.segment(image, "red " * words)
    assert np.array_equal(cut.logits, full.logits)


def test_plans_backends_and_threads_that_do_not_exist(bundle: Path) -> None:
    with pytest.raises(BundleError) as plan:
        load(bundle, plan="int2")
    assert plan.value.code == "plan-missing"
    with pytest.raises(BackendError) as backend:
        load(bundle, backend="abacus")
    assert backend.value.code == "backend-unknown"
    with pytest.raises(InputError):
        load(bundle, threads=0)


def test_a_graph_that_is_not_the_manifests(own_bundle: Path) -> None:
    """Correctly hashed, but the two parts exchanged: the tensors do not fit the manifest."""
    from dataclasses import replace

    from refedge.runtime.manifest import decode_manifest, encode_manifest

    manifest = decode_manifest((own_bundle / "manifest.json").read_bytes())
    graphs = manifest.dialects[0].graphs
    swapped = {"text": graphs["mask"], "mask": graphs["text"]}
    dialects = (replace(manifest.dialects[0], graphs=swapped),)
    raw = encode_manifest(replace(manifest, dialects=dialects))
    (own_bundle / "manifest.json").write_bytes(raw)
    with pytest.raises(BundleError) as caught:
        load(own_bundle)
    assert caught.value.code == "bundle-io"


def test_a_graph_onnx_runtime_refuses(own_bundle: Path) -> None:
    from dataclasses import replace

    from refedge.runtime.manifest import FileSpec, decode_manifest, encode_manifest

    manifest = decode_manifest((own_bundle / "manifest.json").read_bytes())
    name = manifest.dialects[0].graphs["text"]
    (own_bundle / name).write_bytes(b"nonsense")
    import hashlib

    spec = FileSpec(8, hashlib.sha256(b"nonsense").hexdigest())
    raw = encode_manifest(replace(manifest, files={**manifest.files, name: spec}))
    (own_bundle / "manifest.json").write_bytes(raw)
    with pytest.raises(BackendError) as caught:
        load(own_bundle)
    assert caught.value.code == "backend-refused"


def test_rle_is_json(segmenter: Segmenter) -> None:
    mask = segmenter.segment(RefShapes("val")[0].image, "the red circle")
    assert json.loads(json.dumps(mask.rle())) == mask.rle()
