from __future__ import annotations

import json
from pathlib import Path

import pytest
from refedge.errors import BundleError
from refedge.runtime.bundle import open_bundle, sha256_of


def test_a_bundle_lists_every_file_it_has(bundle: Path) -> None:
    opened = open_bundle(bundle)
    there = {str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file()}
    assert there == {"manifest.json", *opened.manifest.files}
    for name, spec in opened.manifest.files.items():
        assert sha256_of(bundle / name) == spec.sha256
        assert (bundle / name).stat().st_size == spec.bytes


def test_dialects_share_weights(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    weights = [n for n in manifest.files if n.endswith(".weights")]
    assert len(weights) == len(manifest.parts)
    assert len(manifest.dialects) >= 1


def test_the_manifest_says_where_it_comes_from(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.model == "slvit"
    assert {"refedge", "torch", "onnx"} <= set(manifest.provenance["packages"])
    assert manifest.parity["runs"]["ort fp32, batch 4"]["end_to_end"]["iou"] >= 0.999
    text = (bundle / "manifest.json").read_text()
    assert json.loads(text)["schema"] == 1


def test_missing_plans_and_bundles(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle).dialect("ort", "int4")
    assert caught.value.code == "plan-missing"
    for path in (tmp_path, tmp_path / "none.refedge", bundle / "manifest.json"):
        with pytest.raises(BundleError) as caught:
            open_bundle(path)
        assert caught.value.code == "bundle-missing"
