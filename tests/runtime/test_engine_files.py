"""Engines are refused or verified before anything is deserialised."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from refedge.errors import EngineError
from refedge.runtime.backends.engine_files import find_engines
from refedge.runtime.bundle import Bundle, open_bundle
from refedge.runtime.engine import EngineSet, EngineSpec, Target, decode_engines, encode_engines

ORIN = Target("10.3.0", 87, "Orin", "12.6", "linux", "aarch64")
GRAPH = "a" * 64
DATA = b"an engine"


def built(bundle: Path, target: Target = ORIN, at: Target | None = None) -> Path:
    """Engines of the plan fp16 as a builder leaves them; ``at`` puts them elsewhere."""
    folder = bundle / "engines" / (at or target).name / "fp16"
    folder.mkdir(parents=True)
    sha256 = hashlib.sha256(DATA).hexdigest()
    spec = EngineSpec("mask.engine", GRAPH, len(DATA), sha256, (1, 1, 4), 0)
    plugins = {"p.so": hashlib.sha256(b"plugin").hexdigest(), "../p.so": sha256}
    record = EngineSet("fp16", "trt10", "c" * 64, target, {"mask": spec}, plugins)
    (folder / "engines.json").write_bytes(encode_engines(record))
    (folder / "mask.engine").write_bytes(DATA)
    (folder / "p.so").write_bytes(b"plugin")
    return folder


@pytest.fixture
def opened(own_bundle: Path) -> Bundle:
    return open_bundle(own_bundle)


def test_engines_of_this_machine_are_read(opened: Bundle) -> None:
    folder = built(opened.path)
    engines = find_engines(opened, "fp16", ORIN)
    assert engines.folder == folder
    assert engines.read("mask", GRAPH) == DATA
    assert engines.plugin("p.so").read_bytes() == b"plugin"


def test_an_engine_without_weights_is_refused(opened: Bundle) -> None:
    folder = built(opened.path)
    record = decode_engines((folder / "engines.json").read_bytes())
    stripped = {"mask": replace(record.parts["mask"], stripped=True)}
    (folder / "engines.json").write_bytes(encode_engines(replace(record, parts=stripped)))
    with pytest.raises(EngineError) as caught:
        find_engines(opened, "fp16", ORIN).read("mask", GRAPH)
    assert caught.value.code == "engine-stripped"
    assert "refedge build" in caught.value.fix


def code_of(opened: Bundle, *, target: Target = ORIN, plan: str = "fp16") -> EngineError:
    with pytest.raises(EngineError) as caught:
        find_engines(opened, plan, target).read("mask", GRAPH)
    return caught.value


def test_no_engines(opened: Bundle) -> None:
    assert code_of(opened).code == "engine-missing"
    built(opened.path)
    assert code_of(opened, plan="int8").code == "engine-missing"
    with pytest.raises(EngineError, match="no engine of the part 'text'") as caught:
        find_engines(opened, "fp16", ORIN).read("text", GRAPH)
    assert caught.value.code == "engine-missing"


@pytest.mark.parametrize("at", [None, replace(ORIN, sm=90)], ids=["beside", "in this one's place"])
def test_another_machine_is_named_by_what_differs(opened: Bundle, at: Target | None) -> None:
    built(opened.path, ORIN, at)
    error = code_of(opened, target=replace(ORIN, sm=90))
    assert error.code == "engine-target"
    assert error.why == "sm 90 here, 87 there"


def test_the_nearest_of_several_machines_is_named(opened: Bundle) -> None:
    built(opened.path, replace(ORIN, sm=90, device="H100", machine="x86_64"))
    built(opened.path, ORIN)
    assert code_of(opened, target=replace(ORIN, cuda="12.8")).why == "cuda 12.8 here, 12.6 there"


def test_another_graph(opened: Bundle) -> None:
    built(opened.path)
    with pytest.raises(EngineError) as caught:
        find_engines(opened, "fp16", ORIN).read("mask", "b" * 64)
    assert caught.value.code == "engine-stale"


@pytest.mark.parametrize("data", [DATA[:-1], b"An engine", b""], ids=["cut", "changed", "empty"])
def test_a_damaged_engine(opened: Bundle, data: bytes) -> None:
    (built(opened.path) / "mask.engine").write_bytes(data)
    assert code_of(opened).code == "engine-damaged"


def test_an_engine_that_is_gone_or_a_link(opened: Bundle) -> None:
    file = built(opened.path) / "mask.engine"
    file.rename(file.with_name("other"))
    assert code_of(opened).code == "engine-damaged"
    file.symlink_to("other")
    assert code_of(opened).code == "engine-damaged"


def test_a_damaged_plugin(opened: Bundle) -> None:
    folder = built(opened.path)
    (folder / "p.so").write_bytes(b"plugin!")
    for name in ("p.so", "../p.so"):
        with pytest.raises(EngineError) as caught:
            find_engines(opened, "fp16", ORIN).plugin(name)
        assert caught.value.code == "engine-damaged"
