"""The fused operators on a GPU: right by float64, then timed beside what else there is.

    python -m refedge.tests.gpu.kernels RESULT.json [--check] [--small]

Every form runs inside one CUDA graph, over input sets that together do not fit the cache; figures
are medians. ``copy`` moves as many bytes as the operator reads and writes, ``empty`` is a graph of
as many kernels that do nothing. Without a GPU it says so and ends well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...plugins import torch_op
from ..plugins.emulated import BARS, make, shape_of, wanted
from .driver import Kernels

# batch 1 shapes at paper size: operator, pixels, channels, words, heads, width
SHAPES = {
    "slvit 1": ("NormAttention", 14400, 64, 20, 1, 1),
    "slvit 2": ("NormAttention", 3600, 128, 20, 1, 1),
    "slvit 3": ("NormAttention", 900, 320, 20, 1, 1),
    "slvit 4": ("NormAttention", 225, 512, 20, 1, 1),
    "lavt 1": ("NormAttention", 14400, 128, 20, 1, 1),
    "lavt 4": ("NormAttention", 225, 1024, 20, 1, 1),
    "m3att": ("MutualAttention", 900, 1, 20, 8, 32),
    "cm_masksd": ("CrossAttention", 900, 512, 17, 8, 512),
    "lts": ("CrossAttention", 676, 256, 15, 8, 256),
}
HARD = {
    "odd": ("NormAttention", 1237, 65, 7, 1, 1),
    "streamed": ("NormAttention", 333, 64, 100, 1, 1),
    "odd cross": ("CrossAttention", 1237, 65, 7, 3, 33),
    "odd mutual": ("MutualAttention", 1237, 1, 33, 3, 33),
}
LARGE = 64 << 20  # bytes of traffic above which speed is that of memory
Form = Callable[[int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--check", action="store_true", help="No timing.")
    parser.add_argument("--small", action="store_true", help="Odd shapes alone, one run each.")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was checked or timed")
        return
    kernels = Kernels()
    record: dict[str, Any] = {
        "schema": "refedge-gpu-kernels-1",
        "device": torch.cuda.get_device_name(),
        "architecture": kernels.architecture,
        "torch": torch.__version__,
        "checks": list(checks(kernels, HARD if options.small else {**SHAPES, **HARD})),
        "timings": [],
    }
    options.result.write_text(json.dumps(record, indent=1) + "\n")
    for row in () if options.check else timings(kernels):
        record["timings"].append(row)
        options.result.write_text(json.dumps(record, indent=1) + "\n")  # the step may be ended
    bad = [c for c in record["checks"] if not c["good"]]
    print(f"{len(record['checks'])} checks, {len(bad)} failed; wrote {options.result}")
    sys.exit(1 if bad else 0)


def on_device(operator: str, feeds: list[np.ndarray], dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Sizes, inputs, and outputs full of NaN."""
    sizes, shapes = shape_of(operator, feeds)
    given = [torch.from_numpy(v) for v in feeds]
    # cast here: a sanitizer that looks at our kernels alone does not see a cast there write
    given = [(v if v.dtype == torch.bool else v.to(dtype)).cuda() for v in given]
    kinds = [dtype, torch.float32]
    made = [
        torch.full(shape, float("nan"), dtype=kinds[i], device="cuda")
        for i, shape in enumerate(shapes)
    ]
    return sizes, given, made


def checks(kernels: Kernels, shapes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every shape in every type, cubins and PTX: the error against float64; twice, equal bits."""
    for name, (operator, *sizes) in shapes.items():
        feeds = make(operator, (2, *sizes), seed=len(name))
        for dtype, bar in BARS.items():
            call, given, made = on_device(operator, feeds, getattr(torch, dtype))
            ways = {
                "cubin": (kernels.prepare(operator, call, given, made)[0], made),
                "ptx": kernels.prepare_chain(operator, given),
            }
            values = wanted(operator, feeds, dtype)
            for way, (run, found) in ways.items():
                run()
                torch.cuda.synchronize()
                first = [t.clone() for t in found]
                run()
                torch.cuda.synchronize()
                same = all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
                errors = [
                    float(np.linalg.norm(t.double().cpu().numpy() - v) / np.linalg.norm(v))
                    for t, v in zip(found, values, strict=True)
                ]
                good = same and all(e <= bar for e in errors)  # NaN is not
                row = {"shape": name, "dtype": dtype, "kernels": way}
                yield {**row, "errors": errors, "same": same, "good": good}
                print(f"{name:11} {dtype:9} {way:5} {max(errors):.1e} {'' if good else 'BAD'}")


def timings(kernels: Kernels, dtype: torch.dtype = torch.float16) -> Iterator[dict[str, Any]]:
    for name, (operator, *sizes) in SHAPES.items():
        once, twice = (traffic(operator, (b, *sizes), dtype) for b in (1, 2))
        for batch in (1, 8, max(2, 1 + -(-(LARGE - once) // (twice - once)))):
            torch._dynamo.reset()  # it compiles a function eight times, then no more
            moved = traffic(operator, (batch, *sizes), dtype)
            sets = max(2, min(64, 2 * torch.cuda.get_device_properties(0).L2_cache_size // moved))
            prepared, given = [], []
            for seed in range(sets):
                feeds = make(operator, (batch, *sizes), seed, padded=False)
                call, tensors, made = on_device(operator, feeds, dtype)
                prepared.append((kernels.prepare(operator, call, tensors, made), made))
                given.append(tensors)
            launches = prepared[0][0][1]
            forms: dict[str, Form] = {"fused": lambda i, p=prepared: p[i][0][0]()}
            forms |= others(operator, given)
            half = moved // 2
            source = torch.empty(sets, -(-half // 256) * 256, dtype=torch.uint8, device="cuda")
            target, one = torch.empty_like(source), torch.zeros(1, device="cuda")
            forms["copy"] = lambda i, s=source[:, :half], t=target[:, :half]: t[i].copy_(s[i])
            forms["empty"] = lambda i, o=one, n=launches: [o.zero_() for _ in range(n)]
            row = {"shape": name, "batch": batch, "bytes": moved, "kernels": launches}
            row["us"] = {form: timed(f, sets) for form, f in forms.items()}
            print(name, batch, {k: round(v["median"], 1) for k, v in row["us"].items()})
            yield row


def traffic(operator: str, sizes: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that have to move: every input read once, every output written once."""
    feeds = make(operator, (1, *sizes[1:]))
    call, shapes = shape_of(operator, feeds)
    size, batch = dtype.itemsize, sizes[0]
    gate = 2 * call["channels"] ** 2 if operator == "NormAttention" else 0
    read = sum(v.size * (1 if v.dtype == bool else size) for v in feeds) - gate * size
    wrote = sum(int(np.prod(s)) * (4 if i else size) for i, s in enumerate(shapes))
    return batch * (read + wrote) + gate * size


def others(operator: str, given: list[list[Any]]) -> dict[str, Form]:
    """The folded operator by torch, and the block as it was before folding, each also compiled."""
    folded = {
        "CrossAttention": torch_op.cross_attention,
        "NormAttention": torch_op.norm_attention,
        "MutualAttention": torch_op.mutual_attention,
    }[operator]
    chains: dict[str, Callable[..., Any]] = {"folded": folded}
    if operator == "NormAttention":
        project = torch.randn_like(given[0][4]) / given[0][4].shape[0] ** 0.5

        def unfused(q: Any, k: Any, v: Any, words: Any, first: Any, second: Any) -> Any:
            weights = torch.softmax((k @ q).masked_fill(~words[:, :, None], -1e4), 1)
            return gated(F.instance_norm(project @ (v @ weights)), first, second)

        def attention(q: Any, k: Any, v: Any, words: Any, first: Any, second: Any) -> Any:
            seen = F.scaled_dot_product_attention(
                q.mT[:, None], k[:, None], v.mT[:, None], words[:, None, None], scale=1.0
            )
            return gated(F.instance_norm(project @ seen[:, 0].mT), first, second)

        chains |= {"unfused": unfused, "sdpa": attention}
    if operator == "CrossAttention":

        def heads(x: Any, keys: Any, values: Any, words: Any, offset: Any) -> Any:
            wide = x[:, None].expand(-1, keys.shape[2], -1, -1)
            shift = offset.masked_fill(~words[:, None], -torch.inf)[:, :, None]
            return F.scaled_dot_product_attention(
                wide, keys.permute(0, 2, 3, 1), values, shift, scale=1.0
            ).sum(1)

        chains["sdpa"] = heads
    forms: dict[str, Form] = {}
    for name, chain in chains.items():
        forms[name] = lambda i, f=chain: f(*given[i])
        fast = torch.compile(chain, dynamic=False)
        forms[f"{name}, compiled"] = lambda i, f=fast: f(*given[i])
    return forms


def gated(found: Any, first: Any, second: Any) -> Any:
    return torch.tanh(second @ torch.relu(first @ found)) * found


def timed(form: Form, sets: int, repeats: int = 30) -> dict[str, float]:
    """Microseconds of one call: median, and the quartiles, over replays of a graph of all sets."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the inputs
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            form(0)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(sets):
                form(i)
        spent = []
        for turn in range(repeats + 5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            stream.synchronize()
            if turn >= 5:
                spent.append(start.elapsed_time(end) * 1000 / sets)
    low, middle, high = statistics.quantiles(spent, n=4)
    return {"median": middle, "low": low, "high": high}


if __name__ == "__main__":
    main()
