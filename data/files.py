"""A dataset's files: what is absent, damaged or out of bounds is a DataError that names it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from ..errors import DataError


def read_bytes(path: Path, fix: str) -> bytes:
    """The whole of a file; ``fix`` tells where it comes from."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise missing(path, fix) from error
    except OSError as error:
        raise corrupt(path, error.strerror or str(error), fix) from error


def parse_json(raw: bytes, kind: Any, name: Path | str) -> Any:
    """JSON of that kind; ``name`` says whose bytes these are."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (ValueError, RecursionError) as error:
        raise corrupt(name, str(error)) from error


def inside(root: Path, name: str, source: str) -> Path:
    """``root / name``, for a name that stays below the root; ``source`` says who wrote it.

    Links are followed: to link a folder of pictures into a dataset is usual.
    """
    parts = PurePosixPath(name).parts
    odd = "\\" in name or "\0" in name or ".." in parts
    if not parts or odd or PurePosixPath(name).is_absolute():
        raise DataError(
            "data-escape",
            f"{source} names the file {name!r}",
            why=f"a file's path is relative to {root} and stays below it",
            fix="put the file into that folder, and write its path with '/' and without '..'",
        )
    return root / name


def missing(path: Path, fix: str) -> DataError:
    """The error for a file or folder that is not there."""
    parent = next((p for p in path.parents if p.is_dir()), None)
    return DataError(
        "data-missing",
        f"there is no {path}",
        why=f"the last folder of it that exists is {parent}",
        fix=fix,
    )


def corrupt(name: Path | str, why: str, fix: str = "copy or download the file again") -> DataError:
    """The error for a file that cannot be parsed or contradicts itself."""
    return DataError("data-corrupt", f"{name} cannot be used", why=why, fix=fix)
