"""The command as a user meets it: what works, and one clear error for what does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from refedge.cli import main
from refedge.data.refshapes.dataset import RefShapes
from refedge.data.refshapes.expressions import words
from refedge.models.checkpoint import save_checkpoint
from refedge.models.seeded import seed_weights
from refedge.models.slvit import TINY, SLViT
from refedge.models.tokenizers import word_level


def refedge(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Result, code: str) -> None:
    """Exit code 2, one error of the family with its reason and remedy, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.output.count("error [") == 1
    assert f"error [{code}]" in result.output
    assert "\n  why: " in result.output
    assert "\n  fix: " in result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(RefShapes("val", size=150)[0].image).save(path)
    return path


def test_run_paints_an_overlay(bundle: Path, photo: Path) -> None:
    result = refedge("run", bundle, photo, "the red circle")
    assert result.exit_code == 0, result.output
    overlay = photo.with_name("photo.mask.png")
    assert Image.open(overlay).size == (150, 150)
    assert "'the red circle'" in result.output


def test_run_as_json(bundle: Path, photo: Path) -> None:
    result = refedge("run", bundle, photo, "the red circle", "leftmost thing", "--json")
    records = [json.loads(line) for line in result.output.splitlines()]
    assert [r["expression"] for r in records] == ["the red circle", "leftmost thing"]
    assert records[0]["rle"]["size"] == [150, 150]
    assert {"text", "mask", "preprocess"} <= set(records[0]["timings_ms"])
    assert sorted(p.name for p in photo.parent.iterdir()) == ["photo.png"]  # nothing was painted


def test_run_numbers_its_outputs(bundle: Path, photo: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    result = refedge("run", bundle, photo, "the red circle", "leftmost thing", "-o", output)
    assert result.exit_code == 0
    assert (tmp_path / "out.1.png").exists()
    assert (tmp_path / "out.2.png").exists()


def test_eval_prints_and_writes(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    result = refedge("eval", bundle, "--data", "refshapes:val", "--scenes", 4, "-o", output)
    assert result.exit_code == 0, result.output
    for family in ("attribute", "superlative", "extreme", "relation", "none", "all"):
        assert family in result.output
    record = json.loads(output.read_text())
    assert record["protocol"] == "refshapes"
    (plan,) = record["plans"]
    assert plan["overall"]["count"] == 16
    assert plan["overall"]["n_acc"] is not None
    assert len(plan["artefacts"]["mask"]) == 64


def test_quantize_eval_report(own_bundle: Path, tmp_path: Path) -> None:
    made = refedge(
        "quantize", own_bundle, "--data", "refshapes:calibration", "--samples", 4, "--spare", 0
    )
    assert made.exit_code == 0, made.output
    assert "in int8" in made.output
    scores, page = tmp_path / "scores.json", tmp_path / "report.html"
    result = refedge("eval", own_bundle, "--limit", 3, "-o", scores, "--report", page)
    assert result.exit_code == 0, result.output
    assert "against fp32" in result.output
    assert [p["plan"] for p in json.loads(scores.read_text())["plans"]] == ["fp32", "int8"]
    assert "int8" in page.read_text()
    same = refedge("compare", scores, scores)
    assert same.exit_code == 0, same.output


def test_what_quantize_refuses(bundle: Path) -> None:
    refused(refedge("quantize", bundle), "calibrate-data")
    calibrated = ("quantize", bundle, "--data", "refshapes:calibration")
    refused(refedge(*calibrated, "--samples", 0), "calibrate-samples")
    refused(refedge(*calibrated, "--method", "luck"), "calibrate-method")
    refused(refedge(*calibrated, "--spare", 1.5), "calibrate-spare")
    refused(refedge(*calibrated, "--dialect", "ptx"), "dialect-unknown")
    refused(refedge(*calibrated, "--plan", "fp32"), "calibrate-plan")
    refused(refedge(*calibrated, "--plan", "../../x"), "calibrate-plan")
    refused(refedge(*calibrated, "--rest", "int8"), "calibrate-rest")
    refused(refedge("quantize", bundle, "--data", "refshapes:test"), "calibrate-split")
    refused(refedge("quantize", bundle, "--data", "refcoco:train"), "data-root")


def test_a_damaged_plan(quantized: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(quantized, tmp_path / "copy.refedge"))
    plan = copy / "plans" / "int8.json"
    plan.write_bytes(plan.read_bytes()[:-20])
    refused(refedge("eval", copy, "--limit", 1), "bundle-damaged")


def test_a_malicious_pickle(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "refcoco"
    folder.mkdir()
    (folder / "refs(unc).p").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    (folder / "instances.json").write_text("{}")
    refused(refedge("eval", bundle, "--data", "refcoco:val", "--root", tmp_path), "data-pickle")


def test_results_that_are_cut_short(bundle: Path, tmp_path: Path) -> None:
    cut = tmp_path / "bench.json"
    cut.write_text('{"schema": "refedge-bench-1", "model"')
    refused(refedge("compare", cut, cut), "result-damaged")
    refused(refedge("eval", bundle, "--limit", 1, "--bench", cut), "result-damaged")


@pytest.mark.parametrize(
    ("expression", "code"),
    [
        ("", "expression-empty"),
        ("  ", "expression-empty"),
        ("the zebra", "expression-unknown-words"),
    ],
)
def test_expressions_that_mean_nothing(
    bundle: Path, photo: Path, expression: str, code: str
) -> None:
    refused(refedge("run", bundle, photo, expression), code)
    assert [p.name for p in photo.parent.iterdir()] == ["photo.png"]


def test_a_long_expression_is_cut_with_a_warning(bundle: Path, photo: Path) -> None:
    result = refedge("run", bundle, photo, "the red circle " * 9, "--json")
    assert result.exit_code == 0
    assert "warning: the expression was cut from 27 to 20 tokens" in result.stderr


def test_pictures_that_are_none(bundle: Path, tmp_path: Path) -> None:
    refused(refedge("run", bundle, tmp_path / "no.png", "the red circle"), "image-missing")
    (tmp_path / "text.png").write_text("hello")
    refused(refedge("run", bundle, tmp_path / "text.png", "the red circle"), "image-unreadable")
    assert [p.name for p in tmp_path.iterdir()] == ["text.png"]


def test_an_output_that_cannot_be_written(bundle: Path, photo: Path, tmp_path: Path) -> None:
    output = tmp_path / "no" / "such" / "folder.png"
    refused(refedge("run", bundle, photo, "the red circle", "-o", output), "output-unwritable")


def test_a_bundle_with_a_changed_byte(own_bundle: Path, photo: Path) -> None:
    weights = next(own_bundle.rglob("*.weights"))
    raw = bytearray(weights.read_bytes())
    raw[100] ^= 1
    weights.write_bytes(raw)
    refused(refedge("run", own_bundle, photo, "the red circle"), "bundle-damaged")
    refused(refedge("eval", own_bundle), "bundle-damaged")


def test_what_is_no_bundle(tmp_path: Path, photo: Path) -> None:
    refused(refedge("run", tmp_path, photo, "the red circle"), "bundle-missing")
    refused(refedge("eval", tmp_path / "none"), "bundle-missing")


def test_data_and_protocols_that_do_not_exist(bundle: Path) -> None:
    refused(refedge("eval", bundle, "--data", "refshapes:dev"), "data-unknown")
    refused(refedge("eval", bundle, "--data", "coco:val"), "data-unknown")
    refused(refedge("eval", bundle, "--protocol", "mine"), "protocol-unknown")
    refused(refedge("eval", bundle, "--scenes", 0), "data-empty")
    refused(refedge("eval", bundle, "--plan", "int2"), "plan-missing")


def test_a_wrong_checkpoint_for_the_model(tmp_path: Path) -> None:
    model = seed_weights(SLViT(TINY), 0)
    folder = save_checkpoint(tmp_path / "own", "slvit", model, word_level(words()), training={})
    card = json.loads((folder / "card.json").read_text())
    card["config"]["head_width"] = 64
    (folder / "card.json").write_text(json.dumps(card))
    target = tmp_path / "own.refedge"
    refused(refedge("export", folder, "-o", target), "checkpoint-mismatch")
    refused(refedge("export", "no-such-model", "-o", target), "checkpoint-missing")
    weights = folder / "model.safetensors"
    refused(
        refedge("export", "slvit:paper", "--weights", weights, "-o", target), "checkpoint-mismatch"
    )
    assert not target.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]


def test_a_target_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    refused(refedge("export", "slvit-tiny", "-o", tmp_path / "thesis"), "bundle-target")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [n for n in sys.modules if n.startswith("refedge.export")]:
        monkeypatch.delitem(sys.modules, name)
    result = refedge("export", "slvit-tiny")
    assert result.exit_code == 2
    assert "package-missing" in result.output
    assert "pip install torch transformers" in result.output


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_bench_and_eval_take_a_backend(backend: str, bundle: Path) -> None:
    bench = ["bench", bundle, "--no-torch", "--rounds", "1", "--backend", backend]
    evaluate = ["eval", bundle, "--limit", "1", "--backend", backend]
    if backend == "tensorrt":
        refused(refedge(*bench), "backend-missing")
        refused(refedge(*bench, "--expressions", "2"), "backend-missing")
        return
    assert refedge(*bench).exit_code == 0
    assert refedge(*evaluate).exit_code == 0


def test_folders_that_cannot_be_made(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(refedge("export", bundle, "--triton", tmp_path / "file" / "r"), "output-unwritable")


def test_the_installed_command_answers() -> None:
    command = [sys.executable, "-m", "refedge.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0.1.0" in done.stdout


def test_a_real_process_ends_with_two(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "refedge.cli", "run", str(tmp_path), "x.png", "the red circle"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error [bundle-missing]")
    assert len(done.stderr.splitlines()) == 3
