"""docs/runtime.md on Polygraphy: its commands do what is said there, each a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from PIL import Image
from refedge.data.refshapes.dataset import RefShapes

from .test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "runtime.md"
COMMANDS = [
    line
    for block in blocks(PAGE, "sh")
    for line in block.splitlines()
    if line.startswith("polygraphy ")
]


@pytest.fixture(scope="module")
def desk(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, a photo, and the inputs that the page's own snippet writes."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "slvit-tiny.refedge").symlink_to(quantized)
    Image.fromarray(RefShapes("val", size=300)[0].image).save(folder / "photo.png")
    (snippet,) = [b for b in blocks(PAGE, "python") if "polygraphy" in b]
    # as in an environment without torch, which Polygraphy would import and not use
    (folder / "sitecustomize.py").write_text('import sys\n\nsys.modules["torch"] = None\n')
    done = run([sys.executable, "-c", snippet], folder)
    assert done.returncode == 0, done.stderr
    return folder


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(folder), *(p for p in sys.path if p)]
    known = {k: v for k, v in os.environ.items() if not k.startswith("POLYGRAPHY_")}
    known["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.run(
        command, cwd=folder, env=known, capture_output=True, text=True, timeout=300, check=False
    )


def polygraphy(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = "from polygraphy.tools import main; import sys; sys.exit(main())"
    return run([sys.executable, "-c", script, *shlex.split(line)[1:]], folder)


def test_the_commands_of_the_page(desk: Path) -> None:
    said = {}
    for line in COMMANDS:
        done = polygraphy(line, desk)
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        assert "could not be imported" not in done.stdout + done.stderr
        said[line] = done.stdout
    assert "pixels [dtype=uint8, shape=('batch', 96, 96, 3)]" in said[COMMANDS[0]]
    compared = [text for line, text in said.items() if "--load-outputs" in line]
    assert len(compared) == 2
    assert all("Passed: 1/1 iterations" in text for text in compared)
    assert (desk / "text.json").is_file()
    whole, folded = (onnx.load(desk / f) for f in ("slvit-tiny.refedge/graphs/mask.onnx",
                                                   "folded.onnx"))  # fmt: skip
    assert [o.name for o in folded.graph.output] == [o.name for o in whole.graph.output]
    assert [o.name for o in onnx.load(desk / "keys_4.onnx").graph.output] == ["keys_4"]


def test_a_difference_is_found(desk: Path) -> None:
    (save,) = [line for line in COMMANDS if "--save-outputs" in line]
    if not (desk / "fp32.json").exists():
        assert polygraphy(save, desk).returncode == 0
    other = save.replace("mask.onnx", "mask.trt10.int8.onnx").replace("--save-", "--load-")
    done = polygraphy(other, desk)  # int8, with Polygraphy's own 1e-5
    assert done.returncode == 1
    assert "Passed: 0/1 iterations" in done.stdout + done.stderr
