"""The verbs of ``refedge`` on the board: build engines, inspect a bundle, look at the machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from .errors import InputError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--plan", default="fp32", show_default=True, help="fp32, fp16, int8.")
@click.option(
    "--target", default="", help="Refuse other machines; for trtexec: TensorRT's version."
)
@click.option("--workspace", type=click.IntRange(min=1), help="MiB that a layer may use.")
@click.option("--level", type=click.IntRange(0, 5), help="Builder optimisation level.")
@click.option("--batches", type=click.Path(path_type=Path), help="JSON of the batches seen.")
@click.option("--plugin", "plugins", multiple=True, type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Ahead-of-time plugins; TensorRT 10.9 and later.")
@click.option("--hardware", type=click.Choice(["ampere+", "same-cc"]), help="Run on other GPUs.")
@click.option("--versions", is_flag=True, help="Run on later TensorRT of this major version.")
@click.option("--refit", is_flag=True, help="Weights can be replaced.")
@click.option("--strip", is_flag=True, help="Leave the weights out; a build without it fills in.")
@click.option("--race/--no-race", default=True, help="With plugins: time them against none.")
@click.option("--inspect/--no-inspect", default=True, help="Hold engines against the plan.")
@click.option("--print-trtexec", is_flag=True, help="Print trtexec's lines instead of building.")
def build(
    bundle: Path,
    plan: str,
    target: str,
    workspace: int | None,
    level: int | None,
    batches: Path | None,
    plugins: tuple[Path, ...],
    quick: bool,
    hardware: str | None,
    versions: bool,
    refit: bool,
    strip: bool,
    race: bool,
    inspect: bool,
    print_trtexec: bool,
) -> None:
    """Build TensorRT engines of a plan of BUNDLE, here, for here; run again to go on."""
    from .engines.part import Options

    options = Options(workspace, level, hardware, versions, refit, strip, quick)
    if print_trtexec:
        from .engines.trtexec import trtexec_lines

        for line in trtexec_lines(
            bundle, plan, _version(target), options=options, plugins=plugins, batches=batches
        ):
            click.echo(line)
        return
    from .engines.build import build as run

    record = run(
        bundle,
        plan,
        options=options,
        plugins=plugins,
        batches=batches,
        target=target,
        inspect=inspect,
        race=race,
        say=click.echo,
    )
    size = sum(spec.bytes for spec in record.parts.values()) / 1e6
    click.echo(f"{bundle.name} has engines of {plan} for {record.target.name} ({size:.1f} MB)")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="All of it, for programs.")
def inspect(bundle: Path, as_json: bool) -> None:
    """Tell what BUNDLE holds: parts, plans, dialects, engines and what they run in."""
    from .engines.inspect import inspect_bundle, lines

    found = inspect_bundle(bundle)
    click.echo(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="All of it, for programs.")
def doctor(as_json: bool) -> None:
    """Tell what this machine has for refedge, what it lacks, and how to mend it."""
    from .engines.doctor import doctor as run

    checks = run()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
        return
    for check in checks:
        click.echo(f"{check.state:8}{check.name:12} {check.found}")
        if check.fix:
            click.echo(f"{'':21}-> {check.fix}")


def _version(target: str) -> str:
    """TensorRT's version for trtexec's lines: as asked for, or this machine's."""
    if not target:
        from .runtime.backends.bindings import open_tensorrt

        return str(open_tensorrt().__version__)
    if not target[:1].isdigit():
        raise InputError(
            "engine-version",
            f"{target!r} is no version of TensorRT",
            why="trtexec's options differ from version to version",
            fix="give one, for example --target 10.3",
        )
    return target
