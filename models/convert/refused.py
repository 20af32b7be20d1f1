"""The errors of weight files, each naming the file."""

from __future__ import annotations

from pathlib import Path

from ...errors import CheckpointError

AGAIN = "fetch the file again from where it is published"


def damaged(path: Path, why: str) -> CheckpointError:
    """The file is cut short, changed, or of another format."""
    return CheckpointError("weights-damaged", f"{path} cannot be read", why=why, fix=AGAIN)


def runs_code(path: Path, why: str) -> CheckpointError:
    """The file is a program for more than tensors."""
    return CheckpointError(
        "weights-pickle",
        f"{path} holds more than weights",
        why=f"its pickle uses {why}; such a file could run code",
        fix="take the file from its own source, or save its state dict alone where you trust it",
    )


def other_layout(path: Path, why: str, fix: str) -> CheckpointError:
    """The file is whole, but it is not what was asked for."""
    return CheckpointError("weights-layout", f"{path} is of another layout", why=why, fix=fix)
