"""Files of results: which kind one is, and its contents, validated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..data.files import read_bytes
from ..errors import DataError


@dataclass(frozen=True)
class _Head:
    schema: str


def read_result(path: Path, *schemas: str) -> tuple[str, bytes]:
    """Schema and bytes of a result, which must be of one of these schemas."""
    raw = read_bytes(path, "write one with `refedge bench -o` or `refedge eval -o`")
    schema: str = decode_result(raw, _Head, path).schema
    if schema not in schemas:
        raise DataError(
            "result-kind",
            f"{path} holds {schema!r}",
            why=f"{' or '.join(schemas)} is needed",
            fix="give a result of the right verb, written by this generation of refedge",
        )
    return schema, raw


def decode_result(raw: bytes, kind: Any, path: Path) -> Any:
    """JSON of that kind."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, why: str) -> DataError:
    """The error for a file that is no result, or not a whole one."""
    return DataError(
        "result-damaged",
        f"{path} cannot be read as a result",
        why=why,
        fix="copy it again, or measure again with `refedge bench -o` or `refedge eval -o`",
    )
