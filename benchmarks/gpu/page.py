"""``docs/gpu-results.md`` from the results of ``make gpu``, or that there are none.

    python -m refedge.benchmarks.gpu.page [RESULTS]

RESULTS is a folder of ``gpu-<step>.json``, by default ``benchmarks/results``.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from .bars import bars

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/gpu-results.md"
HEAD = """# Results on GPUs

Made by `python -m refedge.benchmarks.gpu.page` from `benchmarks/results/gpu-*.json`, which
`make gpu` writes; [how to run it](runtime.md#make-gpu).
"""
NONE = """
Nothing has been measured on a GPU: **not yet measured** are the device's own rates, TensorRT's
build times, the accuracy and latency of engines, PyTorch and ONNX Runtime beside them, and the
fused kernels.
"""
MODELS = """Milliseconds at batch 1, medians, end to end from decoded pixels to mask; of ONNX
Runtime's providers the parts alone, inputs on the device. * unstable.
"""
KERNELS = """Microseconds in float16, medians inside one CUDA graph: our kernels, a copy of as many
bytes, as many empty kernels, the block as it was before folding, the best of SDPA and compile.
"""


def page(results: Path) -> str:
    """The page for a folder of results."""
    found = {
        file.stem.removeprefix("gpu-"): json.loads(file.read_text())
        for file in sorted(results.glob("gpu-*.json"))
    }
    if not found:
        return HEAD + NONE
    lines = [HEAD]
    if "machine" in found:
        lines += _machine(found["machine"])
    if "operators" in found:
        engines = found["operators"]["engines"]
        rows = [
            [k, "", _first(e)] if "error" in e
            else [k, f"{e['build_s']:.1f}", f"{max(e['errors']):.1e}"]
            for k, e in engines.items()
        ]  # fmt: skip
        lines += ["\n## Smoke of the builder", f"`{found['operators']['target']}`\n"]
        lines += _table(("type", "build, s", "largest relative error"), rows)
    held = bars(found)
    if held:
        lines += ["\n## Bars\n"]
        texts = [[what, where, said, "yes" if ok else "**no**"] for what, where, said, ok in held]
        lines += _table(("bar", "where", "measured", "holds"), texts)
    if "kernels" in found:
        lines += _kernels(found["kernels"])
    rows = []
    for name, record in found.items():
        if name.startswith(("engines-", "plugin-")):
            rows += _engines(name.partition("-")[2], record)
        elif name.startswith("peers-"):
            rows += _torch(name.removeprefix("peers-"), record)
        elif name.startswith("providers-"):
            rows += _providers(name.removeprefix("providers-"), record)
    if rows:
        lines += ["\n## Models", MODELS]
        heads = ("model", "what", "agreement", "mIoU", "uncached", "cached", "artefact")
        lines += _table(heads, rows)
    expected = {"machine": "the device's own rates", "operators": "the builder's smoke",
                "kernels": "fused kernels"}  # fmt: skip
    missing = [text for name, text in expected.items() if name not in found]
    missing += [] if rows else ["engines, PyTorch and ONNX Runtime beside them"]
    return "\n".join([*lines, f"\nNot yet measured: {', '.join(missing) or 'nothing'}.", ""])


def _machine(record: dict[str, Any]) -> list[str]:
    state = record["state"]["before"]
    said = ", ".join(f"{key} {value}" for key, value in state.items())
    rates = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in record["ops_per_s"].items())
    rows = [
        [name, f"{a['eager']:.4f}", f"{a.get('compiled', math.nan):.4f}", f"{a['error']:.1e}"]
        for name, a in record["attention_ms"].items()
    ]
    return [
        "\n## The device",
        f"{said}; torch {record['torch']}.\n",
        f"Copy {record['copy_bytes_per_s'] / 1e12:.2f} TB/s (read and written); products, T op/s: "
        f"{rates}.\n",
        "Attention of pixels to words in float16, milliseconds:\n",
        *_table(("shape", "PyTorch's own", "torch.compile", "relative error"), rows),
    ]


def _engines(model: str, record: dict[str, Any]) -> list[list[str]]:
    rows = []
    for plan, found in record["plans"].items():
        if "error" in found:
            rows.append([model, plan, "failed", _first(found), "", "", ""])
            continue
        scored = next(p for p in found["accuracy"] if p["plan"] == plan)
        spent = found["milliseconds"]
        times = [f"{spent[k]['p50']:.2f}{'*' * spent[k]['unstable']}"
                 for k in ("uncached", "cached")]  # fmt: skip
        # masks of seeded weights say nothing of accuracy
        trained = record["provenance"].get("trained", False)
        agreement = f"{scored['agreement']['mean']:.4f}" if trained else "–"
        miou = f"{scored['overall']['miou']:.4f}" if trained else "–"
        graph = found["graphs"]["mask"][:8]
        what = f"TensorRT {plan}{', plugin' if record.get('plugin') else ''}"
        rows.append([model, what, agreement, miou, *times, graph])
    return rows


def _torch(model: str, record: dict[str, Any]) -> list[list[str]]:
    rows = []
    for mode, found in record["modes"].items():
        if "end_to_end" in found:
            spent = found["end_to_end"]
            times = [f"{spent[k]['p50']:.2f}{'*' * spent[k]['unstable']}"
                     for k in ("uncached", "cached")]  # fmt: skip
            rows.append([model, f"torch {mode}", "", "", *times, ""])
        else:
            rows.append([model, f"torch {mode}", "failed", _first(found), "", "", ""])
    return rows


def _providers(model: str, record: dict[str, Any]) -> list[list[str]]:
    rows = []
    for mode, found in record["modes"].items():
        if "milliseconds" in found:
            graph = found.get("graphs", {}).get("mask", "")[:8]
            spent = f"{found['milliseconds']['all']:.2f}"
            rows.append([model, f"ONNX Runtime {mode}, parts", "", "", spent, "", graph])
        else:
            said = "absent" if "absent" in found else "failed"
            rows.append([model, f"ONNX Runtime {mode}", said, _first(found), "", "", ""])
    return rows


def _kernels(record: dict[str, Any]) -> list[str]:
    rows = []
    for row in record["timings"]:
        us = {form: each["median"] for form, each in row.get("us", {}).items() if "median" in each}
        if not us:
            rows.append([*row["key"], _first(row), "", "", "", "", ""])
            continue
        rivals = [t for form, t in us.items() if "compiled" in form or "sdpa" in form]
        shown = [us["fused"], us["copy"], us["empty"], us.get("unfused"), min(rivals, default=None)]
        times = ["–" if t is None else f"{t:.1f}" for t in shown]
        rows.append([row["shape"], str(row["batch"]), f"{row['bytes'] / 1e6:.1f}", *times])
    heads = ("shape", "batch", "MB", "fused", "copy", "empty", "unfused", "best of torch")
    about = f"{record['device']}, {record['architecture']}, torch {record['torch']}.\n"
    return ["\n## Kernels", KERNELS, about, *_table(heads, rows)]


def _first(found: dict[str, Any]) -> str:
    text = found.get("absent") or found.get("error") or "no reason given"
    return str(text).splitlines()[0].replace("|", "/")


def _table(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


if __name__ == "__main__":
    PAGE.write_text(page(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "benchmarks/results"))
