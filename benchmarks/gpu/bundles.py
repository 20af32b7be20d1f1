"""Make the bundle of a model on the GPU's machine: exported, then fp16 and int8 for TensorRT.

python -m refedge.benchmarks.gpu.bundles MODEL BUNDLE OUT.json [--dry]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

SCHEMA = "refedge-gpu-bundle-1"
QUANTIZE = {
    "fp16": (),
    "int8": ("--data", "refshapes:calibration", "--samples", "32", "--spare", "0"),
}


def main(model: str, bundle: str, out: str, *options: str) -> int:
    """Exit code of the verb that failed first; dry: whether the verbs are there."""
    verbs = [["export", model, "-o", bundle]]
    for plan, more in QUANTIZE.items():
        dialects = [
            word for d in ("ort", "trt8", "trt8-plugin", "trt10") for word in ("--dialect", d)
        ]
        verbs.append(["quantize", bundle, "--plan", plan, *more, *dialects])
    if "--dry" in options:
        verbs = [[verb[0], "--help"] for verb in verbs]
    seconds = {}
    for verb in verbs:
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "refedge.cli", *verb], check=False)
        if done.returncode:
            return done.returncode
        seconds[" ".join(verb[:1] + verb[2:4])] = time.monotonic() - started
    record = {"schema": SCHEMA, "model": model, "seconds": seconds}
    Path(out).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
