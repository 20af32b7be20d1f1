"""Parity of paper-size networks, torch against their graphs: ``make parity``.

    python -m refedge.benchmarks.parity BUNDLE …

writes what the exporter measured, with the hashes of the graphs it was measured on, to
``benchmarks/results/parity-NAME.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..runtime.bundle import open_bundle
from ..runtime.files import write_json
from ..runtime.manifest import Manifest
from .device import describe

RESULTS = Path(__file__).parent / "results"


def record(manifest: Manifest) -> dict[str, Any]:
    """What a bundle says about its parity, with the hash of every graph that was compared."""
    dialects = {"canonical": manifest.canonical, **{d.name: d for d in manifest.dialects}}
    return {
        "schema": "refedge-parity-1",
        "model": manifest.model,
        "config": manifest.config,
        "bundle": manifest.digest,
        "checkpoint": manifest.provenance["checkpoint"],
        "packages": manifest.provenance["packages"],
        "graphs": {
            name: {part: manifest.files[file].sha256 for part, file in d.graphs.items()}
            for name, d in dialects.items()
        },
        "folding": manifest.folding,
        "parity": manifest.parity,
        "device": describe(),
    }


if __name__ == "__main__":
    for bundle in map(Path, sys.argv[1:]):
        write_json(record(open_bundle(bundle).manifest), RESULTS / f"parity-{bundle.stem}.json")
