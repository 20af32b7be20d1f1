from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refedge.errors import BundleError
from refedge.runtime.manifest import (
    DialectSpec,
    FileSpec,
    Manifest,
    PartSpec,
    PostprocessSpec,
    PreprocessSpec,
    TensorSpec,
    TokenizerSpec,
    decode_manifest,
    encode_manifest,
)

PART = PartSpec(
    "mask",
    (TensorSpec("pixels", "uint8", ("batch", 96, 96, 3)),),
    (TensorSpec("logits", "float32", ("batch", 96, 96)),),
    (1, 1, 16),
)
MANIFEST = Manifest(
    model="slvit",
    config={"size": 96, "widths": [1, 2]},
    preprocess=PreprocessSpec(96, 96),
    tokenizer=TokenizerSpec("tokenizer.json", 20, 0, 1, True, False),
    postprocess=PostprocessSpec(),
    protocol="refshapes",
    parts=(PART,),
    canonical=DialectSpec("canonical", "fp32", {"mask": "graphs/mask.onnx"}),
    high=("head",),
    plans={},
    dialects=(DialectSpec("ort", "fp32", {"mask": "graphs/mask.ort.fp32.onnx"}),),
    files={"graphs/mask.onnx": FileSpec(3, "ab" * 32)},
)


def test_round_trip() -> None:
    raw = encode_manifest(MANIFEST)
    decoded = decode_manifest(raw)
    assert encode_manifest(decoded) == raw
    assert decoded.part("mask") == PART


@given(st.data())
@settings(max_examples=200)
def test_any_changed_byte_is_noticed(data: st.DataObject) -> None:
    raw = bytearray(encode_manifest(MANIFEST))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BundleError) as caught:
        decode_manifest(bytes(raw))
    assert caught.value.code == "bundle-damaged"


@given(st.integers(0, 2000))
def test_any_truncation_is_noticed(length: int) -> None:
    raw = encode_manifest(MANIFEST)
    with pytest.raises(BundleError):
        decode_manifest(raw[: min(length, len(raw) - 1)])


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    with pytest.raises(BundleError):
        decode_manifest(raw)


def signed(text: str) -> bytes:
    """A manifest with a correct digest, whatever it says."""
    blank = text.replace("DIGEST", "0" * 64).encode()
    return text.replace("DIGEST", hashlib.sha256(blank).hexdigest()).encode()


def test_a_newer_schema_is_named() -> None:
    with pytest.raises(BundleError) as caught:
        decode_manifest(signed('{"schema": 2, "digest": "DIGEST"}'))
    assert caught.value.code == "bundle-schema"


@pytest.mark.parametrize("body", ['"model": 3,', "", '"model": "x", "parts": {},'])
def test_wrong_types_are_named(body: str) -> None:
    with pytest.raises(BundleError) as caught:
        decode_manifest(signed("{" + body + '"schema": 1, "digest": "DIGEST"}'))
    assert caught.value.code == "bundle-damaged"
