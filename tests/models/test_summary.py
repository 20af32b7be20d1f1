from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from refedge.benchmarks.timing import PARTS
from refedge.cli import main
from refedge.models.families import configurations
from refedge.models.summary import summary


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),
    [
        # specs: 48.97 M - 2.48 M dead + BERT 108.89 M; 58.6 GMAC without BERT
        ("slvit", 155.39, {"mask": 58.7}),
        # specs: Darknet-53 has 40.6 M
        ("lts", 73.27, {"image": 28.1}),
        ("m3att", 212.18, {"image": 76.3}),
        # specs: ViT 91, decoder 12 + projector 26 + neck 4
        ("cm_masksd", 172.84, {"image": 92.6, "mask": 42.2}),
        # specs: 4.6 for the loop, 70 + 36 + 9 + 3.6 for the picture
        ("step", 81.15, {"image": 118.0, "mask": 4.62}),
        ("lavt", 225.64, {"mask": 185.0}),
    ],
)
def test_paper_sizes(name: str, millions: float, gmacs: dict[str, float]) -> None:
    found = summary(name, "paper")
    assert found.parameters / 1e6 == pytest.approx(millions, rel=1e-3)
    for part, macs in gmacs.items():
        assert found.macs[part] / 1e9 == pytest.approx(macs, rel=5e-3)
    assert found.cross_attention
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    parts = (f"{found.macs[p] / 1e9:.2f}" if p in found.macs else "-" for p in PARTS)
    row = (f"`{name}:paper`", str(found.size), f"{found.parameters / 1e6:.2f} M", *parts)
    assert f"| {' | '.join(row)} | " in page


def test_the_verb_lists_every_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(CliRunner().invoke(main, ["models", "--json"]).output)
    assert [row["name"] for row in rows] == configurations()
    shipped = {row["name"]: row["checkpoints"] for row in rows}
    assert shipped["slvit:tiny"] == ["slvit-tiny"]
    monkeypatch.setattr("refedge.models.summary.summaries", lambda: [summary("slvit", "tiny")])
    text = CliRunner().invoke(main, ["models"]).output
    assert "slvit:tiny: 96 px, 0.73 M parameters" in text
    assert "stage 3: 3 × 36 pixels × 20 words, 1 × 72" in text
    assert "checkpoints: slvit-tiny" in text
