"""PyTorch on the same device: eager in float32 and float16, compiled in float16.

    python -m refedge.benchmarks.gpu.peers MODEL BUNDLE OUT.json [--dry]

The model that BUNDLE was exported from, end to end as its engines are timed: the same picture and
expressions, preprocessing and tokenizer, logits back on the host. Beside it the parts alone, by
events, inputs on the device. float16 is autocast; compiled, weights are cast once (inductor's
freezing) and launches are CUDA graphs. A mode that fails is recorded with its error and tried
again by the next run of the step, which keeps those that are done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.bundle import Bundle, open_bundle
from ...runtime.files import write_json
from ..contestants import TorchRunner, open_original
from ..timing import task_for
from .machine import milliseconds, state
from .rounds import end_to_end

if TYPE_CHECKING:
    from ...models.checkpoint import Loaded

SCHEMA = "refedge-gpu-peers-2"
ROUNDS = 100
EAGER, COMPILED = "eager float32", "compiled float16"
MODES = (EAGER, COMPILED, "eager float16", "compiled float16, weights cast in every run")


def run_mode(
    loaded: Loaded, opened: Bundle, mode: str, *, device: str, rounds: int
) -> dict[str, Any]:
    """Series end to end, and milliseconds of each part and of all of them."""
    import torch
    import torch._inductor.config as inductor

    inductor.freezing = mode == COMPILED
    torch._dynamo.reset()
    runner = TorchRunner(
        loaded,
        opened,
        device=device,
        half="float16" in mode,
        wrap=_compiled if "compiled" in mode else None,
    )
    found: dict[str, Any] = {"end_to_end": end_to_end(runner, rounds)}
    task, spec = task_for(opened.manifest), opened.manifest.preprocess
    noise = torch.randint(256, (1, spec.height, spec.width, 3), dtype=torch.uint8)
    known = runner.given(runner.tokenize(task.expressions[0])) | {"pixels": noise.to(device)}
    spent = {}
    for name in runner.parts:
        known |= runner.run(name, known)
        spent[name] = milliseconds(lambda: runner.run(name, known), device, rounds)  # noqa: B023
    return {**found, "milliseconds": spent | {"all": sum(spent.values())}}


def _compiled(module: Any) -> Any:
    import torch

    return torch.compile(module, mode="reduce-overhead", dynamic=False)


def main(model: str, folder: str, out: str, *options: str) -> int:
    """Exit code 1 where a mode could not be measured."""
    dry, bundle, file = "--dry" in options, Path(folder), Path(out)
    if dry and not bundle.is_dir():
        print("dry: no bundle here; what this step imports is here")
        return 0
    import torch

    record: dict[str, Any] = {"schema": SCHEMA, "model": model, "torch": torch.__version__}
    record |= {"dry": dry, "state": {"before": state()}, "modes": {}}
    if file.is_file():
        record = json.loads(file.read_bytes())
    opened = open_bundle(bundle)
    wanted = MODES[:1] if dry else MODES
    left = [mode for mode in wanted if "milliseconds" not in record["modes"].get(mode, {})]
    loaded = [open_original(opened.manifest, model).loaded] if left else []  # it takes a while
    for mode in left:
        try:
            device, rounds = ("cpu", 8) if dry else ("cuda", ROUNDS)
            found = run_mode(loaded[0], opened, mode, device=device, rounds=rounds)
        except Exception as error:  # the next mode may work, and this one's error is a result
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        record["modes"][mode] = found
        record["state"]["after"] = state()
        write_json(record, file)  # the step may be ended
    failed = [mode for mode, found in record["modes"].items() if "error" in found]
    print(f"{len(record['modes'])} modes, failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
