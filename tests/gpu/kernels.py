"""The fused operators on a GPU: right by float64, then timed beside what else there is.

    python -m refedge.tests.gpu.kernels RESULT.json [--check] [--small]

Every form runs inside one CUDA graph, over input sets that together do not fit the cache; figures
are medians. ``copy`` moves as many bytes as the operator reads and writes, ``empty`` is a graph of
as many kernels that do nothing. RESULT is written after every row, and rows that it has already are
not made again. What a driver refuses or torch cannot run is an error in its row; after one of ours
the process ends, since nothing that it says then can be trusted, and the next one goes on behind
it. Without a GPU it says so and ends well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...plugins import compile as compiling
from ...plugins import torch_op
from ...runtime.files import write_json
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
    record: dict[str, Any] = {"checks": [], "timings": []}
    source = compiling.source_hash()
    if options.result.is_file():
        earlier = json.loads(options.result.read_bytes())
        record = earlier if earlier["source"] == source else record  # of other kernels
    record |= {
        "schema": "refedge-gpu-kernels-2",
        "source": source,
        "device": torch.cuda.get_device_name(),
        "architecture": kernels.architecture,
        "torch": torch.__version__,
    }
    shapes = HARD if options.small else {**SHAPES, **HARD}
    add(record, "checks", [(n, d) for d in BARS for n in shapes], options.result,
        lambda key: checks(kernels, key[0], shapes[key[0]], key[1]))  # fmt: skip
    if not options.check:
        # what bars are about comes first
        rows = [(name, batch) for batch in ("one", "large", "eight") for name in SHAPES]
        add(record, "timings", rows, options.result, lambda key: timing(kernels, *key))
    bad = [c for c in record["checks"] if not c.get("good")]
    print(f"{len(record['checks'])} checks, {len(bad)} failed, {len(record['timings'])} timings")


def add(
    record: dict[str, Any],
    kind: str,
    keys: list[tuple[str, str]],
    result: Path,
    make_row: Callable[[tuple[str, str]], dict[str, Any]],
) -> None:
    """Make the rows that are not there yet; ends the process after an error of the device."""
    there = {tuple(row["key"]) for row in record[kind]}
    for key in keys:
        if key in there:
            continue
        try:
            row, failed = make_row(key), False
        except Exception as error:
            row, failed = {"error": f"{type(error).__name__}: {error}"[:500]}, True
        record[kind].append({"key": key, **row})
        write_json(record, result)  # the step may be ended
        print(*key, row.get("error") or row.get("errors") or short(row["us"]), flush=True)
        if failed:
            sys.exit(1)


def short(us: dict[str, Any]) -> dict[str, float]:
    return {name: round(each["median"], 1) for name, each in us.items() if "median" in each}


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


def checks(kernels: Kernels, name: str, shape: Any, dtype: str) -> dict[str, Any]:
    """Cubins and PTX of a shape in a type: errors against float64; run twice, equal bits."""
    operator, *sizes = shape
    feeds = make(operator, (2, *sizes), seed=len(name))
    call, given, made = on_device(operator, feeds, getattr(torch, dtype))
    ways = {
        "cubin": (kernels.prepare(operator, call, given, made)[0], made),
        "ptx": kernels.prepare_chain(operator, given),
    }
    values = wanted(operator, feeds, dtype)
    errors, same = {}, True
    for way, (run, found) in ways.items():
        run()
        torch.cuda.synchronize()
        first = [t.clone() for t in found]
        run()
        torch.cuda.synchronize()
        same = same and all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
        errors[way] = [
            float(np.linalg.norm(t.double().cpu().numpy() - v) / np.linalg.norm(v))
            for t, v in zip(found, values, strict=True)
        ]
    bar = BARS[dtype]
    good = same and all(e <= bar for each in errors.values() for e in each)  # NaN is not
    return {"errors": errors, "bar": bar, "same": same, "good": good}


def timing(
    kernels: Kernels, name: str, many: str, dtype: torch.dtype = torch.float16
) -> dict[str, Any]:
    """Microseconds of each form of a shape: one expression, eight, or 64 MB and more."""
    operator, *sizes = SHAPES[name]
    once, twice = (traffic(operator, (b, *sizes), dtype) for b in (1, 2))
    large = max(2, 1 + -(-(LARGE - once) // (twice - once)))
    batch = {"one": 1, "eight": 8, "large": large}[many]
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
    half = moved // 2
    source = torch.empty(sets, -(-half // 256) * 256, dtype=torch.uint8, device="cuda")
    target, one = torch.empty_like(source), torch.zeros(1, device="cuda")
    ours: dict[str, Form] = {
        "fused": lambda i: prepared[i][0][0](),
        "copy": lambda i: target[i, :half].copy_(source[i, :half]),
        "empty": lambda i: [one.zero_() for _ in range(launches)],
    }
    us: dict[str, Any] = {form: timed(f, sets) for form, f in ours.items()}
    # a compilation takes seconds; bars ask for it here alone
    asked = many != "eight" and name in ("slvit 1", "slvit 2", "slvit 3")
    theirs = others(operator, given, compiled=asked)
    us |= {form: tried(f, sets) for form, f in theirs.items()}
    return {"shape": name, "batch": batch, "bytes": moved, "kernels": launches, "us": us}


def traffic(operator: str, sizes: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that have to move: every input read once, every output written once."""
    feeds = make(operator, (1, *sizes[1:]))
    call, shapes = shape_of(operator, feeds)
    size, batch = dtype.itemsize, sizes[0]
    gate = 2 * call["channels"] ** 2 if operator == "NormAttention" else 0
    read = sum(v.size * (1 if v.dtype == bool else size) for v in feeds) - gate * size
    wrote = sum(int(np.prod(s)) * (4 if i else size) for i, s in enumerate(shapes))
    return batch * (read + wrote) + gate * size


def others(operator: str, given: list[list[Any]], *, compiled: bool) -> dict[str, Form]:
    """The folded operator by torch, and the block as it was before folding, each also compiled.

    ``sdpa`` gets its inputs as the model has them, ``sdpa, laid out`` with the last dimension
    contiguous, which torch's fused kernels ask for, without the time that takes.
    """
    folded = {
        "CrossAttention": torch_op.cross_attention,
        "NormAttention": torch_op.norm_attention,
        "MutualAttention": torch_op.mutual_attention,
    }[operator]
    chains: dict[str, tuple[Callable[..., Any], list[list[Any]]]] = {"folded": (folded, given)}
    if operator == "NormAttention":
        project = torch.randn_like(given[0][4]) / given[0][4].shape[0] ** 0.5

        def unfused(q: Any, k: Any, v: Any, words: Any, first: Any, second: Any) -> Any:
            weights = torch.softmax((k @ q).masked_fill(~words[:, :, None], -1e4), 1)
            return gated(F.instance_norm(project @ (v @ weights)), first, second)

        def attention(q: Any, k: Any, v: Any, words: Any, first: Any, second: Any) -> Any:
            seen = F.scaled_dot_product_attention(
                q[:, None], k[:, None], v[:, None], words[:, None, None], scale=1.0
            )
            return gated(F.instance_norm(project @ seen[:, 0].mT), first, second)

        turned = [[q.mT, k, v.mT, *more] for q, k, v, *more in given]
        laid = [[q.contiguous(), k, v.contiguous(), *more] for q, k, v, *more in turned]
        chains |= {"unfused": (unfused, given), "sdpa": (attention, turned)}
        chains["sdpa, laid out"] = (attention, laid)
    if operator == "CrossAttention":

        def heads(x: Any, keys: Any, values: Any, words: Any, offset: Any) -> Any:
            wide = x[:, None].expand(-1, keys.shape[1], -1, -1)
            shift = offset.masked_fill(~words[:, None], -torch.inf)[:, :, None]
            return F.scaled_dot_product_attention(wide, keys, values, shift, scale=1.0).sum(1)

        turned = [[x, keys.permute(0, 2, 3, 1), *more] for x, keys, *more in given]
        laid = [[x, keys.contiguous(), *more] for x, keys, *more in turned]
        chains |= {"sdpa": (heads, turned), "sdpa, laid out": (heads, laid)}
    forms: dict[str, Form] = {}
    for name, (chain, inputs) in chains.items():
        forms[name] = lambda i, f=chain, x=inputs: f(*x[i])
        if compiled:
            fast = torch.compile(chain, dynamic=False)
            forms[f"{name}, compiled"] = lambda i, f=fast, x=inputs: f(*x[i])
    return forms


def gated(found: Any, first: Any, second: Any) -> Any:
    return torch.tanh(second @ torch.relu(first @ found)) * found


def tried(form: Form, sets: int) -> dict[str, Any]:
    """Of torch's own: where one fails, the others are worth having."""
    try:
        return timed(form, sets)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


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
