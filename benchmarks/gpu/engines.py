"""Engines of a bundle: built, scored against ONNX Runtime in float32, and timed.

    python -m refedge.benchmarks.gpu.engines BUNDLE OUT.json [--dry] [--plugin=LIBRARY]

Runs where TensorRT is, without torch. Times are end to end, as ``refedge bench`` takes them, and
per part: a whole run of the part beside the launch of its graph alone, whose difference is what
the runtime adds. A plan that fails is recorded with its error, and the next one begins.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from ...data.items import open_items
from ...data.protocols import protocol_named
from ...engines.race import noise
from ...runtime.bundle import open_bundle
from ...runtime.engine import FOLDER, RECORD, decode_engines
from ...runtime.files import write_json
from ...runtime.segmenter import Segmenter, load
from ..accuracy import evaluate
from ..bench import series
from ..contestants import PlanRunner
from ..timing import run_once, task_for, warm_up
from .machine import state

SCHEMA = "refedge-gpu-engines-1"
SCENES, ROUNDS = 100, 200
UNTRAINED = 4  # scenes, where masks mean nothing and only have to agree


def times(segmenter: Segmenter, rounds: int) -> dict[str, Any]:
    """Series of milliseconds end to end, and per part of a run and of its graph alone."""
    runner, task = PlanRunner(segmenter), task_for(segmenter.manifest)
    warm_up(lambda: run_once(runner, task, 0, cached=False)["total"])
    whole = [run_once(runner, task, i, cached=False)["total"] for i in range(rounds)]
    runner.recall(runner.tokenize(task.expressions[0]))
    kept = [run_once(runner, task, 0, cached=True)["total"] for _ in range(rounds)]
    found: dict[str, Any] = {"uncached": whole, "cached": kept}
    for spec in segmenter.manifest.parts:
        part = segmenter._parts[spec.name]
        sizes = {t.name: tuple(1 if isinstance(d, str) else d for d in t.shape)
                 for t in spec.inputs}  # fmt: skip
        inputs = {t.name: noise(sizes[t.name], t.dtype) for t in spec.inputs}
        for _ in range(3):
            part.run(inputs)
        found[f"{spec.name} run"] = [_clock(lambda: part.run(inputs)) for _ in range(rounds)]  # noqa: B023
        alone = getattr(part, "again", None)  # TensorRT's parts have it
        if alone is not None:
            found[f"{spec.name} alone"] = [_clock(alone) for _ in range(rounds)]
    return {name: _short(samples) for name, samples in found.items()}


def _clock(run: Any) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def _short(samples: list[float]) -> dict[str, Any]:
    found = series(samples)
    return {"p50": found.p50, "p90": found.p90, "p99": found.p99,
            "mean": statistics.fmean(samples), "unstable": found.unstable}  # fmt: skip


def measure(
    bundle: Path, plan: str, scenes: int, rounds: int, *, dry: bool, plugin: str = ""
) -> dict[str, Any]:
    """One plan; dry: on ONNX Runtime; plugin: the library of ours to build with."""
    seconds = 0.0
    if not dry:
        started = time.monotonic()
        build = [sys.executable, "-m", "refedge.cli", "build", str(bundle), "--plan", plan]
        # findings about its layers are recorded, and no reason to measure nothing
        more = ["--plugin", plugin] if plugin else []
        subprocess.run([*build, "--no-inspect", *more], check=True)
        seconds = time.monotonic() - started
    reference = load(bundle, plan="fp32", backend="onnxruntime")
    found = load(bundle, plan=plan, backend="onnxruntime" if dry else "tensorrt")
    manifest = found.manifest
    rules = protocol_named(manifest.protocol)
    items = open_items("refshapes:test", manifest.preprocess, rules, limit=scenes)
    scored = evaluate({"fp32": reference, plan: found}, items, rules, "refshapes:test")
    files = found.manifest.files
    graphs = {part: files[f].sha256 for part, f in found.dialect.graphs.items()}
    return {
        "backend": found.backend.name,
        "build_s": seconds,
        **({"graphs": graphs, "findings": {}, "timed": {}} if dry else _built(bundle, plan)),
        "accuracy": scored.record()["plans"],
        "milliseconds": times(found, rounds),
    }


def _built(bundle: Path, plan: str) -> dict[str, Any]:
    """By part: the graph, where the layers differ from the plan, milliseconds by dialect."""
    from ...runtime.backends.tensorrt import this_target

    record = bundle / FOLDER / this_target().name / plan / RECORD
    parts = decode_engines(record.read_bytes()).parts
    return {
        "graphs": {name: spec.graph for name, spec in parts.items()},
        "findings": {name: spec.layers.get("findings", []) for name, spec in parts.items()},
        "timed": {
            name: {t.dialect: t.milliseconds for t in spec.timed} for name, spec in parts.items()
        },
    }


def main(folder: str, out: str, *options: str) -> int:
    """Exit code 1 where no plan could be measured."""
    dry = "--dry" in options
    plugin = next((o.partition("=")[2] for o in options if o.startswith("--plugin=")), "")
    bundle = Path(folder)
    if dry and not bundle.is_dir():
        print("dry: no bundle here; what this step imports is here")
        return 0
    manifest = open_bundle(bundle).manifest
    record: dict[str, Any] = {"schema": SCHEMA, "model": manifest.model, "plans": {}}
    record |= {
        "plugin": Path(plugin).name,
        "bundle": manifest.digest,
        "provenance": manifest.provenance,
        "dry": dry,
    }
    if not dry:
        from ...runtime.backends.tensorrt import this_target

        record |= {"target": this_target().name, "state": {"before": state()}}
    trained = SCENES if manifest.provenance.get("trained") else UNTRAINED
    for plan in ("fp16", "int8"):
        if plan not in manifest.plans:
            continue
        try:
            scenes, rounds = (2, 8) if dry else (trained, ROUNDS)
            record["plans"][plan] = measure(bundle, plan, scenes, rounds, dry=dry, plugin=plugin)
        except Exception as error:  # the next plan may work, and this one's error is a result
            traceback.print_exc()
            record["plans"][plan] = {"error": str(error)}
        if not dry:
            record["state"]["after"] = state()
        write_json(record, Path(out))  # the step may be ended
    print(json.dumps(record)[:2000])
    return int(not any("error" not in plan for plan in record["plans"].values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
