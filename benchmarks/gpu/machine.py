"""Hour zero: what the GPU is, and what it can do at best. torch and the standard library alone.

    python -m refedge.benchmarks.gpu.machine OUT.json [--dry]

Device, driver and clocks; bandwidth of a device-to-device copy, bytes read plus bytes written;
rates of a large matrix product on random data; PyTorch's attention, eager and compiled, at the
shapes where the models at their papers' sizes let pixels attend to words. Medians of event times.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMA = "refedge-gpu-machine-1"
# heads, pixels, words, width of a head: `refedge models`, configurations of the papers
SHAPES = {
    "slvit 1": (1, 14400, 20, 64),
    "slvit 2": (1, 3600, 20, 128),
    "slvit 3": (1, 900, 20, 320),
    "slvit 4": (1, 225, 20, 512),
    "lts": (1, 676, 1, 512),
    "m3att": (8, 900, 20, 32),
    "cm_masksd": (8, 900, 17, 64),
    "step F1": (1, 6400, 20, 400),
    "step F3": (1, 1600, 20, 400),
    "lavt 1": (1, 14400, 20, 128),
    "lavt 4": (1, 225, 20, 1024),
}
_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,pstate,temperature.gpu"


def state() -> dict[str, str]:
    """What nvidia-smi says now; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_QUERY.split(","), done.stdout.strip().split(", "), strict=False))


def milliseconds(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median of so many runs after a warm-up; by CUDA's events where there is CUDA."""
    import torch

    for _ in range(3):
        run()
    samples: list[float] = []
    for _ in range(repeats):
        if device == "cuda":
            event: Any = torch.cuda.Event
            first, last = event(enable_timing=True), event(enable_timing=True)
            first.record()
            run()
            last.record()
            last.synchronize()
            samples.append(first.elapsed_time(last))
        else:
            started = time.perf_counter()
            run()
            samples.append(1e3 * (time.perf_counter() - started))
    return statistics.median(samples)


def bandwidth(device: str, size: int, repeats: int) -> float:
    """Bytes per second of a copy, read and written."""
    import torch

    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * size / milliseconds(lambda: target.copy_(source), device, repeats)


def products(device: str, n: int, repeats: int) -> dict[str, float]:
    """Operations per second of an n x n x n product by type; int8 where torch has it."""
    import torch

    found = {}
    kinds = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16,
             "bfloat16": torch.bfloat16}  # fmt: skip
    for name, dtype in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        found[name] = 2e3 * n**3 / milliseconds(lambda: a @ b, device, repeats)  # noqa: B023
    torch.backends.cuda.matmul.allow_tf32 = False
    if device == "cuda":
        i, j = (torch.randint(-99, 99, (n, n), dtype=torch.int8, device=device) for _ in range(2))
        found["int8"] = 2e3 * n**3 / milliseconds(lambda: torch._int_mm(i, j.t()), device, repeats)
    return found


def attention(device: str, repeats: int, pixels: int | None = None) -> dict[str, dict[str, float]]:
    """Milliseconds of scaled dot-product attention in float16 with a mask over words, by shape.

    ``eager`` is torch's own choice of kernel; ``compiled`` is the written-out product, softmax,
    product under torch.compile, which may fuse it. ``error`` is the relative error of eager
    against float64.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def written(q: Any, k: Any, v: Any, mask: Any) -> Any:
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        return scores.masked_fill(~mask, -1e4).softmax(-1) @ v

    dtype = torch.float16 if device == "cuda" else torch.float32
    found = {}
    for name, (heads, n, words, width) in SHAPES.items():
        n = min(n, pixels or n)
        q = torch.randn(1, heads, n, width, device=device, dtype=dtype)
        k, v = (torch.randn(1, heads, words, width, device=device, dtype=dtype) for _ in range(2))
        mask = torch.ones(1, 1, 1, words, dtype=torch.bool, device=device)
        mask[..., words // 2 + 1 :] = False
        wide = written(q.double(), k.double(), v.double(), mask)
        error = (sdpa(q, k, v, attn_mask=mask).double() - wide).norm() / wide.norm()
        eager = milliseconds(lambda: sdpa(q, k, v, attn_mask=mask), device, repeats)  # noqa: B023
        torch._dynamo.reset()  # it compiles a function eight times, then no more
        compiled = torch.compile(written, dynamic=False) if device == "cuda" else written
        found[name] = {"eager": eager, "error": float(error)}
        try:
            fused = milliseconds(lambda: compiled(q, k, v, mask), device, repeats)  # noqa: B023
            found[name]["compiled"] = fused
        except Exception as error:  # no compiler for it here, say; all else is worth having
            print(f"{name}: torch.compile: {error}")
    return found


def main(out: str, *options: str) -> int:
    """Measure, or on small sizes only run, everything above."""
    import torch

    dry = "--dry" in options
    device = "cpu" if dry else "cuda"
    record: dict[str, Any] = {"schema": SCHEMA, "dry": dry, "torch": torch.__version__}
    record["device"] = {} if dry else {"name": torch.cuda.get_device_name(0),
                                       "sm": torch.cuda.get_device_capability(0),
                                       "cuda": torch.version.cuda}  # fmt: skip
    record["state"] = {"before": state()}
    parts: dict[str, Callable[[], Any]] = {
        "copy_bytes_per_s": lambda: bandwidth(
            device, 1 << 20 if dry else 4 << 30, 3 if dry else 30
        ),
        "ops_per_s": lambda: products(device, 64 if dry else 8192, 3 if dry else 20),
        "attention_ms": lambda: attention(device, 3 if dry else 200, 32 if dry else None),
    }
    with torch.inference_mode():
        for name, measure in parts.items():
            record[name] = measure()
            record["state"]["after"] = state()
            Path(out).write_text(json.dumps(record, indent=1) + "\n")  # the step may be ended
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
