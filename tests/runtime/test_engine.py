"""The record of engines: round trip, damage, and which machines an engine fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refedge.errors import EngineError
from refedge.runtime.engine import EngineSet, EngineSpec, Target, decode_engines, encode_engines

ORIN = Target("10.3.0.30", 87, "Orin", "12.6", "linux", "aarch64")
MASK = EngineSpec("mask.engine", "a" * 64, 10, "b" * 64, (1, 1, 4), 1 << 20, {"int8": 3})
RECORD = EngineSet("int8", "trt10", "c" * 64, ORIN, {"mask": MASK}, {"p.so": "d" * 64}, {"opt": 3})


def test_a_record_comes_back_as_it_was_written() -> None:
    back = decode_engines(encode_engines(RECORD))
    assert replace(back, digest=RECORD.digest) == RECORD
    assert encode_engines(back) == encode_engines(RECORD)


def test_a_target_is_a_folder_name() -> None:
    assert ORIN.name == "trt10.3.0.30-sm87-orin-cuda12.6-linux-aarch64"
    assert replace(ORIN, device="NVIDIA H100 80GB HBM3").name.split("-")[2] == "nvidiah10080gbhbm3"


def test_another_machine_is_told_by_what_differs() -> None:
    assert ORIN.differences(ORIN) == []
    assert ORIN.differences(replace(ORIN, sm=90, tensorrt="8.6.0")) == [
        "tensorrt 10.3.0.30 here, 8.6.0 there",
        "sm 87 here, 90 there",
    ]


@given(st.data())
def test_a_changed_byte_is_noticed(data: st.DataObject) -> None:
    raw = bytearray(encode_engines(RECORD))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(EngineError) as caught:
        decode_engines(bytes(raw))
    assert caught.value.code == "engine-damaged"


def test_an_engine_file_lies_beside_its_record() -> None:
    away = replace(RECORD, parts={"mask": replace(MASK, file="../mask.engine")})
    with pytest.raises(EngineError, match="damaged"):
        decode_engines(encode_engines(away))
