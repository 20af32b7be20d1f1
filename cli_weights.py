"""The verbs of ``refedge`` about models: list, train, convert the weights of others, export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from .errors import InputError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", default="slvit:tiny", show_default=True, help="Model and configuration.")
@click.option("--size", type=int, help="Pixels per side, a multiple of 32.")
@click.option("--difficulty", default="lite", show_default=True)
@click.option("--steps", type=int, default=7000, show_default=True)
@click.option("--rate", type=float, default=3e-3, show_default=True, help="Highest learning rate.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--bf16", is_flag=True, help="Autocast to bfloat16.")
@click.option("--workers", type=int, default=0, help="Processes that make batches.")
@click.option("--threads", type=int, help="Threads of torch.")
@click.option("--every", type=int, default=500, show_default=True, help="Steps between scores.")
def train(
    folder: Path,
    model: str,
    size: int | None,
    difficulty: str,
    steps: int,
    rate: float,
    seed: int,
    device: str,
    bf16: bool,
    workers: int,
    threads: int | None,
    every: int,
) -> None:
    """Train a model on RefShapes into FOLDER; run again to go on where it stopped."""
    import torch

    from .models.checkpoint import configuration_named
    from .training.recipe import Recipe
    from .training.train import train as run

    if threads is not None:
        torch.set_num_threads(threads)
    recipe = Recipe(difficulty=difficulty, steps=steps, rate=rate, seed=seed, bfloat16=bf16)
    name, _, configuration = model.partition(":")
    config = configuration_named(name, configuration or "tiny", size)
    run(name, config, recipe, folder, device=device, workers=workers, every=every, say=click.echo)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="All of it, for programs.")
def models(as_json: bool) -> None:
    """List the models: parameters, work per part, where words and pixels meet, checkpoints."""
    from .models.summary import summaries

    found = summaries()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(s) for s in found], indent=1))
        return
    for s in found:
        work = ", ".join(f"{part} {macs / 1e9:.3g}" for part, macs in s.macs.items())
        click.echo(f"{s.name}: {s.size} px, {s.parameters / 1e6:.2f} M parameters; GMACs: {work}")
        for a in s.cross_attention:
            click.echo(
                f"  {a.name}: {a.calls} × {a.pixels} pixels × {a.words} words, "
                f"{a.heads} × {a.width}"
            )
        if s.checkpoints:
            click.echo(f"  checkpoints: {', '.join(s.checkpoints)}")


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="LAYOUT FILE [LAYOUT FILE]...")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--model", help="Such as slvit, or lts:paper; default: that of the first layout.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder with the vocabulary.")
@click.option(
    "--words", type=click.Path(path_type=Path), help="For glove: a file with a word per line."
)
@click.option("--seed", type=int, default=0, show_default=True, help="For what no file gives.")
def convert(
    files: tuple[str, ...],
    output: Path,
    model: str | None,
    tokenizer: Path | None,
    words: Path | None,
    seed: int,
) -> None:
    """Make a checkpoint folder of public weight files, none of which is executed.

    LAYOUT is slvit, lavt, bert, clip, mscan, swin, darknet, deeplab or glove; docs/weights.md says
    which file is which. What no file gives is seeded, and the card says so.
    """
    from .data.refshapes.expressions import words as shape_words
    from .models.convert.convert import convert as run

    if len(files) % 2:
        raise InputError(
            "convert-layout",
            f"{files[-1]} has no layout before it, or no file behind it",
            why="layouts and files come in turn",
            fix="write, for example: refedge convert mscan mscan_b.pth bert bert-base-uncased",
        )
    record = run(
        [(layout, Path(file)) for layout, file in zip(files[::2], files[1::2], strict=True)],
        output,
        model=model,
        words=None if words is None else _lines(words),
        spare_words=shape_words(),
        tokenizer=tokenizer,
        seed=seed,
        say=click.echo,
    )
    for part in record["converted"]:
        modules = ", ".join(part["modules"])
        click.echo(f"{part['layout']}: {part['tensors']} tensors of {modules}")
    seeded = ", ".join(f"{name} ({count:,})" for name, count in record["seeded"].items())
    click.echo(f"seeded: {seeded or 'nothing'}")
    click.echo(f"wrote {output}")


@click.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle to write.")
@click.option("--size", type=int, help="Pixels per side, a multiple of 32.")
@click.option("--weights", type=click.Path(path_type=Path), help="safetensors in official layout.")
@click.option("--seed", type=int, default=0, help="Of the weights of a configuration.")
@click.option("--fold/--no-fold", default=True, help="Apply rewrites that pay; or none.")
@click.option("--rewrite", "chosen", multiple=True, help="Of these alone: norm, heads, ….",
              type=click.Choice(("norm", "heads", "squeeze", "ort")))  # fmt: skip
@click.option("--parity/--no-parity", default=True, help="Compare the graphs with torch.")
@click.option("--triton", type=click.Path(path_type=Path), help="MODEL is a bundle: serve it.")
@click.option("--plan", default="fp32", show_default=True, help="Of --triton.")
@click.option("--engines", help="Of --triton: a folder below engines/, in place of ONNX.")
def export(
    model: str,
    output: Path | None,
    size: int | None,
    weights: Path | None,
    seed: int,
    fold: bool,
    chosen: tuple[str, ...],
    parity: bool,
    triton: Path | None,
    plan: str,
    engines: str | None,
) -> None:
    """Export MODEL to a bundle and measure its parity; or a bundle to a Triton model repository.

    MODEL is a shipped checkpoint (slvit-tiny, or slvit alone), a folder that `refedge train`
    wrote, or a configuration (slvit:paper), whose weights are seeded unless --weights is given.
    With --triton FOLDER it is a bundle, whose plan is written as a repository of the Triton
    Inference Server.
    """
    if triton is not None:
        from .export.triton import write_repository
        from .runtime.bundle import open_bundle

        names = write_repository(open_bundle(model), plan, triton, engines=engines)
        click.echo(f"wrote {triton}: {', '.join(names)}")
        return
    from .cli import print_table
    from .data.refshapes.expressions import words
    from .export.export import REWRITES
    from .export.export import export as run
    from .models.checkpoint import open_model

    loaded = open_model(model, words(), size=size, weights=weights, seed=seed)
    target = output or Path(f"{Path(model.replace(':', '-')).name}.refedge")
    rewrites = (chosen or REWRITES) if fold else ()
    manifest = run(loaded, target, say=click.echo, rewrites=rewrites, compared=parity)
    if manifest.folding:
        done = sum(f["folded"] for f in manifest.folding)
        click.echo(f"folded {done} of {len(manifest.folding)} blocks of attention to words")
    rows = [
        [run, f"{r['end_to_end']['sigma']:.1e}", f"{r['end_to_end']['iou']:.5f}"]
        for run, r in manifest.parity.get("runs", {}).items()
    ]
    if rows:
        print_table("parity with torch", ("graph", "logits, σ", "mask IoU"), rows)
    size_mb = sum(f.bytes for f in manifest.files.values()) / 1e6
    click.echo(f"wrote {target} ({size_mb:.1f} MB)")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "weights-missing",
            f"{path} cannot be read",
            why=str(error),
            fix="give a text file with a word per line",
        ) from error
