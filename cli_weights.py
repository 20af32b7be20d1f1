"""The verb of ``refedge`` on other people's weights."""

from __future__ import annotations

from pathlib import Path

import click

from .errors import InputError


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
