"""What the exact rewrites bring: a model exported with and without, per block and end to end.

    python -m refedge.benchmarks.folding slvit:paper lts:tiny ... -o RESULT.json
        [--plan fp32 --plan int8] [--threads 1 --threads 2] [--rounds 20] [--work out/folding]
        [--no-alone]

Each model is exported several times, to bundles that are kept in ``--work``: ``before`` without
any rewrite of docs/folding.md, ``after`` with all that pay, and one with each alone, which is timed
in fp32 on one thread (``--no-alone`` leaves these out). Both clocks are kept: ``wall`` is what a
user waits, ``cpu`` what the process worked, which neighbours on the machine disturb less. A part
whose graph is the same on both sides is timed once, for both. ``new`` is an expression that was not
asked before about a new picture, ``kept`` one whose text is in the cache, ``again`` a new one about
a picture in the cache; each is the sum of its parts in a round. A block is everything of the
modules around an attention to words, cut out of either graph and fed with the tensors that it sees
in a whole run; blocks are cut in fp32 alone. In int8 both sides have the forms that ONNX Runtime
likes.
"""

from __future__ import annotations

import os
import subprocess
import sys
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
from ..runtime.masks import iou
from ..runtime.preprocess import open_photo, to_pixels
from ..runtime.tokenizer import ExpressionTokenizer
from .device import describe
from .timing import Clocks, clocked, summary, task_for

SCHEMA = "refedge-folding-3"
REWRITES = ("norm", "heads", "squeeze", "ort")
BLOCK_ROUNDS = 150  # at least; blocks are short
SAMPLES = 8  # that int8 is calibrated with; what is timed does not depend on them
MODULE = "refedge.module"
Arrays = dict[str, npt.NDArray[Any]]


class _Side:
    """One bundle's parts, and their inputs for one picture and expression."""

    def __init__(self, bundle: Bundle, plan: str, threads: int) -> None:
        backend = OnnxRuntimeBackend(threads=threads)
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


def _cuts(path: Path, prefixes: Iterable[str], known: Arrays, threads: int) -> dict[str, _Cut]:
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
        cuts[prefix] = _Cut(inputs, outputs, session_of(alone.SerializeToString(), threads), {})
    host = {i.name: known[i.name] for i in model.graph.input}
    tapped = sorted({i for block in cuts.values() for i in block.inputs} - host.keys())
    model.graph.output.extend(values[i] for i in tapped)
    found = session_of(model.SerializeToString(), threads)(tapped, host) if tapped else []
    whole = host | dict(zip(tapped, found, strict=True))
    for block in cuts.values():
        block.feeds = {i: whole[i] for i in block.inputs}
    return cuts


def _inside(node: Any, prefix: str) -> bool:
    module = next((p.value for p in node.metadata_props if p.key == MODULE), "")
    return bool(module == prefix or module.startswith(f"{prefix}."))


def session_of(raw: bytes, threads: int) -> Callable[[list[str], Arrays], list[npt.NDArray[Any]]]:
    """A graph on ONNX Runtime: names of outputs and inputs by name to these outputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])

    def run(names: list[str], feeds: Arrays) -> list[npt.NDArray[Any]]:
        found: list[npt.NDArray[Any]] = session.run(names, feeds)
        return found

    return run


def stages(sides: Mapping[str, _Side], rounds: int) -> dict[str, Any]:
    """Each part, and expressions as sums of parts."""
    first = next(iter(sides))
    parts = tuple(sides[first].parts)
    spent = clocked(
        {
            (part, name): partial(side.run, part)
            for part in parts
            for name, side in sides.items()
            if name == first or side.hashes[part] != sides[first].hashes[part]
        },
        rounds,
    )

    def sums(chain: Iterable[str]) -> dict[str, Clocks]:
        found: dict[str, Clocks] = {}
        for name in sides:
            clocks = [spent.get((part, name)) or spent[part, first] for part in chain]
            found[name] = {
                clock: [sum(turn) for turn in zip(*(c[clock] for c in clocks), strict=True)]
                for clock in ("wall", "cpu")
            }
        return found

    chains: dict[str, tuple[str, ...]] = {part: (part,) for part in parts}
    chains |= {"new": parts, "kept": tuple(p for p in parts if p != "text")}
    if "image" in parts:
        chains["again"] = tuple(p for p in parts if p != "image")
    return {name: summary(sums(chain)) for name, chain in chains.items()}


def branch_of(node: str) -> str:
    """The module of the cross-modal branch that a folded norm belongs to."""
    module = node.rsplit("/", 1)[0]
    return module[: module.index(".fusion") + len(".fusion")] if ".fusion" in module else module


def prepare(name: str, work: Path, plans: Iterable[str], by_itself: bool) -> dict[str, Path]:
    """Bundles of a model, ``tiny`` or ``paper`` such as ``lts:paper``, by variant; by the command,
    because this room exports nothing itself."""
    variants: dict[str, list[str]] = {"before": ["--no-fold"], "after": []}
    variants |= {rewrite: ["--rewrite", rewrite] for rewrite in REWRITES if by_itself}
    paths = {v: work / f"{name.replace(':', '-')}-{v}.refedge" for v in variants}
    for variant, options in variants.items():
        path = paths[variant]
        if not path.is_dir():
            _refedge("export", name, "-o", str(path), *options)
        timed = "int8" in plans and variant in ("before", "after")
        if timed and "int8" not in open_bundle(path).manifest.plans:
            data = ("--data", "refshapes:calibration", "--samples", str(SAMPLES))
            _refedge("quantize", str(path), "--plan", "int8", *data)
    return paths


def _refedge(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "refedge.cli", *arguments], check=True)


def measure(
    before: Path, after: Path, plan: str, rounds: int, threads: int = 1, *, cut: bool = True
) -> dict[str, Any]:
    """Two bundles of one model; a row for the result file. cut: with single blocks, in fp32."""
    bundles = {"before": open_bundle(before), "after": open_bundle(after)}
    sides = {name: _Side(bundle, plan, threads) for name, bundle in bundles.items()}
    logits = [side.known["logits"] for side in sides.values()]
    masks = [a > 0 for a in logits]
    cut = cut and plan == "fp32"
    blocks = _blocks(bundles, sides, max(rounds, BLOCK_ROUNDS), threads) if cut else []
    return {
        "model": bundles["after"].manifest.model,
        "plan": plan,
        "threads": threads,
        "task": sides["after"].task,
        "bundles": {n: b.manifest.digest for n, b in bundles.items()},
        "graphs": {n: s.hashes for n, s in sides.items()},
        "mask_iou": iou(*masks),
        "load_average": list(os.getloadavg()),
        "stages": stages(sides, rounds),
        "branch": _total(blocks),
        "blocks": blocks,
    }


def _blocks(
    bundles: Mapping[str, Bundle], sides: Mapping[str, _Side], rounds: int, threads: int
) -> list[dict[str, Any]]:
    """The blocks that the later bundle speaks of, in turns."""
    wanted = {branch_of(f["node"]): f for f in bundles["after"].manifest.folding}
    if not wanted:
        return []
    cuts = {n: _cuts(s.files["mask"], wanted, s.known, threads) for n, s in sides.items()}
    blocks = []
    for prefix, fold in wanted.items():
        old, new = cuts["before"][prefix], cuts["after"][prefix]
        found = [dict(zip(cut.outputs, cut.run(), strict=True)) for cut in (old, new)]
        pairs = [(found[0][o], found[1][o]) for o in old.outputs if o in new.outputs]
        differ = max((float(np.abs(a - 1.0 * b).max()) for a, b in pairs), default=0.0)
        row = summary(clocked({"before": old.run, "after": new.run}, rounds))
        blocks.append({"branch": prefix, "fold": fold, "differ": differ, "ms": row})
    return blocks


def _graphs(bundle: Bundle) -> list[str]:
    """Hashes of the graphs that ONNX Runtime runs in fp32."""
    (spec,) = [d for d in bundle.manifest.dialects if (d.name, d.plan) == ("ort", "fp32")]
    return [bundle.manifest.files[file].sha256 for file in spec.graphs.values()]


def alone(paths: Mapping[str, Path], rounds: int) -> dict[str, Any]:
    """Each rewrite by itself against ``before``: stages in fp32, one thread; empty where the graphs
    are the same."""
    rows: dict[str, Any] = {}
    for variant, path in paths.items():
        if variant in ("before", "after"):
            continue
        files = [_graphs(open_bundle(p)) for p in (paths["before"], path)]
        if files[0] == files[1]:
            rows[variant] = {}
            continue
        row = measure(paths["before"], path, "fp32", rounds, cut=False)
        rows[variant] = {"graphs": row["graphs"], "stages": row["stages"]}
    return rows


def _total(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of the medians over all blocks."""
    total: dict[str, Any] = {}
    for clock in ("wall", "cpu") if blocks else ():
        sums = {n: sum(b["ms"][n][clock]["median"] for b in blocks) for n in ("before", "after")}
        total[clock] = {**sums, "speedup": sums["before"] / sums["after"]}
    return total


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("-o", "output", type=click.Path(path_type=Path), required=True)
@click.option("--plan", "plans", multiple=True, default=("fp32", "int8"), show_default=True)
@click.option("--threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/folding"))
@click.option("--alone/--no-alone", "by_itself", default=True, help="Each rewrite by itself too.")
def main(
    models: tuple[str, ...],
    output: Path,
    plans: tuple[str, ...],
    threads: tuple[int, ...],
    rounds: int,
    work: Path,
    by_itself: bool,
) -> None:
    """Compare models with and without the rewrites."""
    work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    each: dict[str, Any] = {}
    record = {"schema": SCHEMA, "rounds": rounds, "device": describe(), "rows": rows, "alone": each}
    for model in models:
        paths = prepare(model, work, plans, by_itself)
        for plan in plans:
            for count in threads:
                rows.append(measure(paths["before"], paths["after"], plan, rounds, count))
                rows[-1]["model"] = model
                row = {**{n: s["after"] for n, s in rows[-1]["stages"].items()}}
                for name, clocks in {**row, "branch": rows[-1]["branch"]}.items():
                    gains = [f"{clock} {found['speedup']:.2f}" for clock, found in clocks.items()]
                    click.echo(f"{model} {plan} {count} {name}: {', '.join(gains) or 'not cut'}")
        each[model] = alone(paths, rounds)
        write_json(record, output)


if __name__ == "__main__":
    main()
