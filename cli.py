"""The ``refedge`` command: one verb per stage.

Heavy packages are imported inside the verbs, so that ``refedge --help`` is quick and a missing
package breaks only the verb that needs it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from . import __version__
from .cli_engines import build, doctor, inspect
from .cli_plugin import plugin
from .cli_weights import convert, export, models, train
from .errors import RefedgeError, RefedgeWarning

Item = TypeVar("Item")
_TRACING = "torch transformers safetensors onnx onnxscript"  # what needs one needs them all
_METHODS = ("minmax", "percentile", "entropy", "mse")


class _Group(click.Group):
    """Prints refedge's errors in three lines and ends with exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", RefedgeWarning)
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except RefedgeError as error:
            click.echo(f"error {error}", err=True)
            ctx.exit(2)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("refedge"):
                raise
            package, verb = error.name.partition(".")[0], ctx.invoked_subcommand
            more = ", or leave PyTorch out: --no-torch" if verb == "bench" else ""
            click.echo(
                f"error [package-missing] {package} is not installed\n  why: {verb} needs it\n"
                f"  fix: pip install {_TRACING if package in _TRACING.split() else package}{more}",
                err=True,
            )
            ctx.exit(2)


@click.group(
    cls=_Group,
    commands=[train, convert, export, models, build, inspect, doctor, plugin],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__)
def main() -> None:
    """Referring image segmentation, from PyTorch to the edge, with its accuracy proven."""


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("expressions", nargs=-1, required=True)
@click.option("--plan", default="fp32", show_default=True)
@click.option("--backend", default="auto", show_default=True, help="As refedge.load takes it.")
@click.option("--threads", type=int, help="Threads per operator.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Overlay PNG to write.")
@click.option("--json", "as_json", is_flag=True, help="Print RLE, score and timings as JSON.")
def run(
    bundle: Path,
    image: Path,
    expressions: tuple[str, ...],
    plan: str,
    backend: str,
    threads: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Segment what each of the EXPRESSIONS means in IMAGE."""
    from .runtime.files import write_png
    from .runtime.segmenter import load

    segmenter = load(bundle, plan=plan, backend=backend, threads=threads)
    masks = segmenter.scene(image).segment(expressions)
    for i, mask in enumerate(masks):
        name = output or image.with_name(f"{image.stem}.mask.png")
        path = name if len(masks) == 1 else name.with_name(f"{name.stem}.{i + 1}{name.suffix}")
        if output is not None or not as_json:
            write_png(mask.overlay(), path)
        if as_json:
            record = {"expression": mask.expression, "score": mask.score, "rle": mask.rle()}
            click.echo(json.dumps(record | {"timings_ms": dataclasses.asdict(mask.timings)}))
        else:
            share = 100 * mask.array.mean()
            click.echo(
                f"{mask.expression!r}: {share:.1f} % of the picture, score {mask.score:.2f}, "
                f"{mask.timings.total:.1f} ms -> {path}"
            )


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--plan", default="int8", show_default=True, help="int8, fp16, or naive.")
@click.option("--data", help="Calibration set; none: add dialects to the plan that is there.")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of REFER's or own files.")
@click.option("--method", help=f"One of {', '.join(_METHODS)}; default: mse.")
@click.option("--samples", type=int, help="Of the calibration set; default: 256.")
@click.option("--spare", type=float, help="Share of the MACs that may stay in float.")
@click.option("--rest", help="What is not int8: fp32 (default), or fp16, for GPUs.")
@click.option("--dialect", "dialects", multiple=True, default=("ort", "ort-u8u8"))
def quantize(
    bundle: Path,
    plan: str,
    data: str | None,
    root: Path | None,
    method: str | None,
    samples: int | None,
    spare: float | None,
    rest: str | None,
    dialects: tuple[str, ...],
) -> None:
    """Make a precision plan for BUNDLE and write its dialects into it."""
    from .calibration.quantize import quantize as run

    made, manifest = run(
        bundle,
        plan,
        data=data,
        root=root,
        method=method,
        samples=samples,
        spare=spare,
        rest=rest,
        dialects=dialects,
        progress=lambda items, label: _progress(label)(items),
    )
    shares = (f"{part} {100 * s:.1f} %" for part, s in made.notes.get("int8_macs", {}).items())
    work = f", conv/linear MACs in int8: {', '.join(shares)}" if made.notes else ""
    held = [d.name for d in manifest.dialects if d.plan == made.name]
    click.echo(f"{bundle.name} has the plan {made.name} in {', '.join(held)}{work}")
    click.echo(f"plans: fp32, {', '.join(manifest.plans)}")


@main.command("eval")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", default="refshapes:test", show_default=True)
@click.option("--root", type=click.Path(path_type=Path), help="Folder of REFER's or own files.")
@click.option("--plan", "plans", multiple=True, help="Default: all; fp32 is the reference.")
@click.option("--protocol", help="Default: the bundle's own.")
@click.option("--limit", "--scenes", type=int, help="Only the first so many scenes or pictures.")
@click.option("--threads", type=int, help="Threads per operator.")
@click.option("--backend", default="auto", show_default=True, help="Of all plans but fp32.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--report", type=click.Path(path_type=Path), help="HTML page to write.")
@click.option("--bench", type=click.Path(path_type=Path), help="Result of bench, for the page.")
def evaluate(
    bundle: Path,
    data: str,
    root: Path | None,
    plans: tuple[str, ...],
    protocol: str | None,
    limit: int | None,
    threads: int | None,
    backend: str,
    output: Path | None,
    report: Path | None,
    bench: Path | None,
) -> None:
    """Score the plans of BUNDLE on a dataset under a named protocol."""
    from .benchmarks.accuracy import changes, open_plans, table
    from .benchmarks.accuracy import evaluate as run
    from .benchmarks.bench import read_bench
    from .data.items import open_items
    from .data.protocols import protocol_named
    from .runtime.files import write_json

    speed = None if bench is None else read_bench(bench)
    segmenters = open_plans(bundle, plans, threads, backend)
    manifest = next(iter(segmenters.values())).manifest
    rules = protocol_named(protocol or manifest.protocol)
    items = open_items(data, manifest.preprocess, rules, root=root, limit=limit)
    result = run(segmenters, items, rules, data, progress=_progress("evaluating"))
    print_table(
        f"{bundle.name} on {data}, {len(items)} items, protocol {rules.name}", *table(result)
    )
    header, rows = changes(result)
    if rows:
        print_table("against fp32", header, rows)
    if output is not None:
        write_json(result.record(), output)
    if report is not None:
        from .benchmarks.report import write_report

        write_report(report, result, speed)
        click.echo(f"report: {report}")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--plan", "plans", multiple=True, help="Default: all plans of the bundle.")
@click.option("--torch/--no-torch", default=True, help="Run the PyTorch model beside the plans.")
@click.option("--model", help="What the bundle was exported from; default: as it says itself.")
@click.option("--threads", type=int, default=1, show_default=True, help="Threads per operator.")
@click.option("--rounds", type=int, default=30, show_default=True, help="Samples of each.")
@click.option("--expressions", type=int, help="So many about one picture, together or singly.")
@click.option("--backend", default="auto", show_default=True, help="auto, onnxruntime, tensorrt, …")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file to write.")
def bench(
    bundle: Path,
    plans: tuple[str, ...],
    torch: bool,
    model: str | None,
    threads: int,
    rounds: int,
    expressions: int | None,
    backend: str,
    output: Path | None,
) -> None:
    """Time the plans of BUNDLE and PyTorch eager, interleaved in one run."""
    if expressions is not None:
        from .benchmarks import scene

        times = scene.scene_times(
            bundle,
            count=expressions,
            plans=plans or None,
            threads=threads,
            rounds=rounds,
            backend=backend,
            progress=_progress("timing"),
        )
        print_table(f"{expressions} expressions about one picture", *scene.table(times))
        if output is not None:
            scene.write_scene_times(times, output, bundle, expressions)
        return
    from .benchmarks.bench import bench as run
    from .benchmarks.bench import table, write_bench

    result = run(
        bundle,
        plans=plans or None,
        torch_model=(model or True) if torch else None,
        threads=threads,
        rounds=rounds,
        backend=backend,
        progress=_progress("timing"),
    )
    for title, header, rows in table(result):
        print_table(title, header, rows)
    if output is not None:
        write_bench(result, output)


@main.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--slower", type=float, default=5.0, show_default=True, help="Per cent allowed.")
@click.option("--lower", type=float, default=0.5, show_default=True, help="mIoU points allowed.")
def compare(before: Path, after: Path, slower: float, lower: float) -> None:
    """Compare two results of bench or of eval; exit code 1 where AFTER is worse."""
    from .benchmarks.compare import compare as run

    result = run(before, after, slower=slower / 100.0, lower=lower / 100.0)
    print_table(result.title, result.header, result.rows)
    for line in result.worse:
        click.echo(f"worse: {line}")
    sys.exit(1 if result.worse else 0)


@main.command()
@click.argument("model", default="slvit-tiny")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("out"))
@click.option("--scenes", type=int, default=24, show_default=True, help="Scenes of the test split.")
@click.option("--rounds", type=int, default=12, show_default=True, help="Timings of each plan.")
def demo(model: str, output: Path, scenes: int, rounds: int) -> None:
    """Export MODEL, quantize it, time and score every plan beside torch, and write a report."""
    from .benchmarks.accuracy import evaluate as run_eval
    from .benchmarks.accuracy import open_plans
    from .benchmarks.bench import bench as run_bench
    from .benchmarks.bench import write_bench
    from .benchmarks.contestants import open_original
    from .benchmarks.demo import gallery, summary, torch_scores
    from .benchmarks.report import write_report
    from .calibration.quantize import quantize as run_quantize
    from .data.items import open_items
    from .data.protocols import protocol_named
    from .data.refshapes.expressions import words
    from .export.export import export as run_export
    from .models.checkpoint import open_model
    from .runtime.files import write_json

    bundle = output / f"{model.replace(':', '-')}.refedge"
    manifest = run_export(open_model(model, words()), bundle, say=click.echo)
    worst = max(r["end_to_end"]["sigma"] for r in manifest.parity["runs"].values())
    click.echo(f"parity: logits differ from torch's by at most {worst:.1e} σ")
    calibrated = {"data": "refshapes:calibration"}
    settings: dict[str, dict[str, Any]] = {
        "fp16": {},
        "int8": calibrated,
        "naive": calibrated | {"samples": 16},  # for contrast; more samples do not mend it
    }
    for plan, setting in settings.items():
        click.echo(f"quantizing: {plan}")
        run_quantize(bundle, plan, progress=lambda i, label: _progress(label)(i), **setting)
    click.echo("timing")
    speed = run_bench(bundle, rounds=rounds, progress=_progress("timing"))
    write_bench(speed, output / "bench.json")
    click.echo("scoring")
    segmenters = open_plans(bundle, (), None)
    rules = protocol_named(manifest.protocol)
    items = open_items("refshapes:test", manifest.preprocess, rules, limit=scenes)
    scores = run_eval(segmenters, items, rules, "refshapes:test", progress=_progress("scoring"))
    write_json(scores.record(), output / "eval.json")
    write_report(output / "report.html", scores, speed)
    reference = segmenters["fp32"]
    torch = torch_scores(open_original(manifest), reference, items, rules, _progress("torch"))
    gallery(reference, output / "gallery.png")
    result = summary(scores, speed, torch)
    write_json(dataclasses.asdict(result), output / "demo.json")
    print_table(result.title, result.header, result.rows)
    click.echo(f"report: {output / 'report.html'}, gallery: {output / 'gallery.png'}")


def _progress(label: str) -> Callable[[Iterable[Item]], Iterable[Item]]:
    """A progress bar on a terminal, silence elsewhere."""

    def track(items: Iterable[Item]) -> Iterable[Item]:
        from rich.console import Console
        from rich.progress import track as rich_track

        console = Console(stderr=True)
        return rich_track(items, label, console=console, disable=not console.is_terminal)

    return track


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table as the terminal's width allows."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        drawn.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    console = Console()
    console.print(drawn) if console.is_terminal else Console(width=120).print(drawn)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, RefedgeWarning):
        click.echo(f"warning: {message}", err=True)


if __name__ == "__main__":
    sys.exit(main())
