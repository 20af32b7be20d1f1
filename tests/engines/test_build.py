"""What a build keeps, refuses and writes; its processes are real, TensorRT is not here."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from refedge.calibration.quantize import quantize
from refedge.engines import build as module
from refedge.engines.build import build
from refedge.engines.inspect import inspect_bundle, lines
from refedge.engines.part import Options, PartResult, PartTask
from refedge.engines.race import RaceTask
from refedge.engines.source import profile_of, shapes_of, source_of
from refedge.engines.trtexec import trtexec_lines
from refedge.errors import BundleError, EngineError, InputError, RefedgeWarning
from refedge.runtime.backends.engine_files import Engines
from refedge.runtime.bundle import open_bundle
from refedge.runtime.engine import Target, decode_engines
from refedge.runtime.manifest import Manifest, PartSpec, TensorSpec
from refedge.runtime.plan import decode_plan

from .test_layers import WRITTEN_11

HERE = Target("10.3.0.30", 87, "Orin", "12.6", "linux", "aarch64")
EMPTY = '{"Layers": []}'


class Builder:
    """In place of the process: writes what it was asked for, keeps what that was."""

    def __init__(self) -> None:
        self.tasks: list[PartTask] = []
        self.inspector = EMPTY
        self.fails_at = self.refuses = ""
        self.code = "engine-build"

    def __call__(self, task: PartTask, say: Any) -> PartResult:
        if task.part == self.fails_at:
            raise EngineError("engine-memory", "too little", why="so", fix="more")
        if self.refuses and self.refuses in task.graph:
            raise EngineError(self.code, "no", why="no kernel", fix="other")
        self.tasks.append(task)
        fused = "with a plugin " if Path(task.graph).name.split(".")[1].count("-") else ""
        Path(task.engine).write_bytes(f"engine {fused}of {task.part}".encode())
        return PartResult(1000, self.inspector)

    def parts(self) -> list[str]:
        found = [task.part for task in self.tasks]
        self.tasks.clear()
        return found


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    made = Builder()
    monkeypatch.setattr(module, "open_tensorrt", lambda: SimpleNamespace(__version__="10.3.0.30"))
    monkeypatch.setattr(module, "target_for", lambda version: HERE)
    monkeypatch.setattr(module, "in_a_process", made)
    return made


@pytest.fixture
def board(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / "board.refedge"))


def run(bundle: Path, plan: str = "int8", **said: Any) -> Any:
    return build(bundle, plan, say=lambda line: None, **said)


def test_engines_are_recorded_beside_the_bundle(board: Path, builder: Builder) -> None:
    record = run(board)
    folder = board / "engines" / HERE.name / "int8"
    assert decode_engines((folder / "engines.json").read_bytes()).parts == record.parts
    assert (record.dialect, record.target, record.plan) == ("trt10", HERE, "int8")
    assert record.bundle == open_bundle(board).manifest.digest
    for name, spec in record.parts.items():
        data = (folder / spec.file).read_bytes()
        assert data == f"engine of {name}".encode()
        assert (spec.sha256, spec.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    open_bundle(board)  # engines change nothing that the manifest lists


def test_the_task_says_what_the_plan_says(board: Path, builder: Builder) -> None:
    run(board)
    (mask,) = [t for t in builder.tasks if t.part == "mask"]
    manifest = open_bundle(board).manifest
    plan = decode_plan((board / manifest.plans["int8"]).read_bytes())
    assert (mask.rest, mask.int8) == (plan.rest, True)
    assert mask.graph.endswith("mask.trt10.int8.onnx")
    assert mask.cache.endswith(f"{HERE.name}/timing.cache")
    assert mask.shapes["pixels"] == ((1, 96, 96, 3), (1, 96, 96, 3), (16, 96, 96, 3))
    assert set(mask.shapes) == {t.name for t in manifest.part("mask").inputs}


def test_what_is_done_is_kept(board: Path, builder: Builder) -> None:
    builder.fails_at = "mask"
    with pytest.raises(EngineError):
        run(board)
    assert builder.parts() == ["text"]
    builder.fails_at = ""
    run(board)
    assert builder.parts() == ["mask"]
    run(board)
    assert builder.parts() == []


def test_what_changed_is_built_again(board: Path, builder: Builder) -> None:
    run(board)
    builder.parts()
    run(board, options=Options(level=1))
    assert builder.parts() == ["text", "mask"]
    damaged = board / "engines" / HERE.name / "int8" / "text.engine"
    damaged.write_bytes(b"cut")
    run(board, options=Options(level=1))
    assert builder.parts() == ["text"]
    (damaged.parent / "engines.json").write_text("{}")
    run(board, options=Options(level=1))
    assert builder.parts() == ["text", "mask"]
    seen = board.parent / "seen.json"
    seen.write_text('{"mask": {"1": 3, "4": 9}}')
    run(board, options=Options(level=1), batches=seen)
    assert builder.parts() == ["mask"]


def test_engines_without_weights_are_filled_by_the_next_build(
    board: Path, builder: Builder
) -> None:
    record = run(board, options=Options(level=1, strip=True))
    assert all(spec.stripped for spec in record.parts.values())
    folder = board / "engines" / HERE.name / "int8"
    assert "without weights" in "\n".join(lines(inspect_bundle(board)))
    assert [task.stripped for task in builder.tasks] == ["", ""]
    builder.parts()
    run(board, options=Options(level=1, strip=True))
    assert builder.parts() == []
    builder.fails_at = "mask"
    with pytest.raises(EngineError):
        run(board, options=Options(level=1))
    half_done = decode_engines((folder / "engines.json").read_bytes())
    assert {n: s.stripped for n, s in half_done.parts.items()} == {"text": False, "mask": True}
    builder.fails_at = ""
    said: list[str] = []
    record = build(board, "int8", options=Options(level=1), say=said.append)
    assert said[:2] == [
        "text: kept, its engine is up to date",
        "mask: its engine is here without weights; they are put in",
    ]
    assert [task.stripped for task in builder.tasks] == [
        str(folder / "text.engine"),
        str(folder / "mask.engine"),
    ]
    assert not any(task.options.strip for task in builder.tasks)
    assert not any(spec.stripped for spec in record.parts.values())
    assert record.flags["strip"] is False
    builder.parts()
    run(board, options=Options(level=2))  # other options: nothing to fill
    assert [task.stripped for task in builder.tasks] == ["", ""]
    builder.parts()
    run(board, options=Options(level=2, strip=True))  # whole engines are not stripped ones
    assert builder.parts() == ["text", "mask"]
    (folder / "mask.engine").write_bytes(b"cut")
    run(board, options=Options(level=2))
    assert [Path(task.stripped).name for task in builder.tasks] == ["text.engine", ""]


def test_one_build_at_a_time(board: Path, builder: Builder) -> None:
    root = board / "engines" / HERE.name
    root.mkdir(parents=True)
    with (root / "build.lock").open("w") as other:
        other.write("4711")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(EngineError) as caught:
            run(board)
        assert caught.value.code == "engine-locked"
        assert "4711" in caught.value.why
    run(board)  # the lock of a process that is gone is no lock
    assert builder.parts() == ["text", "mask"]


def test_a_builder_that_outlives_its_parent_keeps_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 30 >/dev/null 2>&1 &\necho $!\n")  # what is left behind
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    said: list[str] = []
    with module._only_one(tmp_path / "build.lock"), pytest.raises(EngineError, match="died"):
        module.in_a_process(a_task(tmp_path), said.append)
    with pytest.raises(EngineError) as caught, module._only_one(tmp_path / "build.lock"):
        pass
    assert caught.value.code == "engine-locked"
    os.kill(int(said[0]), signal.SIGKILL)

    def free() -> bool:
        with contextlib.suppress(EngineError), module._only_one(tmp_path / "build.lock"):
            return True
        return False

    until = time.monotonic() + 10
    while not free() and time.monotonic() < until:
        time.sleep(0.05)
    assert free(), "the lock of a process that is gone"


def test_an_engine_that_is_not_the_plans_is_not_recorded(board: Path, builder: Builder) -> None:
    plan = decode_plan((board / open_bundle(board).manifest.plans["int8"]).read_bytes())
    node = plan.parts["mask"].int8[0]
    builder.inspector = WRITTEN_11.replace("[ONNX Layer: stem/Conv:c]", f"[ONNX Layer: {node}]")
    with pytest.raises(EngineError) as caught:
        run(board)
    assert caught.value.code == "engine-precision"
    engine = board / "engines" / HERE.name / "int8" / "mask.engine"
    assert not engine.exists()
    record = run(board, inspect=False)
    assert engine.exists()
    assert record.parts["mask"].layers["findings"]


def test_layers_that_cannot_be_read_are_no_reason_without_inspection(
    board: Path, builder: Builder
) -> None:
    builder.inspector = "{"
    with pytest.raises(EngineError) as caught:
        run(board)
    assert caught.value.code == "engine-inspector"
    record = run(board, inspect=False)
    assert set(record.parts) == {"text", "mask"}
    assert not record.parts["mask"].layers["findings"]


def test_plugins_travel_with_the_engines(board: Path, builder: Builder, tmp_path: Path) -> None:
    library = tmp_path / "librefedge.so"
    library.write_bytes(b"code")
    with pytest.warns(RefedgeWarning, match="trt10-plugin"):
        record = run(board, plugins=[library])
    assert record.plugins == {"librefedge.so": hashlib.sha256(b"code").hexdigest()}
    (copy,) = builder.tasks[0].plugins
    assert Path(copy).read_bytes() == b"code"
    with pytest.warns(RefedgeWarning), pytest.raises(InputError) as caught:
        run(board, plugins=[tmp_path / "none.so"])
    assert caught.value.code == "plugin-missing"


def test_another_machine_is_refused(board: Path, builder: Builder) -> None:
    with pytest.raises(EngineError) as caught:
        run(board, target="sm90")
    assert caught.value.code == "engine-target"
    assert run(board, target="sm87").target == HERE


def test_a_plan_without_graphs_for_tensorrt(bundle: Path) -> None:
    opened = open_bundle(bundle)
    with pytest.raises(BundleError) as caught:
        source_of(opened, "int8", "trt10")
    assert caught.value.code == "plan-missing"
    assert "refedge quantize slvit-tiny" in caught.value.fix
    assert "--plan int8 --data refshapes:calibration" in caught.value.fix
    assert "--dialect trt10" in caught.value.fix
    assert source_of(opened, "fp32", "trt10").dialect == opened.manifest.canonical
    with pytest.raises(BundleError) as caught:
        source_of(opened, "fp32", "trt8")
    assert "--plan fp16" in caught.value.fix


@pytest.mark.parametrize(("dialect", "name"), [("trt10", "canonical"), ("trt8", "trt8")])
def test_fp32_is_found_again_by_what_the_record_says(
    dialect: str, name: str, quantized: Path
) -> None:
    opened = open_bundle(quantized)
    source = source_of(opened, "fp32", dialect)
    assert source.dialect.name == name
    assert opened.dialect([name], "fp32") == source.dialect


def test_8_6_keeps_high_what_the_sidecar_says(quantized: Path) -> None:
    opened = open_bundle(quantized)
    half = source_of(opened, "fp16", "trt8")
    sidecar = quantized / f"{half.dialect.graphs['mask']}.layers.json"
    assert half.pinned("mask") == tuple(json.loads(sidecar.read_text())["float32"]) != ()
    assert source_of(opened, "fp32", "trt8").pinned("mask") == ()
    assert not half.wanted("mask").typed


def test_two_dynamic_sizes() -> None:
    image = PartSpec(
        "image",
        (TensorSpec("pixels", "uint8", ("images", 96, 96, 3)),),
        (TensorSpec("map", "float32", ("images", 8)),),
        (1, 1, 8),
    )
    mask = PartSpec(
        "mask",
        (
            TensorSpec("map", "float32", ("images", 8)),
            TensorSpec("image_index", "int32", ("batch",)),
            TensorSpec("grid", "float32", (3, 3)),
        ),
        (),
        (1, 2, 16),
    )
    manifest: Manifest = SimpleNamespace(parts=(image, mask))  # type: ignore[assignment]
    assert shapes_of(manifest, image, image.profile) == {
        "pixels": ((1, 96, 96, 3), (1, 96, 96, 3), (8, 96, 96, 3))
    }
    assert shapes_of(manifest, mask, mask.profile) == {
        "map": ((1, 8), (1, 8), (8, 8)),
        "image_index": ((1,), (2,), (16,)),
    }


def test_batches_that_were_seen(tmp_path: Path) -> None:
    part = PartSpec("mask", (), (), (1, 1, 16))
    file = tmp_path / "seen.json"
    file.write_text('{"mask": {"1": 10, "5": 70, "8": 3}, "text": {"1": 1}}')
    assert profile_of(part, file) == (1, 5, 8)
    assert profile_of(part, None) == (1, 1, 16)
    for wrong in ('{"mask": {"17": 1}}', '{"mask": {"0": 1}}', '{"mask": 3}', "no", None):
        file.unlink() if wrong is None else file.write_text(wrong)
        with pytest.raises(InputError) as caught:
            profile_of(part, file)
        assert caught.value.code == "engine-batches"


def a_task(folder: Path) -> PartTask:
    return PartTask("mask", "g", "e", str(folder / "c"), "fp16", False, (), {})


def test_errors_cross_the_builders_process(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        module.in_a_process(a_task(tmp_path), print)
    assert caught.value.code == "backend-missing"


@pytest.mark.parametrize(
    ("script", "code", "why"),
    [
        ("echo working; kill -9 $$", "engine-memory", "working"),
        ("echo working; kill -11 $$", "engine-build", "SIGSEGV; working"),
        ("exit 3", "engine-build", "exit code 3"),
        ("exit 0", "engine-build", "exit code 0"),
    ],
)
def test_a_builder_that_dies(
    script: str, code: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    said: list[str] = []
    with pytest.raises(EngineError) as caught:
        module.in_a_process(a_task(tmp_path), said.append)
    assert caught.value.code == code
    assert why in caught.value.why
    assert said == (["working"] if "echo" in script else [])


def test_tasks_and_results_survive_the_way(tmp_path: Path) -> None:
    task = a_task(tmp_path)
    assert msgspec.json.decode(msgspec.json.encode(task), type=PartTask) == task
    result = PartResult(3, "{}", ("a", "b", "c", "d"))
    assert msgspec.json.decode(msgspec.json.encode(result), type=PartResult) == result


def test_inspect_tells_engines(board: Path, builder: Builder) -> None:
    run(board)
    found = inspect_bundle(board)
    (engines,) = found["engines"]
    assert engines["target"] == HERE.name
    assert set(engines["parts"]) == {"text", "mask"}
    text = "\n".join(lines(found))
    assert f"engines {HERE.name}, plan int8" in text
    record = board / "engines" / HERE.name / "int8" / "engines.json"
    record.write_bytes(record.read_bytes().replace(b'"memory": 1000', b'"memory": 1001', 1))
    assert "damaged" in "\n".join(lines(inspect_bundle(board)))


# trtexec's options, sampleOptions.cpp of the releases
_COMMON = """
    onnx minShapes optShapes maxShapes dynamicPlugins timingCacheFile saveEngine noTF32
    profilingVerbosity exportLayerInfo skipInference memPoolSize refit versionCompatible
    builderOptimizationLevel hardwareCompatibilityLevel
"""
_ONLY_8 = "fp16 int8 precisionConstraints layerPrecisions tacticSources"
COMMON = set(_COMMON.split())
KNOWN = {
    "8.6": COMMON | set(_ONLY_8.split()),
    "10.3": COMMON | {"stronglyTyped", "stripWeights"},
    "10.13": COMMON | {"stronglyTyped", "stripWeights"},
    "11.1": COMMON | {"stripWeights"},
}


@pytest.mark.parametrize("plan", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("version", list(KNOWN))
def test_trtexec_lines(version: str, plan: str, quantized: Path) -> None:
    options = Options(512, 1, "ampere+", True, True, version != "8.6")
    with pytest.warns(RefedgeWarning, match="no graphs of"):
        made = trtexec_lines(quantized, plan, version, options=options, plugins=[Path("p.so")])
    assert len(made) == 2
    for line in made:
        words = [w.lstrip("'").removeprefix("--").split("=")[0] for w in line.split()[1:]]
        assert set(words) <= KNOWN[version]
        assert ("noTF32" in words) == (plan == "fp32")
        assert ("stronglyTyped" in words) == version.startswith("10.")
        assert ("int8" in words) == (version == "8.6" and plan == "int8")
        assert ("layerPrecisions" in words) == ("precisionConstraints" in words)
    assert "--maxShapes=ids:16x20,words:16x20" in made[0]


@pytest.mark.parametrize(
    ("version", "options"),
    [
        ("8.6", Options(strip=True)),
        ("8.6", Options(hardware="same-cc")),
        ("10.3", Options(hardware="same-cc")),
    ],
)
def test_trtexec_has_no_options_from_later_versions(
    version: str, options: Options, quantized: Path
) -> None:
    with pytest.raises(EngineError) as caught:
        trtexec_lines(quantized, "fp16", version, options=options)
    assert caught.value.code == "engine-option"
    assert trtexec_lines(quantized, "fp16", "10.13", options=options)


def test_a_part_that_is_not_there_is_no_batch(
    board: Path, builder: Builder, tmp_path: Path
) -> None:
    (tmp_path / "seen.json").write_text('{"msk": {"4": 5}}')
    with pytest.raises(InputError) as caught:
        run(board, batches=tmp_path / "seen.json")
    assert (caught.value.code, builder.tasks) == ("engine-batches", [])
    assert "msk" in caught.value.what


def test_a_plugin_takes_the_graphs_with_fused_nodes(quantized: Path) -> None:
    opened = open_bundle(quantized)
    plain = opened.dialect(["trt10"], "int8")
    with pytest.warns(RefedgeWarning, match="--dialect trt10-plugin"):
        assert source_of(opened, "int8", "trt10", fused="plugin").dialect == plain
    fused = replace(plain, name="trt10-plugin")
    manifest = replace(opened.manifest, dialects=(*opened.manifest.dialects, fused))
    opened = replace(opened, manifest=manifest)
    assert source_of(opened, "int8", "trt10", fused="plugin").dialect == fused
    with pytest.warns(RefedgeWarning, match="--dialect trt10-quick"):
        assert source_of(opened, "int8", "trt10", fused="quick").dialect == plain
    assert source_of(opened, "int8", "trt10").dialect == plain


class Race:
    """In place of the process that times: what it says, and what it was asked."""

    def __init__(self) -> None:
        self.spent = (1.0, 2.0)
        self.tasks: list[RaceTask] = []

    def __call__(self, task: RaceTask, say: Any) -> tuple[float, ...]:
        self.tasks.append(task)
        for file, spec in task.engines:
            assert hashlib.sha256(Path(file).read_bytes()).hexdigest() == spec.sha256
        return self.spent


@pytest.fixture
def racer(monkeypatch: pytest.MonkeyPatch) -> Race:
    made = Race()
    monkeypatch.setattr(module, "find_spec", lambda name: True)  # pycuda
    monkeypatch.setattr(module, "against_each_other", made)
    return made


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "librefedge.so").write_bytes(b"code")
    return tmp_path / "librefedge.so"


@pytest.fixture(params=["trt10-plugin", "trt10-quick"])
def way(request: pytest.FixtureRequest, library: Path) -> tuple[str, dict[str, Any]]:
    """A dialect with plugins and what a build with them is asked."""
    if request.param == "trt10-quick":
        return request.param, {"options": Options(level=1, quick=True)}
    return request.param, {"options": Options(level=1), "plugins": [library]}


def test_the_plugin_is_kept_only_where_it_is_faster(
    way: tuple[str, dict[str, Any]], own_bundle: Path, builder: Builder, racer: Race
) -> None:
    name, asked = way
    quantize(own_bundle, "fp16", dialects=["ort", "trt10", name])
    opened = open_bundle(own_bundle)
    dialects = [opened.dialect([d], "fp16") for d in (name, "trt10")]
    fused, plain = (opened.manifest.files[d.graphs["mask"]].sha256 for d in dialects)
    folder = own_bundle / "engines" / HERE.name / "fp16"
    for spent, graph, says in (
        ((1.0, 2.0), fused, b"engine with a plugin of mask"),
        ((2.0, 1.0), plain, b"engine of mask"),
        ((1.0, 1.0), fused, b"engine with a plugin of mask"),
    ):
        racer.spent = spent
        shutil.rmtree(folder, ignore_errors=True)
        record = run(own_bundle, "fp16", **asked)
        # words do not meet pixels in the text part: its graph has no node for a plugin
        assert builder.parts() == ["text", "mask", "mask"]
        mask = record.parts["mask"]
        assert (record.dialect, mask.graph) == (name, graph)
        assert [(t.dialect, t.graph) for t in mask.timed] == [(name, fused), ("trt10", plain)]
        assert tuple(t.milliseconds for t in mask.timed) == spent
        assert record.parts["text"].timed == ()
        assert sorted(p.name for p in folder.glob("*.engine*")) == ["mask.engine", "text.engine"]
        engines = Engines(folder, decode_engines((folder / "engines.json").read_bytes()))
        assert engines.read("mask", engines.graph(opened, "mask")) == says
        assert (
            engines.read("text", engines.graph(opened, "text")) == b"engine with a plugin of text"
        )
        text = "\n".join(lines(inspect_bundle(own_bundle)))
        kept = name if graph == fused else "trt10"
        assert f"ms as {kept} (this one)" in text
        run(own_bundle, "fp16", **asked)
        assert builder.parts() == []
    (task, *_) = racer.tasks
    assert task.shapes["pixels"][1] == (1, 96, 96, 3)
    assert set(task.made) >= {t.name for t in task.part.inputs if t.name not in ("pixels", "words")}
    assert len(task.plugins) == len(asked.get("plugins", ()))


@pytest.mark.parametrize("refused", ["mask.trt10-plugin.", "mask.trt10."])
def test_what_alone_can_be_built_is_kept(
    refused: str, own_bundle: Path, builder: Builder, racer: Race, library: Path
) -> None:
    quantize(own_bundle, "fp16", dialects=["ort", "trt10", "trt10-plugin"])
    builder.refuses = refused
    said: list[str] = []
    record = build(own_bundle, "fp16", plugins=[library], say=said.append)
    (timed,) = record.parts["mask"].timed
    assert timed.milliseconds is None
    assert (timed.dialect == "trt10") == (refused == "mask.trt10-plugin.")
    assert any("no: no kernel" in line for line in said)
    folder = own_bundle / "engines" / HERE.name / "fp16"
    engines = Engines(folder, decode_engines((folder / "engines.json").read_bytes()))
    opened = open_bundle(own_bundle)
    assert engines.read("mask", engines.graph(opened, "mask"))
    assert "not timed (this one)" in "\n".join(lines(inspect_bundle(own_bundle)))
    assert racer.tasks == []
    builder.parts()
    builder.refuses = ""
    run(own_bundle, "fp16", plugins=[library])
    assert builder.parts() == ["mask", "mask"], "the next build tries both again"
    builder.refuses, builder.code = "mask.", "engine-memory"
    with pytest.raises(EngineError) as caught:
        run(own_bundle, "fp16", plugins=[library], options=Options(level=1))
    assert caught.value.code == "engine-memory"
    builder.code = "engine-build"
    with pytest.raises(EngineError) as caught:
        run(own_bundle, "fp16", plugins=[library], options=Options(level=1))
    assert caught.value.code == "engine-build"


def test_what_cannot_be_timed_is_kept_without_the_plugin(
    own_bundle: Path, builder: Builder, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(task: RaceTask, say: Any) -> tuple[float, ...]:
        raise EngineError("cuda-memory", "too little", why="for both", fix="more")

    quantize(own_bundle, "fp16", dialects=["ort", "trt10", "trt10-plugin"])
    monkeypatch.setattr(module, "against_each_other", crash)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(EngineError) as caught:
        run(own_bundle, "fp16", plugins=[library])
    assert (caught.value.code, builder.parts()) == ("backend-missing", [])
    assert "--no-race" in caught.value.fix
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    folder = own_bundle / "engines" / HERE.name / "fp16"
    folder.mkdir(parents=True)
    (folder / "mask.engine.new1").write_bytes(b"left")
    said: list[str] = []
    record = build(own_bundle, "fp16", plugins=[library], say=said.append)
    assert [(t.dialect, t.milliseconds) for t in record.parts["mask"].timed] == [("trt10", None)]
    assert (folder / "mask.engine").read_bytes() == b"engine of mask"
    assert any("not timed, too little: for both; kept as trt10" in line for line in said)
    assert not list(folder.glob("*.new*"))


def test_without_a_race_the_plugin_is_kept(
    own_bundle: Path, builder: Builder, racer: Race, library: Path
) -> None:
    quantize(own_bundle, "fp16", dialects=["ort", "trt10", "trt10-plugin"])
    racer.spent = (2.0, 1.0)
    asked: dict[str, Any] = {"plugins": [library]}
    run(own_bundle, "fp16", **asked)
    builder.parts()
    record = run(own_bundle, "fp16", race=False, **asked)
    assert builder.parts() == ["mask"]  # the plain one is there
    assert record.parts["mask"].timed == ()
    run(own_bundle, "fp16", **asked)
    assert builder.parts() == ["mask", "mask"]
    assert len(racer.tasks) == 2
    with pytest.raises(EngineError) as caught:
        run(own_bundle, "fp16", options=Options(strip=True), **asked)
    assert caught.value.code == "engine-option"
    run(own_bundle, "fp16", race=False, options=Options(strip=True), **asked)
    run(own_bundle, "fp16", race=False, **asked)
    assert [bool(t.stripped) for t in builder.tasks] == [False, False, True, True]


def test_a_race_needs_both_graphs(own_bundle: Path, builder: Builder, library: Path) -> None:
    quantize(own_bundle, "fp16", dialects=["ort", "trt10-plugin"])
    with pytest.raises(BundleError) as caught:
        run(own_bundle, "fp16", plugins=[library])
    assert caught.value.fix.endswith("--plan fp16 --dialect ort --dialect trt10")
    assert builder.tasks == []
    run(own_bundle, "fp16", plugins=[library], race=False)
    assert builder.parts() == ["text", "mask"]


def test_ahead_of_time_plugins_are_asked_for(board: Path, builder: Builder) -> None:
    with pytest.warns(RefedgeWarning, match="trt10-quick"):
        record = run(board, options=Options(quick=True))
    assert record.flags["quick"] is True
    assert record.plugins == {}
    assert [(t.options.quick, t.sm) for t in builder.tasks] == [(True, 87)] * len(record.parts)
    with pytest.raises(EngineError) as caught:
        trtexec_lines(board, "int8", "10.13", options=Options(quick=True))
    assert caught.value.code == "plugin-quick"
