"""Make the bundle of a model on the GPU's machine: exported, then fp16 and int8 for its TensorRT.

    python -m refedge.benchmarks.gpu.bundles MODEL BUNDLE OUT.json [--dry]

What is there from an earlier run is kept, so that a step that was ended goes on. Seeded weights are
calibrated on a few samples, because their masks mean nothing, and their parity is left to the
records of ``make parity``; trained ones are treated as ``refedge quantize`` does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from ...errors import RefedgeError
from ...runtime.bundle import open_bundle

SCHEMA = "refedge-gpu-bundle-2"
FEW = ["--samples", "4", "--spare", "0"]
PLANS = ("fp16", "int8")


def wanted_dialects() -> list[str]:
    """For ONNX Runtime, and for the TensorRT that is here; else for the kit's 8.6."""
    family = "trt8"
    if find_spec("tensorrt") is not None:
        from ...engines.tensorrt import dialect_of
        from ...runtime.backends.bindings import open_tensorrt

        family = dialect_of(open_tensorrt().__version__)
    import onnxruntime

    gpu = {"CUDAExecutionProvider", "TensorrtExecutionProvider"}
    provided = ["trt10"] if gpu & {*onnxruntime.get_available_providers()} else []
    return list(dict.fromkeys(["ort", family, f"{family}-plugin", *provided]))


def verbs(model: str, bundle: Path) -> dict[str, list[str]]:
    """What is left to do: name to the arguments of ``refedge``."""
    left: dict[str, list[str]] = {}
    trained = ":" not in model  # a checkpoint; a configuration's weights are seeded
    try:
        held = open_bundle(bundle).manifest.dialects
    except RefedgeError:
        held = ()
        left["export"] = ["export", model, "-o", str(bundle), *([] if trained else ["--no-parity"])]
    dialects = wanted_dialects()
    for plan in PLANS:
        if not {*dialects} <= {d.name for d in held if d.plan == plan}:
            words = [word for name in dialects for word in ("--dialect", name)]
            left[plan] = ["quantize", str(bundle), "--plan", plan, *words]
            if plan == "int8":
                left[plan] += ["--data", "refshapes:calibration", "--rest", "fp16"]
                left[plan] += [] if trained else FEW
    return left


def main(model: str, bundle: str, out: str, *options: str) -> int:
    """Exit code of the verb that failed first, 0 if all plans are there; dry: nothing is made."""
    left, seconds = verbs(model, Path(bundle)), {}
    for name, arguments in left.items():
        shown = [arguments[0], "--help"] if "--dry" in options else arguments
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "refedge.cli", *shown], check=False)
        if done.returncode:
            return done.returncode
        seconds[name] = time.monotonic() - started
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
    record = {"schema": SCHEMA, "model": model, "seconds": seconds}
    Path(out).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
