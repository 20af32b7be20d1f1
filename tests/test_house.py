"""The house keeps its rules: who imports whom, what a device must load, how long a module is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("benchmarks", "calibration", "data", "engines", "export", "models", "plugins", "runtime",
         "training")  # fmt: skip
# design: a room may import itself, errors, and these
MAY = {
    "plugins": set(),
    "runtime": {"plugins"},
    "engines": {"runtime", "plugins"},
    "data": {"runtime"},
    "models": {"plugins"},
    "export": {"models", "plugins", "runtime"},
    "calibration": {"export", "data", "runtime"},
    "training": {"models", "data", "calibration"},
    "benchmarks": {"runtime", "engines", "data", "models"},
}
HEAVY = ("torch", "transformers", "onnx", "onnxscript", "matplotlib", "safetensors")


def modules() -> list[Path]:
    found = [p for room in ROOMS for p in (ROOT / room).rglob("*.py")]
    return found + list(ROOT.glob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a module imports, at the top or inside functions."""
    here = ("refedge", *path.relative_to(ROOT).with_suffix("").parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            names = [".".join((*base, *([node.module] if node.module else [])))]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "refedge" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    if room in MAY:
        allowed = MAY[room] | {room, "errors"}
        assert imported_rooms(path) <= allowed


def test_the_arrow_test_sees_arrows() -> None:
    assert imported_rooms(ROOT / "export" / "parity.py") == {"errors", "models", "runtime"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_have_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    if path.name == "__init__.py" and path.parent != ROOT:
        assert path.read_text() == "", "package __init__ files import nothing"


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_refedge_loads_nothing() -> None:
    loaded = run_python("import refedge, sys; print(*sys.modules)").split()
    assert "numpy" not in loaded
    assert "PIL" not in loaded


def test_the_runtime_loads_nothing_heavy(bundle: Path) -> None:
    loaded = run_python(
        f"""
import sys, numpy as np, refedge
segmenter = refedge.load({str(bundle)!r})
segmenter.segment(np.zeros((50, 60, 3), np.uint8), "the red circle").overlay()
print(*sys.modules)
"""
    ).split()
    assert "onnxruntime" in loaded
    assert not [name for name in HEAVY if name in loaded]


def test_the_board_loads_nothing_heavy(bundle: Path) -> None:
    loaded = run_python(
        f"""
import sys
from click.testing import CliRunner
import refedge.engines.build, refedge.engines.part
from refedge.cli import main
for arguments in (
    ["doctor"],
    ["inspect", {str(bundle)!r}],
    ["build", {str(bundle)!r}, "--print-trtexec", "--target", "10.3"],
):
    assert CliRunner().invoke(main, arguments).exit_code == 0
print(*sys.modules)
"""
    ).split()
    assert not [name for name in (*HEAVY, "onnxruntime") if name in loaded]


def test_help_loads_nothing_heavy() -> None:
    loaded = run_python(
        """
import sys
from click.testing import CliRunner
from refedge.cli import main
assert CliRunner().invoke(main, ["--help"]).exit_code == 0
print(*sys.modules)
"""
    ).split()
    assert not [name for name in (*HEAVY, "numpy", "onnxruntime") if name in loaded]


def test_the_wheel_holds_every_room_and_no_test() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'^    "(refedge[\w.]*)",$', text, re.M))
    rooms = {p.parent for room in ROOMS for p in (ROOT / room).rglob("__init__.py")}
    assert listed == {"refedge"} | {
        ".".join(("refedge", *room.relative_to(ROOT).parts)) for room in rooms
    }


def test_public_names_are_there() -> None:
    import refedge

    for name in refedge.__all__:
        assert getattr(refedge, name) is not None
    with pytest.raises(AttributeError):
        _ = refedge.nothing
