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
from refedge.benchmarks.gpu import bundles, engines, operators, page, peers, providers, run
from refedge.benchmarks.gpu.bars import bars
from refedge.benchmarks.gpu.machine import SHAPES
from refedge.benchmarks.gpu.run import Step
from refedge.models.families import family
from refedge.tests.gpu import sanitized

WRITE = "import sys; open(sys.argv[1], 'w').write('{{}}')"


def test_the_device_comes_before_models_and_every_module_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "PLUGINS", tmp_path)
    found = run.steps()
    assert [s.name for s in found][:2] == ["machine", "operators"]
    assert found[-1].name == "providers-m3att-paper"
    names = [s.name for s in found]
    assert names.index("engines-slvit-tiny") < 5
    assert names.index("peers-cm_masksd-paper") < names.index("sanitizer")
    assert names.index("sanitizer") < names.index("engines-lavt-paper")
    assert all(s.after in names[: names.index(s.name)] for s in found if s.after)
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
    at = names.index("engines-slvit-tiny")
    assert names[at + 1 : at + 3] == ["plugin-slvit-tiny", "peers-slvit-tiny"]
    assert run.steps()[at + 1].command[-1] == f"--plugin={tmp_path / 'made.so'}"
    assert "engines-slvit-paper" not in names, "the plugin's step builds and times both"


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
    asked = [fails, Step("c", (), 60), Step("d", (), 60)]
    assert [s.name for s in run.in_turn(asked, tmp_path)] == ["c", "d", "a"]
    asked[2] = Step("d", (), 60, after="a")
    assert [s.name for s in run.in_turn(asked, tmp_path)] == ["a", "c", "d"], "others wait for it"
    hangs = Step("b", ("-c", "import time; time.sleep(60)"), 1)
    assert "took too long" in do(hangs, tmp_path)
    cut = Step("e", ("-c", "import time; time.sleep(60)"), 60, needs=0)
    assert "took too long" in do(cut, tmp_path, left=1)
    asked = [cut, hangs, Step("c", (), 60)]
    assert [s.name for s in run.in_turn(asked, tmp_path)] == ["e", "c", "b"], "the budget ended it"


def test_a_result_without_what_it_made_is_none(tmp_path: Path) -> None:
    step = Step("a", ("-c", WRITE, "{out}"), 60, makes="{work}/a.refedge")
    (tmp_path / "a.refedge").mkdir()
    assert do(step, tmp_path).startswith("ok")
    assert do(step, tmp_path) == "done before"
    (tmp_path / "a.refedge").rmdir()
    assert do(step, tmp_path).startswith("ok")


def test_what_was_repaired_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(run, "has_gpu", lambda: True)
    monkeypatch.setattr(run, "steps", lambda m: [Step("export-a", ("-c", WRITE, "{out}"), 60)])
    (tmp_path / "a.refedge").mkdir()
    command = ["--work", str(tmp_path)]
    assert run.main(command) == 0
    assert run.main(command) == 0
    assert "done before" in capsys.readouterr().out
    assert run.main([*command, "--again", "export-a"]) == 0
    assert "done before" not in capsys.readouterr().out
    assert not (tmp_path / "a.refedge").exists()
    monkeypatch.setitem(run.MISSING, "nothing_of_that_name", "bring it")
    assert run.main(command) == 1
    assert "not begun: nothing_of_that_name (bring it)" in capsys.readouterr().out


def test_what_a_failed_step_wrote_is_kept_apart(tmp_path: Path) -> None:
    step = Step("a", ("-c", WRITE + "; sys.exit(1)", "{out}"), 60)
    assert "failed (1)" in do(step, tmp_path)
    assert [p.name for p in sorted((tmp_path / "results").glob("*.json"))] == ["a.failed.json"]
    again = "import sys; f = open(sys.argv[1]); assert f.read() == '{{}}'; " + WRITE
    assert do(Step("a", ("-c", again, "{out}"), 60), tmp_path).startswith("ok"), "it goes on there"
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
    assert do(Step("a", ("-c", ""), 300, needs=200), tmp_path, left=190) == "left for another time"
    assert "has to be there" in do(Step("a", ("-c", ""), 300, after="b"), tmp_path)
    assert do(Step("a", ("-c", "print('said')"), 9, after="b"), tmp_path, dry=True).endswith("said")
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
    for name, norm in (
        (operators.INSTANCE, "InstanceNormalization"),
        (operators.LAYER, "LayerNormalization"),
    ):
        model = onnx.load(operators.GRAPHS[name])
        nodes = [n.op_type for n in model.graph.node]
        assert nodes[:2] == ["Cast", "Transpose"], "TensorRT casts uint8 before anything else"
        assert [n for n in nodes if "Norm" in n] == [norm, norm]
        assert {"TopK", "GatherElements", "Gather", "Where"} <= set(nodes)
        assert (model.opset_import[0].version, model.ir_version) == (17, 8)


def test_the_smoke_notices_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "o.json"
    assert operators.main(str(out), "--dry") == 0
    engines = json.loads(out.read_text())["engines"]
    assert [max(e["errors"]) < 1e-5 for e in engines.values()] == [True] * 2
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
PEERS = {
    "modes": {
        peers.EAGER: {
            "end_to_end": {
                "uncached": {"p50": 12.5, "unstable": True},
                "cached": {"p50": 11, "unstable": False},
            }
        },
        "x": {"error": "Boom|bang\nmore"},
    }
}


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


def built(trained: bool) -> dict[str, Any]:
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
    given = {"machine": MACHINE, "engines-m": built(True), "peers-m": PEERS}
    for name, record in {**given, "providers-m": PROVIDERS}.items():
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(record))
    text = page.page(tmp_path)
    assert "3.00 TB/s" in text
    assert "| m | TensorRT fp16 | 0.9991 | 0.7900 | 3.25* | 2.50 | abcdef01 |" in text
    assert "| m | int8 | failed | [engine-refused] no |" in text
    assert "| m | torch eager float32 |  |  | 12.50* | 11.00 |" in text
    assert "| m | torch x | failed | Boom/bang |" in text
    assert "| m | ONNX Runtime cuda fp16, parts |  |  | 4.25 |  | 12345678 |" in text
    assert "| m | ONNX Runtime tensorrt fp16 | absent | no such provider" in text
    assert "Not yet measured: the builder's smoke, fused kernels." in text
    (tmp_path / "gpu-engines-m.json").write_text(json.dumps(built(False)))
    assert "| m | TensorRT fp16 | – | – |" in page.page(tmp_path), "seeded weights: no accuracy"


@pytest.mark.parametrize(
    ("said", "code", "verdict"),
    [
        ("12 checks, 0 failed ========= ERROR SUMMARY: 0 errors", 0, "clean"),
        ("12 checks, 0 failed; RACECHECK SUMMARY: 0 hazards displayed (0 errors)", 0, "clean"),
        ("0 checks, 0 failed ========= ERROR SUMMARY: 0 errors", 0, "failed"),
        ("12 checks, 1 failed ========= ERROR SUMMARY: 0 errors", 0, "failed"),
        ("no GPU: nothing was checked ========= ERROR SUMMARY: 0 errors", 0, "failed"),
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


def test_engines_go_on_where_they_stopped(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measure(bundle: Path, plan: str, *more: Any, **named: Any) -> dict[str, Any]:
        asked.append(plan)
        if len(asked) == 1:
            raise AssertionError
        return {"milliseconds": {}}

    monkeypatch.setattr(engines, "measure", measure)
    out = tmp_path / "o.json"
    assert engines.main(str(quantized), str(out), "--dry") == 1
    assert json.loads(out.read_text())["plans"]["fp16"] == {"error": "AssertionError"}
    assert engines.main(str(quantized), str(out), "--dry") == 0
    assert engines.main(str(quantized), str(out), "--dry") == 0
    assert asked == ["fp16", "int8", "fp16"]


def test_peers_are_timed_as_the_engines_are(quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.json"
    assert peers.main("slvit-tiny", str(quantized), str(out), "--dry") == 0
    found = json.loads(out.read_text())["modes"]
    assert list(found) == [peers.EAGER]
    assert set(found[peers.EAGER]["milliseconds"]) == {"text", "mask", "all"}
    assert found[peers.EAGER]["end_to_end"]["uncached"]["p50"] > 0
    again = out.stat().st_mtime_ns
    assert peers.main("slvit-tiny", str(quantized), str(out), "--dry") == 0
    assert out.stat().st_mtime_ns == again, "nothing was left to do"


def test_a_peer_that_fails_does_not_end_the_others(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def run_mode(loaded: Any, opened: Any, mode: str, **more: Any) -> dict[str, Any]:
        tried.append(mode)
        if mode == peers.COMPILED and tried.count(mode) == 1:
            raise RuntimeError("no compiler")
        return {"milliseconds": {"all": 1.0}}

    monkeypatch.setattr(peers, "run_mode", run_mode)
    out = tmp_path / "o.json"
    assert peers.main("slvit-tiny", str(quantized), str(out)) == 1
    assert peers.main("slvit-tiny", str(quantized), str(out)) == 0
    assert tried == [*peers.MODES, peers.COMPILED]


def test_a_bundle_is_made_where_it_was_left(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "wanted_dialects", lambda: ["ort", "trt8"])
    assert bundles.verbs("slvit-tiny", quantized) == {}
    left = bundles.verbs("slvit:paper", tmp_path / "none")
    assert list(left) == ["export", "fp16", "int8"]
    assert left["export"][-1] == "--no-parity"
    assert left["int8"][-4:] == bundles.FEW
    assert "--samples" not in bundles.verbs("slvit-tiny", tmp_path / "none")["int8"]
    monkeypatch.setattr(bundles, "wanted_dialects", lambda: ["ort", "trt10-plugin"])
    assert list(bundles.verbs("slvit-tiny", quantized)) == ["fp16", "int8"]


def timing(shape: str, many: str, fused: float, size: int = 1 << 20) -> dict[str, Any]:
    us = {"fused": fused, "copy": 8.0, "empty": 6.0, "unfused": 20.0, "sdpa": 13.0,
          "folded, compiled": 12.0}  # fmt: skip
    forms: dict[str, Any] = {form: {"median": t} for form, t in us.items()}
    forms["sdpa, compiled"] = {"error": "no"}
    return {"key": [shape, many], "shape": shape, "batch": 1, "bytes": size, "us": forms}


def test_bars_are_held_against_what_was_measured() -> None:
    checks = [
        {"key": ["odd", "float16"], "errors": {"cubin": [1e-3], "ptx": [3e-3]}, "bar": 1.5e-3,
         "same": True, "good": False},
        {"key": ["odd", "float32"], "errors": {"cubin": [1e-7]}, "bar": 2e-6, "good": True},
        {"key": ["odd", "bfloat16"], "error": "RuntimeError: 700"},
    ]  # fmt: skip
    timings = [
        timing("slvit 1", "one", 9.0),
        timing("slvit 1", "large", 10.0, 64 << 20),
        timing("lts", "one", 9.1),
        {"key": ["m3att", "one"], "error": "RuntimeError: 700"},
    ]
    spent = {
        "uncached": {"p50": 4.0, "unstable": False},
        "mask run": {"p50": 3.31},
        "mask alone": {"p50": 3.0},
    }
    scores = [{"plan": "fp16", "agreement": {"mean": 0.9985}}]
    plan = {"accuracy": scores, "milliseconds": spent,
            "timed": {"mask": {"trt8-plugin": 2.0, "trt8": 3.0}}}  # fmt: skip
    peer = {
        peers.EAGER: {"end_to_end": {"uncached": {"p50": 12.0}}},
        peers.COMPILED: {"end_to_end": {"uncached": {"p50": 4.4}}},
    }
    found = {
        "kernels": {"checks": checks, "timings": timings},
        "sanitizer": {"tools": [{"tool": "memcheck", "verdict": "errors"}]},
        "engines-slvit-paper": {
            "provenance": {"trained": True},
            "plans": {"fp16": plan, "int8": {"error": "no\nmore"}},
        },
        "peers-slvit-paper": {"modes": peer},
    }
    held = {(what, where): (said, ok) for what, where, said, ok in bars(found)}
    assert held[("error ≤ 0.002", "odd")] == ("3.0e-03", False)
    assert ("error ≤ 2e-06", "odd, float32") not in held
    assert held[("kernel runs", "odd, bfloat16")] == ("RuntimeError: 700", False)
    assert held[("kernel runs", "m3att one")] == ("RuntimeError: 700", False)
    assert held[("≤ 1.5 × empty kernels", "slvit 1, batch 1")] == ("1.50", True)
    assert held[("≤ 1.5 × empty kernels", "lts, batch 1")] == ("1.52", False)
    assert held[("≥ 0.8 of a copy's speed", "slvit 1, batch 1")] == ("0.8000", True)
    assert held[("≥ 2 × unfused", "slvit 1, batch 1")] == ("2.00", True)
    assert held[("≥ 1.2 × best of SDPA, compile", "slvit 1, batch 1")] == ("1.20", True)
    assert ("≥ 2 × unfused", "lts, batch 1") not in held
    assert held[("compute-sanitizer is clean", "memcheck")] == ("errors", False)
    where = "slvit-paper, fp16"
    assert held[("≥ 0.999 agreement", where)] == ("0.9985", False)
    assert held[("overhead ≤ 5 % or 0.3 ms", f"{where}, mask")] == ("0.310 ms of 3.000", False)
    said = "trt8-plugin 2.000 ms, trt8 3.000 ms"
    assert held[("faster one offered", f"{where}, mask")] == (said, True)
    assert held[("≥ 3 × torch eager float32, end to end", where)] == ("3.00", True)
    assert held[("≥ 1.2 × torch compiled float16, end to end", where)] == ("1.10", False)
    assert held[("engine runs", "slvit-paper, int8")] == ("no", False)


def test_the_page_shows_bars_and_kernels(tmp_path: Path) -> None:
    rows = [timing("slvit 1", "one", 9.5), {"key": ["lts", "one"], "error": "a|b"}]
    record = {"device": "H100", "architecture": "sm_90", "torch": "2.11"}
    record |= {"checks": [], "timings": rows}  # type: ignore[dict-item]
    (tmp_path / "gpu-kernels.json").write_text(json.dumps(record))
    text = page.page(tmp_path)
    assert "| ≤ 1.5 × empty kernels | slvit 1, batch 1 | 1.58 | **no** |" in text
    assert "| slvit 1 | 1 | 1.0 | 9.5 | 8.0 | 6.0 | 20.0 | 12.0 |" in text
    assert "| lts | one | a/b |" in text
