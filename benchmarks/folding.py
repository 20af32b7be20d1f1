"""What folding brings: two bundles of one model, per block and end to end, in turns.

    python -m refedge.benchmarks.folding BEFORE AFTER -o RESULT.json [--plan fp32] [--rounds 20]

BEFORE was exported without folding, AFTER with it; one thread. Both clocks are kept: ``wall`` is
what a user waits, ``cpu`` what one thread worked, which neighbours on the machine disturb less. A
block is everything of the modules around its norm, cut out of either graph and fed with the tensors
that it sees in a whole run; blocks are cut in fp32 alone.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from ..runtime.backends.onnx_runtime import OnnxRuntimeBackend
from ..runtime.bundle import Bundle, open_bundle
from ..runtime.files import write_json
from ..runtime.preprocess import open_photo, to_pixels
from ..runtime.tokenizer import ExpressionTokenizer
from .device import describe
from .timing import take_turns, task_for

SCHEMA = "refedge-folding-1"
MODULE = "refedge.module"
Arrays = dict[str, npt.NDArray[Any]]
Clocks = dict[str, list[float]]


class _Side:
    """One bundle's parts, and their inputs for one picture and expression."""

    def __init__(self, bundle: Bundle, plan: str) -> None:
        backend = OnnxRuntimeBackend(threads=1)
        manifest = bundle.manifest
        wanted = backend.dialects(plan)
        spec = next(d for d in manifest.dialects if d.plan == plan and d.name in wanted)
        self.files = {part: bundle.file(file) for part, file in spec.graphs.items()}
        self.hashes = {part: manifest.files[file].sha256 for part, file in spec.graphs.items()}
        self.parts = {p.name: backend.load(self.files[p.name], p) for p in manifest.parts}
        task = task_for(manifest)
        text = manifest.tokenizer
        tokens = ExpressionTokenizer(bundle.file(text.file).read_bytes(), text).encode(
            task.expressions[0]
        )
        pixels = to_pixels(open_photo(task.photo), manifest.preprocess)
        self.task = f"{task.id}: {task.expressions[0]}"
        self.known: Arrays = {"ids": tokens.ids[None], "words": tokens.words[None]}
        self.known |= {"pixels": pixels[None], "image_index": np.zeros(1, np.int32)}
        self.inputs = {p.name: [t.name for t in p.inputs] for p in manifest.parts}
        for part in self.parts:
            self.known |= self.run(part)

    def run(self, part: str) -> Arrays:
        """Outputs of a part by name."""
        return self.parts[part].run({name: self.known[name] for name in self.inputs[part]})


@dataclass
class _Cut:
    """The nodes of some modules as a graph of their own, with the inputs of a whole run."""

    inputs: list[str]
    outputs: list[str]
    session: Callable[[list[str], Arrays], list[npt.NDArray[Any]]]
    feeds: Arrays

    def run(self) -> list[npt.NDArray[Any]]:
        """What the block writes, by the order of ``outputs``."""
        return self.session(self.outputs, self.feeds)


def _cuts(path: Path, prefixes: Iterable[str], known: Arrays) -> dict[str, _Cut]:
    """A cut for each module; one run of the whole graph gives what all of them read."""
    import onnx

    model = onnx.load(path)
    constants = {t.name: t for t in model.graph.initializer}
    values = {v.name: v for v in (*model.graph.value_info, *model.graph.input)}
    cuts = {}
    for prefix in prefixes:
        nodes = [n for n in model.graph.node if _inside(n, prefix)]
        made = {o for n in nodes for o in n.output}
        reads = dict.fromkeys(i for n in nodes for i in n.input if i)
        inputs = [i for i in reads if i not in made and i not in constants]
        read_on = {i for n in model.graph.node if not _inside(n, prefix) for i in n.input}
        outputs = sorted(made & read_on)
        graph = onnx.helper.make_graph(
            nodes,
            "block",
            [values[i] for i in inputs],
            [values[o] for o in outputs],
            [constants[i] for i in reads if i in constants],
        )
        alone = onnx.helper.make_model(
            graph, opset_imports=model.opset_import, ir_version=model.ir_version
        )
        cuts[prefix] = _Cut(inputs, outputs, _session(alone.SerializeToString()), {})
    host = {i.name: known[i.name] for i in model.graph.input}
    tapped = sorted({i for block in cuts.values() for i in block.inputs} - host.keys())
    model.graph.output.extend(values[i] for i in tapped)
    found = _session(model.SerializeToString())(tapped, host) if tapped else []
    whole = host | dict(zip(tapped, found, strict=True))
    for block in cuts.values():
        block.feeds = {i: whole[i] for i in block.inputs}
    return cuts


def _inside(node: Any, prefix: str) -> bool:
    module = next((p.value for p in node.metadata_props if p.key == MODULE), "")
    return bool(module == prefix or module.startswith(f"{prefix}."))


def _session(raw: bytes) -> Callable[[list[str], Arrays], list[npt.NDArray[Any]]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])

    def run(names: list[str], feeds: Arrays) -> list[npt.NDArray[Any]]:
        found: list[npt.NDArray[Any]] = session.run(names, feeds)
        return found

    return run


def in_turns(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda i: i,
) -> dict[str, dict[str, Any]]:
    """Milliseconds of each, on both clocks; an untimed run goes before every timed one.

    ``speedup``: the median over rounds of the first one's time divided by its own.
    """
    spent: dict[str, Clocks] = {name: {"wall": [], "cpu": []} for name in runs}

    def turn(name: str) -> Callable[[int], None]:
        def take(_: int) -> None:
            runs[name]()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            spent[name]["cpu"].append((time.process_time() - cpu) * 1e3)
            spent[name]["wall"].append((time.perf_counter() - wall) * 1e3)

        return take

    take_turns({name: turn(name) for name in runs}, rounds, progress)
    base = next(iter(runs))
    return {
        name: {
            clock: {
                "least": min(samples),
                "median": statistics.median(samples),
                "speedup": statistics.median(
                    b / a for a, b in zip(samples, spent[base][clock], strict=True)
                ),
            }
            for clock, samples in clocks.items()
        }
        for name, clocks in spent.items()
    }


def branch_of(node: str) -> str:
    """The module of the cross-modal branch that a folded norm belongs to."""
    module = node.rsplit("/", 1)[0]
    return module[: module.index(".fusion") + len(".fusion")] if ".fusion" in module else module


def measure(before: Path, after: Path, plan: str, rounds: int) -> dict[str, Any]:
    """Everything; a record for the result file."""
    bundles = {"before": open_bundle(before), "after": open_bundle(after)}
    sides = {name: _Side(bundle, plan) for name, bundle in bundles.items()}
    folds = bundles["after"].manifest.folding
    wanted = {branch_of(f["node"]): f for f in folds} if plan == "fp32" else {}
    cuts = {n: _cuts(s.files["mask"], wanted, s.known) for n, s in sides.items()} if wanted else {}
    blocks = []
    for prefix, fold in wanted.items():
        old, new = cuts["before"][prefix], cuts["after"][prefix]
        found = [dict(zip(cut.outputs, cut.run(), strict=True)) for cut in (old, new)]
        pairs = [(found[0][o], found[1][o]) for o in old.outputs if o in new.outputs]
        differ = max((float(np.abs(a - 1.0 * b).max()) for a, b in pairs), default=0.0)
        row = in_turns({"before": old.run, "after": new.run}, rounds)
        blocks.append({"branch": prefix, "fold": fold, "differ": differ, "ms": row})
    stages: dict[str, Any] = {}
    for part in sides["before"].parts:
        stages[part] = in_turns({n: partial(s.run, part) for n, s in sides.items()}, rounds)
    logits = [side.known["logits"] for side in sides.values()]
    masks = [a > 0 for a in logits]
    return {
        "schema": SCHEMA,
        "model": bundles["after"].manifest.model,
        "plan": plan,
        "threads": 1,
        "rounds": rounds,
        "task": sides["after"].task,
        "bundles": {n: b.manifest.digest for n, b in bundles.items()},
        "graphs": {n: s.hashes for n, s in sides.items()},
        "mask_iou": float((masks[0] & masks[1]).sum() / max(1, (masks[0] | masks[1]).sum())),
        "load_average": list(os.getloadavg()),
        "device": describe(),
        "parts": stages,
        "branch": _total(blocks),
        "blocks": blocks,
    }


def _total(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of the medians over all blocks."""
    total: dict[str, Any] = {}
    for clock in ("wall", "cpu") if blocks else ():
        sums = {n: sum(b["ms"][n][clock]["median"] for b in blocks) for n in ("before", "after")}
        total[clock] = {**sums, "speedup": sums["before"] / sums["after"]}
    return total


@click.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("-o", "output", type=click.Path(path_type=Path), required=True)
@click.option("--plan", default="fp32", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True)
def main(before: Path, after: Path, output: Path, plan: str, rounds: int) -> None:
    """Compare two bundles of one model."""
    record = measure(before, after, plan, rounds)
    write_json(record, output)
    rows = {part: row["after"] for part, row in record["parts"].items()}
    for name, clocks in {**rows, "branch": record["branch"]}.items():
        found = ", ".join(f"{clock} {row['speedup']:.2f}" for clock, row in clocks.items())
        click.echo(f"{name}: {found or 'not cut'}")


if __name__ == "__main__":
    main()
