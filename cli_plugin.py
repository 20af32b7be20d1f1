"""The verb ``refedge plugin``: the TensorRT plugins of the fused operators, on a board."""

from __future__ import annotations

import time
from pathlib import Path

import click


@click.group()
def plugin() -> None:
    """Compile the TensorRT plugins of the fused operators."""


@plugin.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=".",
    show_default=True,
    help="Folder.",
)
@click.option("--headers", type=click.Path(path_type=Path), help="Folder with NvInferRuntime.h.")
@click.option("--compiler", default="g++", show_default=True)
def build(output: Path, headers: Path | None, compiler: str) -> None:
    """Compile them with g++ and the system's TensorRT headers; no CUDA compiler is needed.

    The file's name holds its hash. Pass it to ``refedge build --plugin``.
    """
    from .plugins.native import build as run

    start = time.perf_counter()
    library = run(output, headers, compiler)
    click.echo(f"wrote {library} in {time.perf_counter() - start:.0f} s")
