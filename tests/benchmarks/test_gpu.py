"""``make gpu`` without a GPU: order, budget, resuming, the archive, the page; nothing is timed."""

from __future__ import annotations

import json
import random
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from refedge.benchmarks.gpu import operators, page, providers, run
from refedge.benchmarks.gpu.machine import SHAPES
from refedge.benchmarks.gpu.run import Step
from refedge.models.families import family
from refedge.tests.gpu import sanitized

WRITE = "import sys; open(sys.argv[1], 'w').write('{{}}')"


def test_the_device_comes_before_models_and_every_module_is_there() -> None:
    found = run.steps()
    assert [s.name for s in found][:2] == ["machine", "operators"]
    assert found[-1].name == "providers-m3att-paper"
    assert found.index(next(s for s in found if s.name == "engines-slvit-tiny")) < 5
    for step in found:
        module = run.ROOT / f"{step.command[1].removeprefix('refedge.').replace('.', '/')}.py"
        assert module.is_file(), module
        assert step.seconds <= 600


def test_engines_with_a_plugin_follow_those_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "PLUGINS", tmp_path)
    assert not [s for s in run.steps() if s.name.startswith("plugin-")]
    (tmp_path / "made.so").touch()
    names = [s.name for s in run.steps()]
    at = names.index("engines-slvit-paper")
    assert names[at + 1] == "plugin-slvit-paper"
    assert run.steps()[at + 1].command[-1] == f"--plugin={tmp_path / 'made.so'}"


def do(step: Step, work: Path, *, left: float = 600, dry: bool = False) -> str:
    return run.run_step(step, work, {}, left, dry)


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    step = Step("a", ("-c", WRITE, "{out}"), 60)
    assert do(step, tmp_path).startswith("ok")
    assert do(step, tmp_path) == "done before"
    assert do(step, tmp_path, dry=True).startswith("ok")
    assert (tmp_path / "results/a.json").read_text() == "{}"


def test_a_step_that_fails_or_hangs_is_said_to(tmp_path: Path) -> None:
    fails = Step("a", ("-c", "import sys; sys.exit('no luck')"), 60)
    assert "failed (1)" in do(fails, tmp_path)
    assert "no luck" in do(fails, tmp_path), "a failure is tried again"
    hangs = Step("b", ("-c", "import time; time.sleep(60)"), 1)
    assert "took too long" in do(hangs, tmp_path)


def test_what_a_failed_step_wrote_is_kept_apart(tmp_path: Path) -> None:
    step = Step("a", ("-c", WRITE + "; sys.exit(1)", "{out}"), 60)
    assert "failed (1)" in do(step, tmp_path)
    assert [p.name for p in sorted((tmp_path / "results").glob("*.json"))] == ["a.failed.json"]
    assert do(Step("a", ("-c", WRITE, "{out}"), 60), tmp_path).startswith("ok"), "tried again"
    assert [p.name for p in sorted((tmp_path / "results").glob("*.json"))] == ["a.json"]


def test_nothing_outlives_a_step(tmp_path: Path) -> None:
    child = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid)"
    step = Step("a", ("-c", f"{child}; sys.stdout.flush(); time.sleep(60)"), 2)
    assert "took too long" in do(step, tmp_path)
    pid = int((tmp_path / "results/a.log").read_text())
    state, until = Path(f"/proc/{pid}/stat"), time.monotonic() + 20
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, "it sleeps for a minute"
        time.sleep(0.05)


def test_without_time_or_tensorrt_a_step_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert do(Step("a", ("-c", ""), 300), tmp_path, left=30) == "left for another time"
    monkeypatch.setattr(run, "KIT", tmp_path / "kit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "no TensorRT here" in do(Step("b", ("-c", ""), 60, kit=True), tmp_path)
    kit = tmp_path / "kit/bin/python"
    kit.parent.mkdir(parents=True)
    kit.symlink_to(sys.executable)
    assert run.interpreter(True) == [str(kit)]


def test_without_a_gpu_it_ends_well_and_writes_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run, "has_gpu", lambda: False)
    code = "import sys; sys.exit(sys.argv[2] != '--dry')"
    monkeypatch.setattr(run, "steps", lambda m: [Step("a", ("-c", code, "{out}", "{dry}"), 60)])
    assert run.main(["--work", str(tmp_path)]) == 0
    assert "no GPU here" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_the_archive_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(run, "LIMIT", 4096)
    results = tmp_path / "work/results"
    results.mkdir(parents=True)
    (results / "small.json").write_text("{}")
    (results / "large.json").write_bytes(random.Random(0).randbytes(8192))
    made = run.archive(tmp_path / "work", {"a": "ok"})
    assert made.parent == tmp_path
    assert made.stat().st_size <= 4096
    with tarfile.open(made) as tar:
        assert sorted(tar.getnames()) == ["small.json", "summary.json"]


def test_attention_is_timed_at_the_models_own_shapes() -> None:
    kind = family("slvit")
    with torch.device("meta"):
        shapes = kind.build(kind.configs["paper"]).cross_attention()
    native = {(a.heads, a.pixels, a.words, a.width) for a in shapes}
    assert {shape for name, shape in SHAPES.items() if name.startswith("slvit")} == native


def test_the_smoke_has_the_forms_it_is_for() -> None:
    model = onnx.load(operators.GRAPH)
    nodes = [n.op_type for n in model.graph.node]
    assert nodes[:2] == ["Cast", "Transpose"], "TensorRT casts uint8 before anything else"
    assert nodes.count("InstanceNormalization") == 2
    assert {"TopK", "GatherElements", "Gather", "Where"} <= set(nodes)
    assert (model.opset_import[0].version, model.ir_version) == (17, 8)


def test_the_smoke_notices_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "o.json"
    assert operators.main(str(out), "--dry") == 0
    assert json.loads(out.read_text())["engines"]["onnxruntime"]["errors"][0] < 1e-5
    with np.load(operators.DATA) as file:
        data = dict(file)
    assert operators.compare({"text": data["expect_text"] * np.nan}, data) == float("inf")
    scores = np.sort(data["expect_features"].sum(axis=1).ravel())[-5:]
    assert np.diff(scores).min() > 0.1, "float16 must not choose other regions"
    monkeypatch.setitem(operators.BARS, "float32", -1.0)
    assert operators.main(str(tmp_path / "p.json"), "--dry") == 1
    assert not (tmp_path / "p.json").exists()


def test_the_page_is_made_from_the_results() -> None:
    assert page.PAGE.read_text() == page.page(run.ROOT / "benchmarks/results")


MACHINE = {
    "torch": "2.11",
    "state": {"before": {"name": "H100", "driver_version": "580"}},
    "copy_bytes_per_s": 3.0e12,
    "ops_per_s": {"float16": 7.9e14},
    "attention_ms": {"lts": {"eager": 0.01, "compiled": 0.02, "error": 1e-4}},
}
PEERS = {"modes": {"eager float32": {"milliseconds": {"all": 12.5}}, "x": {"error": "Boom"}}}


PROVIDERS = {
    "modes": {
        "cuda fp16": {"milliseconds": {"all": 4.25}, "graphs": {"mask": "1234567890"}},
        "tensorrt fp16": {"absent": "no such provider: it has CPUExecutionProvider"},
    }
}


def test_providers_that_are_not_here_are_absent(quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.json"
    assert providers.main(str(quantized), str(out), "--dry") == 0
    modes = json.loads(out.read_text())["modes"]
    here = modes.pop("cpu fp32")
    assert set(here["milliseconds"]) == {"text", "mask", "all"}
    assert min(here["milliseconds"].values()) > 0
    assert [set(mode) for mode in modes.values()] == [{"absent"}] * len(providers.MODES)
    assert providers.main(str(tmp_path / "none"), str(tmp_path / "p.json"), "--dry") == 0
    assert not (tmp_path / "p.json").exists()


def test_a_provider_that_fails_is_no_absent_one(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "MODES", (("cpu", "fp32"), ("cpu", "none")))
    out = tmp_path / "o.json"
    assert providers.main(str(quantized), str(out)) == 1
    modes = json.loads(out.read_text())["modes"]
    assert "milliseconds" in modes["cpu fp32"]
    assert "no plan 'none'" in modes["cpu none"]["error"]


def engines(trained: bool) -> dict[str, Any]:
    scores: list[dict[str, Any]] = [
        {"plan": "fp32", "overall": {"miou": 0.8}, "agreement": None},
        {"plan": "fp16", "overall": {"miou": 0.79}, "agreement": {"mean": 0.9991}},
    ]
    spent = {"uncached": {"p50": 3.25, "unstable": True}, "cached": {"p50": 2.5, "unstable": False}}
    graphs = {"mask": "abcdef0123456789"}
    fp16 = {"accuracy": scores, "graphs": graphs, "milliseconds": spent}
    int8 = {"error": "[engine-refused] no\n  why: because"}
    return {"provenance": {"trained": trained}, "plans": {"fp16": fp16, "int8": int8}}


def test_a_page_with_results(tmp_path: Path) -> None:
    assert "not yet measured" in page.page(tmp_path)
    given = {"machine": MACHINE, "engines-m": engines(True), "peers-m": PEERS}
    for name, record in {**given, "providers-m": PROVIDERS}.items():
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(record))
    text = page.page(tmp_path)
    assert "3.00 TB/s" in text
    assert "| m | TensorRT fp16 | 0.9991 | 0.7900 | 3.25* | 2.50 | abcdef01 |" in text
    assert "| m | int8 | failed | [engine-refused] no |" in text
    assert "| m | torch eager float32 |  |  | 12.50 |" in text
    assert "| m | ONNX Runtime cuda fp16 |  |  | 4.25 |  | 12345678 |" in text
    assert "| m | ONNX Runtime tensorrt fp16 | absent | no such provider" in text
    assert "Not yet measured: the builder's smoke, fused kernels." in text
    (tmp_path / "gpu-engines-m.json").write_text(json.dumps(engines(False)))
    assert "| m | TensorRT fp16 | – | – |" in page.page(tmp_path), "seeded weights: no accuracy"


@pytest.mark.parametrize(
    ("said", "code", "verdict"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "clean"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "clean"),
        ("========= RACECHECK SUMMARY: 10 hazards displayed (0 errors, 10 warnings)", 0, "failed"),
        ("========= ERROR SUMMARY: 2 errors", sanitized.FOUND, "errors"),
        ("========= Error: Device not supported", 0, "failed"),
        ("a check of our own failed", 1, "failed"),
    ],
)
def test_a_sanitizer_that_did_not_look_is_no_success(
    said: str, code: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = sanitized.sanitize("memcheck", [sys.executable])
    assert (found["verdict"], found["exit"]) == (verdict, code)
    assert said in str(found["said"])


def test_without_a_sanitizer_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitized, "ELSEWHERE", str(tmp_path / "none"))
    found = sanitized.sanitize("memcheck", [sys.executable])
    assert found["verdict"] == "failed"
    assert "No such file" in str(found["said"])
