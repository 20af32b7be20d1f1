"""What a bundle holds, and what its engines are: ``refedge inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import EngineError, RefedgeError
from ..runtime.backends.bindings import open_tensorrt
from ..runtime.backends.cuda import target_for
from ..runtime.bundle import Bundle, open_bundle
from ..runtime.engine import FOLDER, RECORD, EngineSet, Target, decode_engines
from ..runtime.manifest import PartSpec, TensorSpec


def inspect_bundle(path: str | Path) -> dict[str, Any]:
    """Everything as plain data; raises BundleError for a bundle that is not whole.

    An engine record that cannot be read is listed with what is wrong with it.
    """
    bundle = open_bundle(path)
    manifest = bundle.manifest
    try:
        here: Target | None = target_for(open_tensorrt().__version__)
    except RefedgeError:
        here = None
    return {
        "bundle": bundle.path.name,
        "model": manifest.model,
        "digest": manifest.digest,
        "trained": bool(manifest.provenance.get("trained")),
        "parts": [_part(part) for part in manifest.parts],
        "plans": ["fp32", *manifest.plans],
        "dialects": [
            {
                "name": d.name,
                "plan": d.plan,
                "bytes": _bytes(bundle, [*d.graphs.values(), *d.files]),
            }
            for d in manifest.dialects
        ],
        "engines": [
            _engines(record, here) for record in sorted(bundle.path.glob(f"{FOLDER}/*/*/{RECORD}"))
        ],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    trained = "trained" if found["trained"] else "seeded"
    out = [f"{found['bundle']}: {found['model']}, {trained} weights, plans {_join(found['plans'])}"]
    for part in found["parts"]:
        least, usual, largest = part["profile"]
        out.append(f"part {part['name']}: batch {least} to {largest}, usually {usual}")
        out += [f"  {side} {t}" for side in ("in ", "out") for t in part[side.strip()]]
    out += [
        f"dialect {d['name']}, plan {d['plan']}: {d['bytes'] / 1e6:.2f} MB"
        for d in found["dialects"]
    ]
    for engines in found["engines"]:
        out.append(f"engines {engines['target']}, plan {engines['plan']}: {engines['runs']}")
        for name, part in engines["parts"].items():
            sizes = f"{part['bytes'] / 1e6:.2f} MB, {part['memory'] / 1e6:.1f} MB a context"
            out.append(f"  {name}: {sizes}, batch {' / '.join(str(n) for n in part['profile'])}")
            if part["timed"]:
                out.append(f"    timed: {_join(part['timed'])}")
            if part["stripped"]:
                out.append("    without weights; refedge build without --strip puts them in")
            out += [f"    {line}" for line in _layers(part["layers"])]
    if not found["engines"]:
        out.append("engines: none; refedge build makes them on the machine that runs them")
    return out


def _layers(layers: dict[str, Any]) -> list[str]:
    if not layers.get("layers"):
        return ["not inspected"]
    counts = _join(f"{n} in {kind}" for kind, n in layers["precision"].items())
    out = [f"{layers['layers']} layers; convolutions and products: {counts or 'none visible'}"]
    if layers["opaque"]:
        out.append(f"opaque: {_join(layers['opaque'][:8])}{' …' * (len(layers['opaque']) > 8)}")
    if layers["plugins"]:
        out.append(f"plugins: {_join(layers['plugins'])}")
    return out + [f"against the plan: {finding}" for finding in layers["findings"]]


def _part(part: PartSpec) -> dict[str, Any]:
    return {
        "name": part.name,
        "profile": part.profile,
        "in": [_tensor(t) for t in part.inputs],
        "out": [_tensor(t) for t in part.outputs],
    }


def _tensor(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype} [{_join(tensor.shape)}]"


def _bytes(bundle: Bundle, names: list[str]) -> int:
    return sum(bundle.manifest.files[name].bytes for name in names)


def _engines(file: Path, here: Target | None) -> dict[str, Any]:
    folder = file.parent
    try:
        record = decode_engines(file.read_bytes())
    except EngineError as error:
        found = {"target": folder.parent.name, "plan": folder.name, "parts": {}, "flags": {}}
        return {**found, "runs": f"damaged, {error.why}"}
    return {
        "target": record.target.name,
        "plan": record.plan,
        "runs": _runs(record, folder, here),
        "flags": record.flags,
        "parts": {
            name: {
                "bytes": spec.bytes,
                "memory": spec.memory,
                "profile": spec.profile,
                "layers": spec.layers,
                "stripped": spec.stripped,
                "timed": [
                    (
                        f"{t.dialect}, not timed"
                        if t.milliseconds is None
                        else f"{t.milliseconds:.3f} ms as {t.dialect}"
                    )
                    + " (this one)" * (t.graph == spec.graph)
                    for t in spec.timed
                ],
            }
            for name, spec in record.parts.items()
        },
    }


def _runs(record: EngineSet, folder: Path, here: Target | None) -> str:
    missing = [s.file for s in record.parts.values() if not (folder / s.file).is_file()]
    if missing:
        return f"{_join(missing)} missing"
    if here is None:
        return "no TensorRT with a GPU here to run them"
    differences = record.target.differences(here)
    return f"for another machine: {_join(differences)}" if differences else "built for this machine"


def _join(items: Any) -> str:
    return ", ".join(str(item) for item in items)
