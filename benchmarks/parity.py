"""Parity of paper-size networks, torch against their graphs: ``make parity``.

    python -m refedge.benchmarks.parity [MODEL …]

exports each configuration with seeded weights and writes what the exporter measured, with the
hashes of the graphs it was measured on, to ``benchmarks/results/parity-MODEL.json``. Minutes and
up to 12 GB each: a bundle is removed again once its record is written.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..runtime.files import write_json
from ..runtime.manifest import Manifest
from .device import describe

RESULTS = Path(__file__).parent / "results"


def record(manifest: Manifest, parameters: int) -> dict[str, Any]:
    """What a bundle says about its parity, with the hash of every graph that was compared."""
    dialects = {"canonical": manifest.canonical, **{d.name: d for d in manifest.dialects}}
    return {
        "schema": "refedge-parity-1",
        "model": manifest.model,
        "config": manifest.config,
        "parameters": parameters,
        "bundle": manifest.digest,
        "checkpoint": manifest.provenance["checkpoint"],
        "packages": manifest.provenance["packages"],
        "graphs": {
            name: {part: manifest.files[file].sha256 for part, file in d.graphs.items()}
            for name, d in dialects.items()
        },
        "parity": manifest.parity,
        "device": describe(),
    }


def measure(names: Iterable[str], results: Path, say: Callable[[str], None] = print) -> None:
    """Export each configuration, for example ``lts:paper``, and write its record."""
    from ..data.refshapes.expressions import words
    from ..export.export import export
    from ..models.checkpoint import open_model

    for name in names:
        say(name)
        loaded = open_model(name, words())
        parameters = sum(p.numel() for p in loaded.model.parameters())
        folder = Path(tempfile.mkdtemp(prefix="parity-"))
        try:
            manifest = export(loaded, folder / "x.refedge", say=say)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        path = results / f"parity-{name.replace(':', '-')}.json"
        write_json(record(manifest, parameters), path)


if __name__ == "__main__":
    from ..models.families import families

    measure(sys.argv[1:] or [f"{name}:paper" for name in families()], RESULTS)
