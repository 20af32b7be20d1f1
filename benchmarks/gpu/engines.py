"""Engines of a bundle: built, scored against ONNX Runtime in float32, and timed.

    python -m refedge.benchmarks.gpu.engines BUNDLE OUT.json [--dry] [--plugin=LIBRARY]

Runs where TensorRT is, without torch. Times are end to end, as ``refedge bench`` takes them, and
per part: a whole run of the part, on what the parts before left on the device, beside the launch
of its graph alone; the difference is what the runtime adds. A plan that fails is recorded with its
error, and the next one begins; the next run of the step keeps those that are done.
"""

from __future__ import annotations

import json
import os
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
from ..contestants import PlanRunner
from .machine import state
from .rounds import clocked, end_to_end

SCHEMA = "refedge-gpu-engines-2"
PLANS = ("fp16", "int8")
SCENES, ROUNDS = 100, 200
UNTRAINED = 4  # scenes, where masks mean nothing and only have to agree


def times(segmenter: Segmenter, rounds: int) -> dict[str, Any]:
    """Series of milliseconds end to end, and per part of a run and of its graph alone."""
    found = end_to_end(PlanRunner(segmenter), rounds)
    known: dict[str, Any] = {}
    for spec in segmenter.manifest.parts:
        part = segmenter._parts[spec.name]
        sizes = {t.name: tuple(1 if isinstance(d, str) else d for d in t.shape)
                 for t in spec.inputs}  # fmt: skip
        inputs = {t.name: known.get(t.name, noise(sizes[t.name], t.dtype)) for t in spec.inputs}
        known |= part.run(inputs)
        found[f"{spec.name} run"] = clocked(lambda: part.run(inputs), rounds)  # noqa: B023
        alone = getattr(part, "again", None)  # TensorRT's parts have it
        if alone is not None:
            found[f"{spec.name} alone"] = clocked(alone, rounds)
    return found


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
        done = subprocess.run(
            [*build, "--no-inspect", *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(done.stdout, flush=True)
        if done.returncode:
            raise RuntimeError(f"refedge build: {done.stdout.strip()[-1500:]}")
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
    """Exit code 1 where a plan could not be measured."""
    dry = "--dry" in options
    plugin = next((o.partition("=")[2] for o in options if o.startswith("--plugin=")), "")
    bundle = Path(folder)
    if dry and not bundle.is_dir():
        print("dry: no bundle here; what this step imports is here")
        return 0
    manifest = open_bundle(bundle).manifest
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "model": manifest.model,
        "plans": {},
        "plugin": Path(plugin).name,
        "bundle": manifest.digest,
        "provenance": manifest.provenance,
        "dry": dry,
    }
    if not dry:
        from ...runtime.backends.tensorrt import this_target

        record |= {"target": this_target().name, "state": {"before": state()}}
    if Path(out).is_file():
        earlier = json.loads(Path(out).read_bytes())
        record["plans"] = earlier["plans"] if earlier["bundle"] == manifest.digest else {}
    trained = SCENES if manifest.provenance.get("trained") else UNTRAINED
    for plan in PLANS:
        if record["plans"].get(plan, {"error": ""}).keys() != {"error"}:
            continue  # done before
        try:
            scenes, rounds = (2, 8) if dry else (trained, ROUNDS)
            record["plans"][plan] = measure(bundle, plan, scenes, rounds, dry=dry, plugin=plugin)
        except Exception as error:  # the next plan may work, and this one's error is a result
            traceback.print_exc()
            record["plans"][plan] = {"error": str(error) or type(error).__name__}
        if not dry:
            record["state"]["after"] = state()
        write_json(record, Path(out))  # the step may be ended
    failed = [plan for plan, found in record["plans"].items() if "error" in found]
    print(f"{len(record['plans'])} plans, failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written: what TensorRT does while a process ends says nothing of it
