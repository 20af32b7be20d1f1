"""ONNX Runtime's own providers on the same device: CUDA, and its TensorRT.

    python -m refedge.benchmarks.gpu.providers BUNDLE OUT.json [--dry]

As ``peers.py`` times PyTorch: a picture of noise and an expression of five words, every part at
batch one, inputs and outputs on the device. A provider that this ONNX Runtime lacks, or whose
libraries do not load, is recorded as absent with its reason; the record is written after each mode.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...errors import BackendError
from ...runtime.backends.onnx_runtime import OnnxRuntimePart
from ...runtime.files import write_json
from ...runtime.manifest import Manifest
from ...runtime.segmenter import load
from .machine import milliseconds, state

SCHEMA = "refedge-gpu-providers-1"
MODES = (("cuda", "fp32"), ("cuda", "fp16"), ("tensorrt", "fp16"), ("tensorrt", "int8"))


def run_mode(bundle: Path, provider: str, plan: str, repeats: int) -> dict[str, Any]:
    """Milliseconds of each part and of all of them, and which graphs these were."""
    device = "cpu" if provider == "cpu" else "cuda"
    backend = "onnxruntime" if provider == "cpu" else f"onnxruntime:{provider}"
    segmenter = load(bundle, plan=plan, backend=backend)
    import onnxruntime  # it is there: the segmenter has loaded it

    known = _inputs(segmenter.manifest)
    spent = {}
    for part in segmenter.manifest.parts:
        inputs = {t.name: known[t.name] for t in part.inputs}
        known |= segmenter._parts[part.name].run(inputs)
        session = cast(OnnxRuntimePart, segmenter._parts[part.name])._session
        binding = session.io_binding()
        for name, value in inputs.items():
            on_device = onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0)
            binding.bind_ortvalue_input(name, on_device)
        for output in part.outputs:
            binding.bind_output(output.name, device)

        def run(session: Any = session, binding: Any = binding) -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        spent[part.name] = milliseconds(run, "cpu", repeats)  # by the clock: it waits itself
    files = segmenter.manifest.files
    graphs = {part: files[f].sha256 for part, f in segmenter.dialect.graphs.items()}
    return {"milliseconds": {**spent, "all": sum(spent.values())}, "graphs": graphs}


def _inputs(manifest: Manifest) -> dict[str, Any]:
    """A picture of noise and an expression of five words, for every part that takes them."""
    noise = np.random.default_rng(0)
    made: dict[str, Any] = {"image_index": np.zeros(1, np.int32)}
    for tensor in (t for part in manifest.parts for t in part.inputs):
        shape = tuple(1 if isinstance(d, str) else d for d in tensor.shape)
        if tensor.name == "pixels":
            made["pixels"] = noise.integers(256, size=shape, dtype=np.uint8)
        elif tensor.name == "ids":
            made["ids"] = noise.integers(5, size=shape, dtype=np.int32)
        elif tensor.name == "words":
            made["words"] = np.arange(shape[1])[None] < 5
    return made


def main(folder: str, out: str, *options: str) -> int:
    """Exit code 1 where a provider that is there could not be measured."""
    dry, bundle = "--dry" in options, Path(folder)
    if dry and not bundle.is_dir():
        print("dry: no bundle here; what this step imports is here")
        return 0
    record: dict[str, Any] = {"schema": SCHEMA, "dry": dry, "modes": {}}
    record["state"] = {"before": state()}
    for provider, plan in (("cpu", "fp32"), *MODES) if dry else MODES:
        try:
            found = run_mode(bundle, provider, plan, 5 if dry else 100)
        except BackendError as error:
            absent = error.code in ("backend-missing", "backend-provider")
            found = {"absent" if absent else "error": f"{error.what}: {error.why}"[:2000]}
        except Exception as error:  # the next may work, and this error is a result
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        record["modes"][f"{provider} {plan}"] = found
        write_json(record, Path(out))
    record["state"]["after"] = state()
    write_json(record, Path(out))
    print(json.dumps(record)[:2000])
    return int(any("error" in mode for mode in record["modes"].values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
