"""The same build as a line for ``trtexec``, to compare or to report a fault without refedge.

Options are those of trtexec's ``sampleOptions.cpp`` at 8.6, 10.3, 10.13 and 11.1.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..errors import EngineError
from ..runtime.bundle import open_bundle
from .part import Options
from .source import Source, profile_of, shapes_of, source_of
from .tensorrt import dialect_of


def trtexec_lines(
    path: str | Path,
    plan: str,
    version: str,
    *,
    options: Options | None = None,
    plugins: Sequence[Path] = (),
    batches: Path | None = None,
) -> list[str]:
    """A line per part; ``version`` is TensorRT's, ``10.3``. Paths are the bundle's."""
    options = options or Options()
    if options.quick:
        raise EngineError(
            "plugin-quick",
            "trtexec cannot build with ahead-of-time plugins",
            why="they are declared in Python",
            fix="build without --print-trtexec; trtexec --loadEngine runs what was built",
        )
    _require(options, version)
    bundle = open_bundle(path)
    source = source_of(bundle, plan, dialect_of(version), fused="plugin" if plugins else "")
    lines = []
    for part in bundle.manifest.parts:
        profile = profile_of(part, batches)
        shapes = shapes_of(bundle.manifest, part, profile, batches)
        graph = bundle.path / source.dialect.graphs[part.name]
        words = ["trtexec", f"--onnx={graph}", *_precision(source, part.name, version)]
        for i, which in enumerate(("min", "opt", "max") if shapes else ()):
            listed = (f"{n}:{'x'.join(str(d) for d in s[i])}" for n, s in shapes.items())
            words.append(f"--{which}Shapes={','.join(listed)}")
        words += [f"--dynamicPlugins={library}" for library in plugins]
        words += _options(options)
        words += [
            f"--timingCacheFile=trtexec-{version}.cache",
            f"--saveEngine={part.name}.{plan}.engine",
            "--profilingVerbosity=detailed",
            f"--exportLayerInfo={part.name}.{plan}.layers.json",
            "--skipInference",
        ]
        lines.append(" ".join(shlex.quote(word) for word in words))
    return lines


def _precision(source: Source, part: str, version: str) -> list[str]:
    words = []
    if source.rest == "fp32" and not source.int8(part):
        words.append("--noTF32")
    if version.startswith("10."):
        return [*words, "--stronglyTyped"]  # 11 knows nothing else
    if not version.startswith("8."):
        return words
    if source.int8(part):
        words.append("--int8")
    if source.rest == "fp16":
        words.append("--fp16")
        pinned = ",".join(f"{name}:fp32" for name in source.pinned(part))
        if pinned:
            words += ["--precisionConstraints=obey", f"--layerPrecisions={pinned}"]
    return [*words, "--tacticSources=-CUBLAS,-CUBLAS_LT,-CUDNN"]


def _require(options: Options, version: str) -> None:
    """What a build says of options that came later: trtexec of that version refuses them, too."""
    found = tuple(int(n) for n in version.split(".")[:2] if n.isdigit())
    late = {
        "--strip": (options.strip, (10, 0)),
        "--hardware same-cc": (options.hardware == "same-cc", (10, 13)),
    }
    for name, (asked, since) in late.items():
        if asked and found < since:
            raise EngineError(
                "engine-option",
                f"trtexec of TensorRT {version} has nothing for {name}",
                why="the option came with a later version",
                fix="print the lines without it",
            )


def _options(options: Options) -> list[str]:
    words = []
    if options.workspace is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace}")
    if options.level is not None:
        words.append(f"--builderOptimizationLevel={options.level}")
    if options.hardware is not None:
        level = {"ampere+": "ampere+", "same-cc": "sameComputeCapability"}[options.hardware]
        words.append(f"--hardwareCompatibilityLevel={level}")
    words += ["--versionCompatible"] * options.versions
    words += ["--refit"] * options.refit
    words += ["--stripWeights"] * options.strip
    return words
