"""What the documents say is true today: their snippets run, their commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from refedge.cli import main
from refedge.data.refshapes.dataset import DIGESTS, RefShapes
from refedge.data.refshapes.expressions import words
from refedge.data.refshapes.scene import DIFFICULTIES

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def commands(path: Path) -> list[str]:
    lines = [line for block in blocks(path, "sh") for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.startswith("refedge ")]


@pytest.fixture
def desk(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader of the README has it: a bundle and a photo."""
    (tmp_path / "slvit-tiny.refedge").symlink_to(bundle)
    Image.fromarray(RefShapes("val", size=300)[0].image).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_python_snippets_run(path: Path, desk: Path, quantized: Path) -> None:
    (desk / "slvit-tiny.refedge").unlink()
    (desk / "slvit-tiny.refedge").symlink_to(quantized)
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), {})  # the documents' own code


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_commands_exist_with_their_options(path: Path) -> None:
    for command in commands(path):
        verb, *arguments = shlex.split(command)[1:]
        context = main.make_context("refedge", [verb])
        found = main.get_command(context, verb)
        assert found is not None, command
        found.make_context(verb, arguments)  # raises on an unknown option


def test_readme_run_and_eval_work_as_written(desk: Path) -> None:
    shortened = {
        "run": [],
        "bench": ["--no-torch", "--rounds", "1"],
        "eval": ["--limit", "3"],
    }
    ran: set[str] = set()
    for command in commands(ROOT / "README.md"):
        verb, *arguments = shlex.split(command)[1:]
        if verb in shortened:
            result = CliRunner().invoke(main, [verb, *arguments, *shortened[verb]])
            assert result.exit_code == 0, result.output
            ran.add(verb)
    assert ran == set(shortened)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_files_that_are_named_are_there(path: Path) -> None:
    rooms = "runtime|data|models|export|calibration|engines|plugins|training|benchmarks|tests|docs"
    for name in re.findall(rf"`((?:{rooms})/[\w./-]+\.(?:py|md|json|cpp|h))`", path.read_text()):
        assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_make_targets_that_are_named_are_there() -> None:
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in DOCUMENTS:
        assert set(re.findall(r"`?make ([a-z]+)`", path.read_text())) <= targets
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_refshapes_numbers() -> None:
    text = (ROOT / "docs/refshapes.md").read_text()
    for digest in DIGESTS.values():
        assert f"`{digest[:8]}…`" in text
    lite, full = DIFFICULTIES["lite"], DIFFICULTIES["full"]
    rows = [f"{d.shapes}, {d.colours}, {d.patterns}" for d in (lite, full)]
    assert f"| {rows[0]} | {rows[1]} |" in text
    assert f"{len(words())} words" in (ROOT / "docs/errors.md").read_text()
