"""Dataset pickles made by somebody who means harm, or by a bad copy.

Every one of these makes the standard unpickler run code, crash, or ask for all memory.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refedge.data.refer import Refer
from refedge.data.safe_pickle import _PLAIN, _PlainUnpickler, _RefusedError, loads_plain
from refedge.errors import DataError

from ..data.refer_writer import dumps_like_python2, refcoco

SYSTEM = b"cos\nsystem\n"
TOUCH = b"(S'touch harmed'\n"
NAME = b"\x8c\x02os\x8c\x06system\x93"

CODE = {
    "GLOBAL and REDUCE": SYSTEM + TOUCH + b"tR.",
    "GLOBAL alone": SYSTEM + b".",
    "GLOBAL of a harmless name": b"ccollections\nOrderedDict\n.",
    "GLOBAL hidden in a ref": b"(lp0\n(dp1\nS'ref_id'\n" + SYSTEM + b"sa.",
    "STACK_GLOBAL": b"\x80\x04" + NAME + b"\x8c\x0ctouch harmed\x85R.",
    "INST": TOUCH + b"ios\nsystem\n.",
    "OBJ": b"(" + SYSTEM + b"S'touch harmed'\no.",
    "NEWOBJ": SYSTEM + TOUCH + b"t\x81.",
    "NEWOBJ_EX": b"\x80\x04" + NAME + b"\x8c\x0ctouch harmed\x85}\x92.",
    "BUILD on nothing": b"b.",
    "BUILD on a list": b"]}S'x'\nI1\nsb.",
    "REDUCE on data": b"]]R.",
    "EXT1": b"\x80\x02\x82\xf0" + TOUCH + b"tR.",
    "EXT2": b"\x80\x02\x83\xf0\x00" + TOUCH + b"tR.",
    "EXT4": b"\x80\x02\x84\xf0\x00\x00\x00" + TOUCH + b"tR.",
    "PERSID": b"Pharm\n.",
    "BINPERSID": b"S'harm'\nQ.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "READONLY_BUFFER": b"\x80\x05]\x98.",
}


@pytest.mark.parametrize("raw", CODE.values(), ids=CODE.keys())
def test_code_is_refused(raw: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="evil") as caught:
        loads_plain(raw, "evil.p")
    assert caught.value.code == "data-pickle"
    assert os.listdir(tmp_path) == []


def test_the_attacks_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("GLOBAL and REDUCE", "STACK_GLOBAL", "INST", "OBJ"):
        pickle.loads(CODE[name])
        (tmp_path / "harmed").unlink()


def test_an_extension_that_was_loaded_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard unpickler takes it from a cache, without asking for a global."""
    called: list[str] = []
    monkeypatch.setitem(copyreg._extension_cache, 0xF0, called.append)  # type: ignore[attr-defined]
    pickle.loads(CODE["EXT1"])
    assert called == ["touch harmed"]
    with pytest.raises(DataError):
        loads_plain(CODE["EXT1"], "evil.p")
    assert called == ["touch harmed"]


def test_the_dataset_is_refused_by_name(tmp_path: Path) -> None:
    root = refcoco().write(tmp_path)
    file = root / "refcoco" / "refs(unc).p"
    file.write_bytes(CODE["GLOBAL and REDUCE"])
    with pytest.raises(DataError) as caught:
        Refer(root)
    assert str(file) in caught.value.what
    assert "GLOBAL" in caught.value.why


DEEP = 300_000
HEAVY = {
    "nested tuples as a key overflow the stack": b"\x80\x02})" + b"\x85" * DEEP + b"K\x01s.",
    "nested sets as a key": b"\x80\x04}" + b"(" * DEEP + b"\x91" * DEEP + b"K\x01s.",
    "a string of 2 GB": b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b"a.",
    "a string of an exabyte": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"a.",
    "a frame beyond all memory": b"\x80\x04\x95" + struct.pack("<Q", 2**64 - 1) + b"].",
    "bytes of an exabyte": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"a.",
    "a number of 2 GB": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
    "a number of negative size": b"\x80\x02\x8b" + struct.pack("<i", -5) + b"a.",
    "a number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "another of them": b"I" + b"9" * 1_000_000 + b"\n.",
    "marks and nothing else": b"(" * DEEP + b".",
    "no end": b"]" * DEEP,
    "nothing": b"",
    "a future protocol": b"\x80\xff].",
    "no opcode": b"\xff.",
    "a list in a number": b"K\x01]a.",
    "an item of a list": b"]K\x01K\x02s.",
    "a list as a key": b"}]K\x01s.",
    "an unknown memo": b"h\x07.",
    "an unfinished string": b"S'a\n.",
    "an odd dict": b"(S'a'\nd.",
    "stop at once": b".",
}


@pytest.mark.parametrize("raw", HEAVY.values(), ids=HEAVY.keys())
def test_what_breaks_unpicklers(raw: bytes) -> None:
    with pytest.raises(DataError):
        loads_plain(raw, "evil.p")


def test_plain_data_may_be_deep_and_large(tmp_path: Path) -> None:
    """It loads, and what is not a list of refs is refused in a sentence."""
    deep = loads_plain(b"]" * DEEP + b"a" * (DEEP - 1) + b".", "deep.p")
    assert len(deep) == 1
    assert loads_plain(pickle.dumps(1 << 100_000, 2), "huge.p") == 1 << 100_000
    assert loads_plain(b"\x80\x02]r\xff\xff\xff\xff.", "memo of 64 GB.p") == []
    assert loads_plain(b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"].", "frame.p") == []
    root = refcoco().write(tmp_path)
    for content in (
        b"]" * DEEP + b"a" * (DEEP - 1) + b".",
        pickle.dumps([{"ref_id": 1 << 100_000}], 2),
        pickle.dumps({"a": 1}, 2),
        pickle.dumps([None], 2),
        b"]q\x00h\x00a.",  # a list that holds itself
    ):
        (root / "refcoco" / "refs(unc).p").write_bytes(content)
        with pytest.raises(DataError) as caught:
            Refer(root)
        assert caught.value.code == "data-corrupt"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(plain, st.integers(0, 5))
@settings(deadline=None)
def test_plain_data_is_read_as_the_standard_unpickler_reads_it(content: Any, protocol: int) -> None:
    assert loads_plain(pickle.dumps(content, protocol), "it") == content


def test_python2_strings_are_latin1() -> None:
    content = [{"raw": "caf\xe9", "long": "x" * 300, "quote": 'it\'s "so"\n'}]
    for protocol, opcode in ((0, pickle.STRING), (1, pickle.BINSTRING), (2, pickle.BINSTRING)):
        raw = dumps_like_python2(content, protocol)
        assert loads_plain(raw, "it") == content
        assert opcode in raw
        assert pickle.BINUNICODE + b"\x04\x00" not in raw


@given(st.binary(max_size=80))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_plain_data_or_an_error(raw: bytes) -> None:
    read_or_refused(raw)


opcodes = st.sampled_from([opcode.code.encode("latin1") for opcode in pickletools.opcodes])
words = st.sampled_from(
    [b"os\n", b"system\n", b"\x01", b"\x00", b"(", b"'a'\n", b"1\n", b"]", b"}"]
)


@given(st.lists(opcodes | words, max_size=40).map(b"".join))
@settings(max_examples=500, deadline=None)
def test_any_program_is_plain_data_or_an_error(raw: bytes) -> None:
    read_or_refused(raw + b".")


WHOLE = dumps_like_python2(refcoco().refs[:2])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_plain_data_or_an_error(data: st.DataObject) -> None:
    damaged = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(WHOLE) - 1))] = data.draw(st.integers(0, 255))
    read_or_refused(bytes(damaged[: data.draw(st.integers(0, len(WHOLE)))]))


def read_or_refused(raw: bytes) -> None:
    try:
        found = loads_plain(raw, "it")
    except DataError as error:
        assert error.code in ("data-pickle", "data-corrupt")
        return
    waiting, seen = [found], set()
    while waiting:
        value = waiting.pop()
        assert type(value) in (list, dict, str, int, float, bool, type(None))
        if isinstance(value, list | dict) and id(value) not in seen:
            seen.add(id(value))
            waiting += value
            waiting += value.values() if isinstance(value, dict) else []


def test_only_opcodes_of_plain_data_are_allowed() -> None:
    names = {o.name for o in pickletools.opcodes if o.code.encode("latin1") in _PLAIN}
    assert len(names) == len(_PLAIN)
    calls = ("GLOBAL", "INST", "OBJ", "REDUCE", "BUILD", "EXT1", "PERSID", "BUFFER", "TUPLE")
    assert not {n for n in names for call in calls if n.endswith(call)}


def test_globals_are_refused_a_second_time() -> None:
    class Unlocked(_PlainUnpickler):
        dispatch = pickle._Unpickler.dispatch  # type: ignore[attr-defined]

    with pytest.raises(_RefusedError):
        Unlocked(io.BytesIO(CODE["GLOBAL alone"])).load()
