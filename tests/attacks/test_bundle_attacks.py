"""Bundles made by somebody who means harm, or by a bad copy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refedge.errors import BundleError
from refedge.runtime.bundle import open_bundle
from refedge.runtime.manifest import FileSpec, decode_manifest, encode_manifest
from refedge.runtime.segmenter import load


@given(st.data())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_changed_byte_anywhere_is_refused(own_bundle: Path, data: st.DataObject) -> None:
    files = sorted(p for p in own_bundle.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        with pytest.raises(BundleError) as caught:
            load(own_bundle)
        assert caught.value.code == "bundle-damaged"
    finally:
        path.write_bytes(whole)


def test_truncated_and_missing_files(own_bundle: Path) -> None:
    weights = next(own_bundle.rglob("*.weights"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=weights.name):
        load(own_bundle)
    weights.unlink()
    with pytest.raises(BundleError, match="missing"):
        load(own_bundle)


@pytest.mark.parametrize(
    "name", ["../outside", "graphs/../../outside", "/etc/hostname", "", "a\\..\\..\\b"]
)
def test_names_that_lead_out(own_bundle: Path, name: str) -> None:
    """Even a manifest with a valid digest cannot make the reader open other files."""
    (own_bundle.parent / "outside").write_bytes(b"x")
    manifest = decode_manifest((own_bundle / "manifest.json").read_bytes())
    evil = replace(manifest, files={**manifest.files, name: FileSpec(1, "0" * 64)})
    (own_bundle / "manifest.json").write_bytes(encode_manifest(evil))
    with pytest.raises(BundleError, match="out of the bundle"):
        open_bundle(own_bundle)


def test_graphs_that_lead_out(own_bundle: Path, tmp_path: Path) -> None:
    """A graph that the manifest does not list, hence nobody verified, is not loaded."""
    manifest = decode_manifest((own_bundle / "manifest.json").read_bytes())
    dialect = manifest.dialects[0]
    evil = replace(dialect, graphs={**dialect.graphs, "mask": "../evil.onnx"})
    (own_bundle.parent / "evil.onnx").write_bytes(b"")
    raw = encode_manifest(replace(manifest, dialects=(evil,)))
    (own_bundle / "manifest.json").write_bytes(raw)
    with pytest.raises(BundleError) as caught:
        load(own_bundle)
    assert caught.value.code == "bundle-damaged"


def test_links_are_not_followed(own_bundle: Path, tmp_path: Path) -> None:
    tokenizer = own_bundle / "tokenizer.json"
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_bytes(tokenizer.read_bytes())
    tokenizer.unlink()
    tokenizer.symlink_to(elsewhere)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        open_bundle(own_bundle)
