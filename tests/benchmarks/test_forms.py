"""Both forms of every pair compute the same; times are not tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from refedge.benchmarks import forms


@pytest.mark.parametrize(
    ("pair", "bar"),
    [
        (forms.gelu(3, 5, 7), 0.0),
        (forms.upsampling(3, (2, 3), 12), 1e-5),
        (forms.picture(8), 0.0),
        (forms.affine(3, 5, 7), 1e-6),
        (forms.branch(4, 9, 5, 7), 1e-5),
    ],
)
def test_both_forms_compute_the_same(pair: forms.Pair, bar: float) -> None:
    (row,) = forms.measure((pair,), 1)
    assert row["differ"] <= bar
    assert [*row["ms"]] == [*pair.forms]
    assert all(t["cpu"]["median"] > 0 for t in row["ms"].values())


def test_the_command_writes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = forms.affine(3, 5, 7)
    for name in ("upsampling", "picture", "affine", "branch", "gelu"):
        monkeypatch.setattr(forms, name, lambda *_: small)
    path = tmp_path / "forms.json"
    result = CliRunner().invoke(forms.main, ["-o", str(path), "--rounds", "1"])
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    assert record["schema"] == "refedge-forms-1"
    assert {row["name"] for row in record["rows"]} == {small.name}
    assert "one pass" in result.output
