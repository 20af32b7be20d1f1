"""PyTorch on the same device: eager in float32 and float16, compiled in float16.

    python -m refedge.benchmarks.gpu.peers MODEL OUT.json [--dry]

A picture of noise and an expression of five words; every part at batch one, time by events.
Parameters and inputs are on the device before the clock starts, so this is the least that a user of
PyTorch would wait. A mode that fails is recorded with its error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ...data.refshapes.expressions import words
from ...models.checkpoint import open_model
from .machine import milliseconds, state

SCHEMA = "refedge-gpu-peers-1"


def run_mode(model: str, dtype: str, *, compiled: bool, device: str) -> dict[str, float]:
    """Milliseconds of each part and of all of them, one after another."""
    import torch

    loaded = open_model(model, words(), size=None, weights=None, seed=0)
    network = loaded.model.eval().to(device)
    kind = getattr(torch, dtype)
    known = _inputs(network.config, device)
    found = {}
    with torch.inference_mode(), torch.autocast(device, kind, enabled=dtype != "float32"):
        for part in network.parts():
            run = torch.compile(part.module, mode="max-autotune") if compiled else part.module
            given = [known[port.name] for port in part.inputs]
            outputs = run(*given)
            outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
            known |= dict(zip((port.name for port in part.outputs), outputs, strict=True))
            repeats = 5 if device == "cpu" else 100
            found[part.name] = milliseconds(lambda: run(*given), device, repeats)  # noqa: B023
    return found | {"all": sum(found.values())}


def _inputs(config: Any, device: str) -> dict[str, Any]:
    """A picture of noise and an expression of five words."""
    import torch

    ids = torch.randint(config.vocabulary, (1, config.words), dtype=torch.int32)
    known = {
        "pixels": torch.randint(256, (1, config.size, config.size, 3), dtype=torch.uint8),
        "ids": ids,
        "words": (torch.arange(config.words) < 5)[None],
        "image_index": torch.zeros(1, dtype=torch.int32),
    }
    return {name: tensor.to(device) for name, tensor in known.items()}


def main(model: str, out: str, *options: str) -> int:
    """Exit code 1 where no mode could be measured."""
    import torch

    dry = "--dry" in options
    device = "cpu" if dry else "cuda"
    modes = [("eager float32", "float32", False)]
    if not dry:
        modes += [("eager float16", "float16", False), ("compiled float16", "float16", True)]
    record: dict[str, Any] = {"schema": SCHEMA, "model": model, "torch": torch.__version__}
    record |= {"dry": dry, "state": {"before": state()}, "modes": {}}
    for name, dtype, compiled in modes:
        try:
            found = run_mode(model, dtype, compiled=compiled, device=device)
            record["modes"][name] = {"milliseconds": found}
        except Exception as error:  # the next mode may work, and this one's error is a result
            record["modes"][name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        record["state"]["after"] = state()
        Path(out).write_text(json.dumps(record, indent=1) + "\n")  # the step may be ended
    print(json.dumps(record)[:2000])
    return int(not any("milliseconds" in mode for mode in record["modes"].values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
