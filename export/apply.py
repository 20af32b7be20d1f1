"""Apply a plan to a bundle: one graph per part and dialect, into a new version of the folder.

Everything the bundle held stays, byte for byte. An earlier plan of the same name is replaced, in
all dialects that it had; the very same plan keeps those, and gets the new ones beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import onnx

from ..runtime.bundle import Bundle, open_bundle
from ..runtime.manifest import DialectSpec, Manifest
from ..runtime.plan import Plan, encode_plan, require_graph
from .bundle import BundleWriter
from .dialects import require_dialects, write_dialect
from .targets import require_target
from .weights import split_weights


def apply_plan(path: Path, plan: Plan, dialects: Sequence[str] = ("ort",)) -> Manifest:
    """Write a plan and its dialects into a bundle; returns the new manifest.

    dialects: those to write, besides what an earlier plan of that name had.

    Raises BundleError ``plan-graph`` for a plan of another graph, ExportError ``dialect-unknown``
    for a dialect that does not exist. The bundle is replaced as a whole, or not at all.
    """
    require_dialects(dialects)
    bundle = open_bundle(path)
    manifest = bundle.manifest
    encoded, before = encode_plan(plan), manifest.plans.get(plan.name)
    same = before is not None and bundle.file(before).read_bytes() == encoded
    kept = [
        d for d in manifest.dialects if d.plan != plan.name or (same and d.name not in dialects)
    ]
    held = [] if same else [d.name for d in manifest.dialects if d.plan == plan.name]
    wanted = dict.fromkeys((*dialects, *held))
    needed = {manifest.tokenizer.file, *(f for n, f in manifest.plans.items() if n != plan.name)}
    for dialect in (manifest.canonical, *kept):
        needed |= {*dialect.graphs.values(), *dialect.files}
    with BundleWriter(path) as writer:
        for name in sorted(needed):
            writer.copy(name, bundle.file(name), manifest.files[name])
        plan_file = f"plans/{plan.name}.json"
        writer.add(plan_file, encoded)
        added = [_add_dialect(writer, bundle, plan, name) for name in wanted]
        plans = {**manifest.plans, plan.name: plan_file}
        return writer.commit(replace(manifest, plans=plans, dialects=(*kept, *added)))


def _add_dialect(writer: BundleWriter, bundle: Bundle, plan: Plan, name: str) -> DialectSpec:
    """Write one dialect of the plan: a graph, its weights and perhaps a sidecar per part."""
    graphs, files, fused = {}, [], []
    for part, source in bundle.manifest.canonical.graphs.items():
        part_plan = require_graph(plan, part, bundle.file(source).read_bytes())
        model = onnx.load(bundle.file(source))
        written, sidecar, fusions = write_dialect(model, name, plan, part_plan)
        require_target(written, name)
        weights, content = split_weights(written)
        writer.add(f"graphs/{weights}", content)
        files.append(f"graphs/{weights}")
        graphs[part] = f"graphs/{part}.{name}.{plan.name}.onnx"
        writer.add(graphs[part], written.SerializeToString(deterministic=True))
        if sidecar:
            files.append(f"{graphs[part]}.layers.json")
            writer.add(files[-1], sidecar)
        fused += [{"part": part, **asdict(f)} for f in fusions]
    return DialectSpec(name, plan.name, graphs, tuple(files), tuple(fused))
