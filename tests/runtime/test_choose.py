"""Which backend runs, on a machine without a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from refedge.errors import BackendError, EngineError, RefedgeWarning
from refedge.runtime.backends import cuda, tensorrt
from refedge.runtime.backends.onnx_runtime import PROVIDERS, OnnxRuntimeBackend
from refedge.runtime.segmenter import load

from .test_engine_files import ORIN, built


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    tensorrt._opened.cache_clear()


def test_without_engines_it_is_onnx_runtime(bundle: Path) -> None:
    assert load(bundle).backend.name == "onnxruntime"


@pytest.mark.usefixtures("no_tensorrt")
def test_engines_do_not_make_a_machine_without_tensorrt_fail(own_bundle: Path) -> None:
    folder = built(own_bundle)
    folder.rename(folder.with_name("fp32"))
    assert load(own_bundle).backend.name == "onnxruntime"
    with pytest.raises(BackendError) as caught:
        load(own_bundle, backend="tensorrt")
    assert caught.value.code == "backend-missing"


def test_engines_of_another_machine_are_said_to_be_there(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built(own_bundle)
    folder.rename(folder.with_name("fp32"))
    monkeypatch.setattr(tensorrt, "this_target", lambda: replace(ORIN, sm=90))
    with pytest.warns(RefedgeWarning, match="sm 90 here, 87 there"):
        assert load(own_bundle).backend.name == "onnxruntime"
    with pytest.raises(EngineError) as caught:
        load(own_bundle, backend="tensorrt")
    assert caught.value.code == "engine-target"


def test_a_damaged_record_is_no_reason_to_be_slow(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built(own_bundle)
    folder = folder.rename(folder.with_name("fp32"))
    (folder / "engines.json").write_text("{}")
    monkeypatch.setattr(tensorrt, "this_target", lambda: ORIN)
    with pytest.raises(EngineError, match="damaged"):
        load(own_bundle)


def test_there_is_no_such_backend(bundle: Path) -> None:
    with pytest.raises(BackendError, match="tvm") as caught:
        load(bundle, backend="tvm")
    assert "onnxruntime:cuda" in caught.value.why


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_this_build_has_not(bundle: Path, provider: str) -> None:
    import onnxruntime

    if PROVIDERS[provider][0] in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    with pytest.raises(BackendError) as caught:
        load(bundle, backend=f"onnxruntime:{provider}")
    assert caught.value.code == "backend-provider"
    assert "CPUExecutionProvider" in caught.value.why


def test_dialects_by_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refedge.runtime.backends.onnx_runtime._import", lambda provider: None)
    backend = OnnxRuntimeBackend(provider="cuda")
    assert backend.name == "onnxruntime:cuda"
    assert backend.dialects("fp32") == ["ort"]
    assert backend.dialects("int8") == ["trt10", "ort"]
    assert OnnxRuntimeBackend(None, "trt10", "cuda").dialects("fp16") == ["trt10"]


def test_the_text_part_may_be_named(bundle: Path) -> None:
    assert load(bundle, text="onnxruntime", threads=1).dialect.name == "ort"
    with pytest.raises(BackendError):
        load(bundle, text="tvm")


def test_a_gpu_is_not_asked_for_when_it_is_not_needed(bundle: Path) -> None:
    cuda.library.cache_clear()
    load(bundle)
    assert cuda.library.cache_info().misses == 0


def test_too_little_memory_is_no_reason_to_be_slow(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(own_bundle)

    def full(bundle: Path, plan: str, digest: str) -> None:
        raise BackendError("cuda-memory", "full", why="so", fix="end others")

    monkeypatch.setattr(tensorrt, "this_target", lambda: ORIN)
    monkeypatch.setattr(tensorrt.probe, "require", full)
    with pytest.raises(BackendError) as caught:
        load(own_bundle, plan="fp16")
    assert caught.value.code == "cuda-memory"


def test_engines_of_another_plan_are_said_to_be_there(own_bundle: Path) -> None:
    built(own_bundle)
    with pytest.warns(RefedgeWarning, match="engines of fp16, none of fp32"):
        assert load(own_bundle).backend.name == "onnxruntime"
    assert load(own_bundle, backend="onnxruntime").backend.name == "onnxruntime"
