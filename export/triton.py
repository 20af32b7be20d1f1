"""A bundle as a model repository of the Triton Inference Server.

One model for each part, and an ensemble of the bundle's name that takes ``pixels``, ``ids`` and
``words`` (and ``image_index``, where there is an image part) and gives ``logits``; what the parts
hand to each other stays in the server. Resizing and the tokenizer stay with the client. Every
``max_batch_size`` is 0 and every first axis -1: pictures and expressions have batches of their own,
which Triton's batcher, with its one common axis, could not tell apart.

Fields and enums are those of Triton's ``model_config.proto``.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import BundleError
from ..runtime.backends.engine_files import Engines
from ..runtime.bundle import Bundle
from ..runtime.engine import FOLDER, RECORD, decode_engines
from ..runtime.files import make_folder
from ..runtime.manifest import PartSpec, TensorSpec

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
}


def write_repository(
    bundle: Bundle, plan: str, target: Path, *, engines: str | None = None
) -> list[str]:
    """Write the repository of a plan to a folder that is not there yet; the models' names.

    engines: the folder below ``engines/`` whose engines are served; None for the graphs of the
             ``ort`` dialect, which Triton's ONNX Runtime runs on the CPU or the GPU.
    Raises BundleError ``bundle-target``, ``plan-missing``; EngineError for engines.
    """
    if target.exists():
        raise BundleError(
            "bundle-target",
            f"{target} is there already",
            why="a model repository is written whole",
            fix="choose another name, or move it away",
        )
    stem = re.sub(r"[^a-z0-9]+", "_", bundle.path.stem.lower()).strip("_") or "refedge"
    parts = bundle.manifest.parts
    make_folder(target.parent)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        folder = Path(scratch) / "repository"
        for part in parts:
            version = folder / f"{stem}_{part.name}" / "1"
            version.mkdir(parents=True)
            if engines is None:
                _copy_graph(bundle, plan, part.name, version)
            else:
                _copy_engine(bundle, plan, part.name, version, engines)
            platform = "onnxruntime_onnx" if engines is None else "tensorrt_plan"
            config = _model(f"{stem}_{part.name}", platform, part)
            (version.parent / "config.pbtxt").write_text(config)
        (folder / stem / "1").mkdir(parents=True)  # an ensemble has a version, though no file
        (folder / stem / "config.pbtxt").write_text(_ensemble(stem, parts))
        os.rename(folder, target)
    return [stem, *(f"{stem}_{part.name}" for part in parts)]


def _copy_graph(bundle: Bundle, plan: str, part: str, version: Path) -> None:
    dialect = bundle.dialect(["ort"], plan)
    shutil.copyfile(bundle.file(dialect.graphs[part]), version / "model.onnx")
    for file in dialect.files:
        if Path(file).name.startswith(f"{part}-"):  # the part's weights, by the name it says
            shutil.copyfile(bundle.file(file), version / Path(file).name)


def _copy_engine(bundle: Bundle, plan: str, part: str, version: Path, engines: str) -> None:
    folder = bundle.path / FOLDER / engines / plan
    if not (folder / RECORD).is_file():
        raise BundleError(
            "plan-missing",
            f"{bundle.path.name} has no engines of the plan {plan!r} in {engines!r}",
            why=f"there is no {folder.relative_to(bundle.path)}/{RECORD}",
            fix="build them on the server's machine: refedge build",
        )
    found = Engines(folder, decode_engines((folder / RECORD).read_bytes()))
    (version / "model.plan").write_bytes(found.read(part, found.graph(bundle, part)))


def _model(name: str, platform: str, part: PartSpec) -> str:
    head = [f'name: "{name}"', f'platform: "{platform}"', "max_batch_size: 0"]
    tensors = [*_tensors("input", part.inputs), *_tensors("output", part.outputs)]
    return "\n".join([*head, *tensors, ""])


def _ensemble(name: str, parts: Sequence[PartSpec]) -> str:
    """Steps in the manifest's order; a tensor that no part makes is an input of the whole."""
    made = {t.name for part in parts for t in part.outputs}
    inputs = {t.name: t for part in parts for t in part.inputs if t.name not in made}
    mask = next(p for p in parts if p.name == "mask")
    lines = [f'name: "{name}"', 'platform: "ensemble"', "max_batch_size: 0"]
    lines += [*_tensors("input", inputs.values()), *_tensors("output", mask.outputs)]
    lines += ["ensemble_scheduling {"]
    for part in parts:
        lines += ["  step {", f'    model_name: "{name}_{part.name}"', "    model_version: -1"]
        for kind, tensors in (("input", part.inputs), ("output", part.outputs)):
            lines += [f'    {kind}_map {{ key: "{t.name}" value: "{t.name}" }}' for t in tensors]
        lines += ["  }"]
    return "\n".join([*lines, "}", ""])


def _tensors(kind: str, tensors: Iterable[TensorSpec]) -> list[str]:
    lines = []
    for t in tensors:
        dims = ", ".join("-1" if isinstance(d, str) else str(d) for d in t.shape)
        lines += [f'{kind} {{ name: "{t.name}" data_type: {_TYPES[t.dtype]} dims: [ {dims} ] }}']
    return lines
