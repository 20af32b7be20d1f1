"""Weight files made by somebody who means harm.

Every one of these runs code, ends the process, or asks for all memory where it is trusted, some of
them even through ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refedge.errors import CheckpointError
from refedge.models.convert.pickles import _PLAIN, Global, RefusedError, Stored, Thing, Unpickler
from refedge.models.convert.weights import read_weights

from .test_pickles import CODE

STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def number(n: int) -> bytes:
    return pickle.dumps(n, 2)[2:-1]


def tensor(
    offset: int = 0,
    shape: Iterable[int] = (4,),
    strides: Iterable[int] = (1,),
    *,
    storage: bytes = STORAGE,
) -> bytes:
    """A call that rebuilds a tensor."""
    sizes, steps = (b"(" + b"".join(map(number, n)) + b"t" for n in (shape, strides))
    return REBUILD + b"(" + storage + number(offset) + sizes + steps + b"\x89}tR"


def state(**tensors: bytes) -> bytes:
    items = b"".join(
        b"X" + struct.pack("<I", len(name)) + name.encode() + value
        for name, value in tensors.items()
    )
    return b"\x80\x02}(" + items + b"u."


def archive(path: Path, program: bytes, **files: bytes) -> Path:
    """A zip as torch writes it, with storage 0 of four numbers."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
        for name, content in files.items():
            file.writestr(f"archive/{name}", content)
    return path


def legacy(path: Path, program: bytes) -> Path:
    """The format before torch 1.6."""
    head = b"".join(
        pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    program = program.replace(b"cpuK\x04tQ", b"cpuK\x04NtQ")  # a view, or none
    tail = pickle.dumps(["0"], 2) + struct.pack("<q4f", 4, 1, 2, 3, 4)
    path.write_bytes(head + program + tail)
    return path


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError, match="evil") as caught:
        read_weights(path, "model")
    assert len(str(caught.value)) < 1500
    return caught.value


WRITERS = {"zip": archive, "legacy": legacy}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_writers_write_what_is_read(writer: str, tmp_path: Path) -> None:
    path = WRITERS[writer](tmp_path / "good.pth", state(a=tensor(), b=tensor(1, (2,), (2,))))
    found = read_weights(path, "model")["model"]
    assert {k: v.tolist() for k, v in found.items()} == {"a": [1, 2, 3, 4], "b": [2, 4]}
    whole = torch.load(path, weights_only=True)
    assert all(torch.equal(found[k], whole[k]) for k in whole)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("program", CODE.values(), ids=CODE.keys())
def test_code_is_refused(
    program: bytes, writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = WRITERS[writer](tmp_path / "evil.pth", program)
    assert refused(path).code in ("weights-pickle", "weights-damaged", "weights-layout")
    assert os.listdir(tmp_path) == ["evil.pth"]


HIDDEN = {
    "a call beside the weights": b"\x80\x02}(X\x01\x00\x00\x00a" + tensor() + b"X\x01\x00\x00\x00b"
    b"cos\nsystem\n(X\x0c\x00\x00\x00touch harmedtRu.",
    "a method of torch": b"\x80\x02ctorch.serialization\nload\n(X\x01\x00\x00\x00xtR.",
    "a method of our own": b"\x80\x02crefedge.models.convert.weights\nread_weights\n.",
    "a name inside a name": b"\x80\x02c__torch__x\nos.system\n(X\x0c\x00\x00\x00touch harmedtR.",
    "an attribute of a known name": b"\x80\x02ccollections\nOrderedDict.__init__.__globals__\n.",
    "bytearray of 8 GB": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R.",
    "a tensor of 40 GB": b"\x80\x02ctorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x02\x85\x81.",
    "a storage of another kind": b"\x80\x02" + STORAGE.replace(b"FloatStorage", b"Size") + b".",
    "a persistent id of another kind": b"\x80\x02(X\x06\x00\x00\x00moduleNNNNtQ.",
    "a tuple as a key": b"\x80\x02})K\x01s.",
    "a call of data": b"\x80\x02}}R.",
    "a class of data": b"\x80\x02})\x81.",
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("program", HIDDEN.values(), ids=HIDDEN.keys())
def test_what_weights_do_not_need_is_refused(
    program: bytes, writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = WRITERS[writer](tmp_path / "evil.pth", program)
    assert refused(path).code == "weights-pickle"
    assert os.listdir(tmp_path) == ["evil.pth"]


def test_classes_of_torchscript_are_only_names(tmp_path: Path) -> None:
    """They are made without a class, with whatever name and attributes."""
    program = b"\x80\x02c__torch__.os\nsystem\n)\x81}X\x01\x00\x00\x00w" + tensor() + b"sb."
    found = read_weights(archive(tmp_path / "clip.pt", program), "model")["model"]
    assert found["w"].tolist() == [1, 2, 3, 4]
    called = b"\x80\x02c__torch__.os\nsystem\n(X\x0c\x00\x00\x00touch harmedtR."
    assert type(Unpickler(io.BytesIO(called)).load()) is Thing
    assert type(Unpickler(io.BytesIO(b"c__torch__\nM\n.")).load()) is Global


BIG = (1 << 62) - 1
SIZES = {
    "beyond its storage": tensor(0, (5,), (1,)),
    "from beyond its storage": tensor(4, (1,), (1,)),
    "before its storage": tensor(-1, (1,), (1,)),
    "of negative size": tensor(0, (-1,), (1,)),
    "of negative stride": tensor(3, (4,), (-1,)),
    "of one number a billion times": tensor(0, (10**9,), (0,)),
    "of four numbers eight times": tensor(0, (2, 4, 4), (0, 0, 1)),
    "of sizes that overflow": tensor(0, (BIG, BIG), (BIG, BIG)),
    "of a size that is none": REBUILD + b"(" + STORAGE + b"K\x00(X\x01\x00\x00\x004t(K\x01t\x89}tR",
    "of too few strides": tensor(0, (2, 2), (1,)),
    "of 100 axes": tensor(0, (1,) * 100, (1,) * 100),
    "without a storage": REBUILD + b"(NK\x00(K\x04t(K\x01t\x89}tR",
    "of a storage that is not there": tensor(storage=STORAGE.replace(b"0X\x03", b"1X\x03")),
    "of a storage that is larger": tensor(storage=STORAGE.replace(b"K\x04t", b"K\x05t")),
    "of a storage elsewhere": tensor(
        storage=STORAGE.replace(b"X\x01\x00\x00\x000", b"X\x0f\x00\x00\x00../../etc/passwd"[:20])
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("program", SIZES.values(), ids=SIZES.keys())
def test_tensors_that_lie(program: bytes, writer: str, tmp_path: Path) -> None:
    path = WRITERS[writer](tmp_path / "evil.pth", state(a=program))
    assert refused(path).code == "weights-damaged"


def test_empty_tensors_of_impossible_shapes_are_harmless(tmp_path: Path) -> None:
    path = archive(tmp_path / "evil.pth", state(a=tensor(0, (0, BIG, BIG), (1, 1, 1))))
    try:
        assert read_weights(path, "model")["model"]["a"].numel() == 0
    except CheckpointError as error:
        assert error.code == "weights-damaged"


def test_many_views_of_one_storage(tmp_path: Path) -> None:
    """Half floats as float32, a hundred times: more than the file can mean."""
    half = STORAGE.replace(b"FloatStorage", b"HalfStorage").replace(b"K\x04t", b"M\x00\x40t")
    program = state(**{f"v{i}": tensor(0, (1 << 14,), (1,), storage=half) for i in range(100)})
    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/data/0", bytes(1 << 15))
    error = refused(tmp_path / "evil.pth")
    assert error.code == "weights-damaged"
    assert "claims tensors" in error.why


DEEP = 3_000_000
HEAVY = {
    "nested tuples as a key end the process": b"\x80\x02})" + b"\x85" * DEEP + b"K\x01s.",
    "nested tuples as a shape": b"\x80\x02" + REBUILD + b"(" + STORAGE + b"K\x00)" + b"\x85" * 10**6
    + b"(K\x01t\x89}tR.",
    "nested tuples as a storage": b"\x80\x02)" + b"\x85" * 10**6 + b"Q.",
    "marks and nothing else": b"\x80\x02" + b"(" * 10**6 + b".",
    "a string of 4 GB": b"\x80\x02X\xff\xff\xff\xffa.",
    "an endless name": b"\x80\x02c" + b"a" * 10**6,
    "nothing": b"",
    "no end": b"\x80\x02]]",
    "an unknown memo": b"\x80\x02h\x07.",
    "an item of a list": b"\x80\x02]K\x01K\x02s.",
    "a key without a value": b"\x80\x02}(K\x01u.",
    "a tensor that is built": state(a=tensor() + b"}b"),
    "stop at once": b".",
    "a future protocol": b"\x80\xff}.",
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("program", HEAVY.values(), ids=HEAVY.keys())
def test_what_breaks_unpicklers(program: bytes, writer: str, tmp_path: Path) -> None:
    path = WRITERS[writer](tmp_path / "evil.pth", program)
    assert refused(path).code in ("weights-damaged", "weights-pickle")


def module(attributes: bytes) -> bytes:
    return b"c__torch__\nM\n)\x81}(" + attributes + b"ub"


def test_modules_that_hold_themselves(tmp_path: Path) -> None:
    program = b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00mh\x00sb."
    assert "without end" in refused(archive(tmp_path / "evil.pt", program)).why


def test_modules_that_multiply(tmp_path: Path) -> None:
    """Sixty modules, each holding the one before twice: 2^60 names."""
    program = module(b"X\x01\x00\x00\x00w" + tensor()) + b"q\x00"
    for _ in range(60):
        program = (
            program[:-2] + b"q\x00" + module(b"X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00")
        )
        program += b"q\x00"
    assert "without end" in refused(archive(tmp_path / "evil.pt", b"\x80\x02" + program + b".")).why


def test_a_packed_bomb(tmp_path: Path) -> None:
    """A gigabyte of zeros in a megabyte; torch stores its tensors as they are."""
    path = tmp_path / "evil.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", state(a=tensor()), zipfile.ZIP_STORED)
        with file.open("archive/data/0", "w") as entry:
            for _ in range(64):
                entry.write(bytes(1 << 20))
    assert "compressed" in refused(path).why


def test_entries_that_overlap(tmp_path: Path) -> None:
    """One run of bytes listed a thousand times."""
    path = archive(tmp_path / "evil.pth", state(a=tensor()), **{"data/1": bytes(1 << 16)})
    with zipfile.ZipFile(path, "a") as file:
        (large,) = (e for e in file.infolist() if e.filename == "archive/data/1")
        for i in range(2, 1000):
            copy = zipfile.ZipInfo(f"archive/data/{i}")
            for name in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(copy, name, getattr(large, name))
            file.filelist.append(copy)
            file.NameToInfo[copy.filename] = copy
        file._didModify = True  # type: ignore[attr-defined]
    with zipfile.ZipFile(path) as file:
        assert len(file.namelist()) > 1000
    assert "overlap" in refused(path).why


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_pickles(tmp_path: Path) -> None:
    """Readers may differ about which one counts."""
    for i, name in enumerate(("archive/data.pkl", "other/data.pkl")):
        path = archive(tmp_path / f"evil{i}.pth", state(a=tensor()))
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(name, CODE["GLOBAL and REDUCE"])
        assert refused(path).code == "weights-damaged"


def test_a_file_of_the_other_byte_order(tmp_path: Path) -> None:
    path = archive(tmp_path / "evil.pth", state(a=tensor()), byteorder=b"big")
    assert "big-endian" in refused(path).why


opcodes = st.sampled_from([o.code.encode("latin1") for o in pickletools.opcodes])
pieces = st.sampled_from(
    [b"os\n", b"system\n", b"\x01", b"\x00", b"(", b"]", b"}", b")", STORAGE, REBUILD, tensor(),
     b"c__torch__\nM\n", b"cargparse\nNamespace\n"]
)  # fmt: skip


@given(st.lists(opcodes | pieces, max_size=40).map(b"".join))
@settings(max_examples=400, deadline=None)
def test_any_program_is_data_or_an_error(program: bytes) -> None:
    try:
        found = Unpickler(io.BytesIO(program + b".")).load()
    except Exception:
        return
    waiting, seen = [found], set()
    while waiting:
        value = waiting.pop()
        assert type(value) in (
            *(list, dict, tuple, str, int, float, bool, type(None)),
            *(Global, Thing, Stored, type(STORED.storage)),
        )
        if id(value) not in seen and isinstance(value, list | tuple | dict | Thing):
            seen.add(id(value))
            inner = value.state if isinstance(value, Thing) else value
            waiting += inner.values() if isinstance(inner, dict) else inner


STORED: Stored = Unpickler(io.BytesIO(b"\x80\x02" + tensor() + b".")).load()


def test_only_opcodes_that_torch_writes_are_allowed() -> None:
    allowed = {o.name for o in pickletools.opcodes if o.code.encode("latin1") in _PLAIN}
    assert len(allowed) == len(_PLAIN)
    changed = {"REDUCE", "NEWOBJ", "BUILD", "SETITEM", "SETITEMS"}  # by ours
    assert not allowed & {*changed, "INST", "OBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "PERSID"}
    for name in changed:
        (code,) = (o.code for o in pickletools.opcodes if o.name == name)
        assert Unpickler.dispatch[ord(code)].__module__ == "refedge.models.convert.pickles"
    with pytest.raises(RefusedError):
        Unpickler(io.BytesIO(b"")).find_class("os", "system")
