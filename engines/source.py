"""What an engine is built from: the dialect's graphs, the plan's precisions, the shapes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..errors import BundleError, InputError, RefedgeWarning
from ..runtime.bundle import Bundle
from ..runtime.manifest import DialectSpec, Manifest, PartSpec
from ..runtime.plan import PartPlan, decode_plan
from .layers import Wanted
from .part import Shapes

Profile = tuple[int, int, int]


@dataclass(frozen=True)
class Source:
    """The graphs of a plan in the dialect of a TensorRT, and what each node should run in."""

    bundle: Bundle
    dialect: DialectSpec
    rest: str
    parts: Mapping[str, PartPlan]

    def fuses(self, part: str) -> bool:
        """Whether a part's graph has nodes for plugins."""
        return any(f["operator"] and f.get("part", part) == part for f in self.dialect.fused)

    def int8(self, part: str) -> tuple[str, ...]:
        """Nodes that compute in integers."""
        return self.parts[part].int8 if part in self.parts else ()

    def pinned(self, part: str) -> tuple[str, ...]:
        """Nodes that a TensorRT which chooses types must keep in float32: the sidecar's."""
        name = f"{self.dialect.graphs[part]}.layers.json"
        if self.rest == "fp32" or name not in self.dialect.files:
            return ()
        record: dict[str, Any] = msgspec.json.decode(self.bundle.file(name).read_bytes())
        return tuple(record["float32"])

    def wanted(self, part: str) -> Wanted:
        """What the plan says of a part."""
        typed = not self.dialect.name.startswith("trt8")
        high = self.parts[part].high if part in self.parts else ()
        return Wanted(frozenset(self.int8(part)), frozenset(high), self.rest, typed)


def source_of(bundle: Bundle, plan: str, dialect: str, *, fused: str = "") -> Source:
    """Graphs for a TensorRT; raises BundleError ``plan-missing`` with the command that mends it.

    fp32 needs no dialect of its own: strongly typed TensorRT reads the canonical graphs, and 8.6
    those of the fp16 plan (``Bundle.dialect``). fused: ``plugin`` or ``quick``, for graphs with
    nodes for such plugins, where the bundle has them.
    """
    manifest = bundle.manifest
    names = ["canonical"] if (dialect, plan) == ("trt10", "fp32") else [dialect]
    names = [f"{dialect}-{fused}", *names] if fused else names
    try:
        found = bundle.dialect(names, plan)
    except BundleError as error:
        written = "fp16" if plan == "fp32" else plan
        new = plan == "int8" and plan not in manifest.plans
        data = " --data refshapes:calibration" if new else ""
        words = f"--dialect ort --dialect {dialect}"
        command = f"refedge quantize {bundle.path.name} --plan {written}{data} {words}"
        raise BundleError(
            error.code,
            error.what,
            why=error.why,
            fix=f"where onnx is installed: {command}",
        ) from error
    if fused and found.name != f"{dialect}-{fused}":
        message = (
            f"{bundle.path.name} has no graphs of {plan} with nodes for refedge's plugins; "
            f"`refedge quantize` with --dialect {dialect}-{fused} writes them for fp16 and int8"
        )
        warnings.warn(message, RefedgeWarning, stacklevel=3)
    if plan == "fp32":
        return Source(bundle, found, "fp32", {})
    made = decode_plan(bundle.file(manifest.plans[plan]).read_bytes())
    return Source(bundle, found, made.rest, made.parts)


def profile_of(part: PartSpec, batches: Path | None) -> Profile:
    """Least, usual and largest batch: the manifest's, or those that were seen."""
    least, _, largest = part.profile
    seen = {} if batches is None else _seen(batches).get(part.name, {})
    if not seen:
        return part.profile
    if min(seen) < least or max(seen) > largest:
        raise InputError(
            "engine-batches",
            f"batches of {min(seen)} to {max(seen)} were seen at the part {part.name!r}",
            why=f"it takes {least} to {largest}",
            fix="larger ones are cut into several: leave them out of the file",
        )
    return 1, max(seen, key=lambda size: (seen[size], size)), max(seen)


def sizes_of(
    manifest: Manifest, part: PartSpec, profile: Profile, batches: Path | None = None
) -> dict[str, Profile]:
    """Least, usual and largest of each dynamic dimension of a part, by its symbol.

    ``batch`` counts expressions (pictures in the image part), ``images`` the pictures that a mask
    part's expressions are about: usually one, at most the image part's largest batch.
    """
    names = {p.name for p in manifest.parts}
    if batches is not None and not names >= (said := _seen(batches).keys()):
        raise InputError(
            "engine-batches",
            f"{batches} names {', '.join(sorted(said - names))}",
            why=f"the bundle has the parts {', '.join(sorted(names))}",
            fix="name the parts as the bundle does",
        )
    sizes = {"batch": profile}
    image = next((p for p in manifest.parts if p.name == "image"), None)
    if image is not None:
        pictures = profile_of(image, batches)
        sizes["images"] = pictures if part.name == "image" else (1, 1, pictures[2])
    return sizes


def shapes_of(
    manifest: Manifest, part: PartSpec, profile: Profile, batches: Path | None = None
) -> Shapes:
    """Least, usual and largest shape of every input with a dynamic dimension."""
    sizes = sizes_of(manifest, part, profile, batches)
    shapes: Shapes = {}
    for tensor in part.inputs:
        if any(isinstance(d, str) for d in tensor.shape):
            least, usual, largest = (
                tuple(d if isinstance(d, int) else sizes[d][i] for d in tensor.shape)
                for i in range(3)
            )
            shapes[tensor.name] = (least, usual, largest)
    return shapes


def _seen(path: Path) -> dict[str, dict[int, int]]:
    """``{"mask": {"1": 930, "10": 70}}``: how often each batch was seen at each part."""
    try:
        read = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[int, int]])
    except (OSError, msgspec.DecodeError) as error:
        raise InputError(
            "engine-batches",
            f"{path} is not a file of batches",
            why=str(error),
            fix='write it like {"mask": {"1": 930, "10": 70}}',
        ) from error
    return read
