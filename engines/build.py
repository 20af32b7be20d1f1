"""Build a plan's engines on the machine that will run them.

Nothing but numpy's neighbours and the system's TensorRT is needed here; graphs come from the
bundle's dialect for that TensorRT, which was written where onnx is installed. Parts are built one
after the other, each in a process of its own (``part.py``), so that the memory of one is free
before the next begins. After each part the record is written anew: what is done is kept when a
later part fails, or when the same build is started again. Engines that an earlier build left
without weights are filled from the graphs in place of a build (``refit.py``).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

from ..errors import EngineError, InputError
from ..runtime.backends.bindings import open_tensorrt
from ..runtime.backends.cuda import target_for
from ..runtime.bundle import open_bundle, sha256_of
from ..runtime.engine import FOLDER, RECORD, EngineSet, EngineSpec, decode_engines, encode_engines
from ..runtime.files import write_atomically
from .layers import Inspection, inspect_layers, read_layers, require_plan
from .part import Options, PartResult, PartTask
from .refusals import no_memory
from .source import Source, profile_of, shapes_of, source_of
from .tensorrt import dialect_of

_LINES = 30  # of a builder process that died


def build(
    path: str | Path,
    plan: str = "fp32",
    *,
    options: Options | None = None,
    plugins: Sequence[Path] = (),
    batches: Path | None = None,
    target: str = "",
    inspect: bool = True,
    say: Callable[[str], None] = print,
) -> EngineSet:
    """Engines of all parts of a plan, in ``<bundle>/engines/<target>/<plan>/``.

    plugins: libraries to load first; they are copied beside the engines. With them, the dialect
             whose blocks are one node is taken where the bundle has it.
    batches: JSON file with the batches that were seen (``docs/engines.md``); None: the manifest's.
    target:  refuse unless this machine's target has this in its name.
    inspect: raise EngineError ``engine-precision`` where an engine is not what the plan says.
    """
    bundle = open_bundle(path)
    trt = open_tensorrt()
    here = target_for(trt.__version__)
    if target not in here.name:
        raise EngineError(
            "engine-target",
            f"this machine is not {target}",
            why=f"it is {here.name}",
            fix="build on that machine; only there its engines can be made",
        )
    options = options or Options()
    fused = "quick" if options.quick else "plugin" if plugins else ""
    source = source_of(bundle, plan, dialect_of(trt.__version__), fused=fused)
    root = bundle.path / FOLDER / here.name
    folder = root / plan
    _make(folder)
    with _only_one(root / "build.lock"):
        record = EngineSet(
            plan,
            source.dialect.name,
            bundle.manifest.digest,
            here,
            {},
            {file.name: _copied(file, folder) for file in plugins},
            asdict(options),
        )
        record = replace(record, parts=_kept(folder, record))
        for part in bundle.manifest.parts:
            file = source.dialect.graphs[part.name]
            graph = sha256_of(bundle.file(file))
            profile = profile_of(part, batches)
            done = record.parts.get(part.name)
            if done is not None and (done.graph, done.profile) != (graph, profile):
                done = None
            if done is not None and done.stripped == options.strip:
                say(f"{part.name}: kept, its engine is up to date")
                continue
            task = PartTask(
                part.name,
                str(bundle.file(file)),
                str(folder / f"{part.name}.engine.new"),
                str(root / "timing.cache"),
                source.rest,
                bool(source.int8(part.name)),
                source.pinned(part.name),
                shapes_of(bundle.manifest, part, profile, batches),
                {str(folder / name): sha256 for name, sha256 in record.plugins.items()},
                here.sm,
                options,
                "" if done is None else str(folder / done.file),
            )
            if task.stripped:
                say(f"{part.name}: its engine is here without weights; they are put in")
            result = _in_a_process(task, say)
            try:
                inspection = _inspected(result, source, part.name)
            except EngineError:  # its layers are told in a form that nobody knew
                if inspect:
                    raise
                inspection = Inspection()
            if inspect:
                require_plan(inspection, part.name, plan)
            engine = folder / f"{part.name}.engine"
            os.replace(task.engine, engine)
            layers = msgspec.json.decode(msgspec.json.encode(inspection))
            spec = _spec(engine, graph, profile, result.memory, layers, options.strip)
            record = replace(record, parts={**record.parts, part.name: spec})
            write_atomically(folder / RECORD, encode_engines(record))
            say(f"{part.name}: {spec.bytes / 1e6:.1f} MB, {_summary(inspection)}")
    return record


def _inspected(result: PartResult, source: Source, part: str) -> Inspection:
    if not result.inspector:
        return Inspection()
    return inspect_layers(read_layers(result.inspector), source.wanted(part))


def _summary(inspection: Inspection) -> str:
    layers = ", ".join(f"{count} in {kind}" for kind, count in inspection.precision.items())
    opaque = f", {len(inspection.opaque)} opaque regions" if inspection.opaque else ""
    return f"visible convolutions and products: {layers or 'none'}{opaque}"


def _spec(
    file: Path,
    graph: str,
    profile: tuple[int, int, int],
    memory: int,
    layers: dict[str, Any],
    stripped: bool,
) -> EngineSpec:
    size, sha256 = file.stat().st_size, sha256_of(file)
    return EngineSpec(file.name, graph, size, sha256, profile, memory, layers, stripped)


def _kept(folder: Path, record: EngineSet) -> dict[str, EngineSpec]:
    """Engines of an earlier build that was asked for the same and whose files are whole.

    Those without weights are kept for a build with weights, which fills them; not the reverse.
    """
    try:
        old = decode_engines((folder / RECORD).read_bytes())
    except (OSError, EngineError):
        return {}
    strip = record.flags["strip"]
    asked = (old.plan, old.dialect, old.target, old.plugins, {**old.flags, "strip": strip})
    if asked != (record.plan, record.dialect, record.target, record.plugins, record.flags):
        return {}
    fit = {name: spec for name, spec in old.parts.items() if spec.stripped or not strip}
    whole = {name: spec for name, spec in fit.items() if (folder / spec.file).is_file()}
    return {n: s for n, s in whole.items() if sha256_of(folder / s.file) == s.sha256}


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            "output-unwritable",
            f"{folder} cannot be made",
            why=error.strerror or str(error),
            fix="put the bundle where you may write; engines lie beside its files",
        ) from error


def _copied(library: Path, folder: Path) -> str:
    """Put a plugin library beside the engines; its SHA-256."""
    try:
        data = library.read_bytes()
    except OSError as error:
        raise InputError(
            "plugin-missing",
            f"the plugin library {library} cannot be read",
            why=error.strerror or str(error),
            fix="give the path of the .so file",
        ) from error
    write_atomically(folder / library.name, data)
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """One build at a time per target; the kernel takes the lock from a process that is gone."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise EngineError(
                "engine-locked",
                "another build for this target is at work",
                why=f"process {file.read().strip() or 'unknown'} holds {path.name}",
                fix="wait for it; two builders at once would take each other's memory",
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _in_a_process(task: PartTask, say: Callable[[str], None]) -> PartResult:
    """Run ``part.py``; what ends that process from outside becomes an EngineError here."""
    folder = Path(tempfile.mkdtemp(prefix="refedge-build-"))
    try:
        asked, answer = folder / "task.json", folder / "result.json"
        asked.write_bytes(msgspec.json.encode(task))
        command = [sys.executable, "-m", "refedge.engines.part", str(asked), str(answer)]
        lines: list[str] = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            for line in process.stdout or ():
                lines = [*lines[1 - _LINES :], line.rstrip()]
                say(line.rstrip())
        if process.returncode or not answer.is_file():
            raise _died(task.part, process.returncode, lines)
        result = msgspec.json.decode(answer.read_bytes(), type=PartResult)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if result.error is not None:
        code, what, why, fix = result.error
        raise EngineError(code, what, why=why, fix=fix)
    return result


def _died(part: str, status: int, lines: list[str]) -> EngineError:
    said = " | ".join(lines[-4:]) or "it said nothing"
    if status == -signal.SIGKILL:
        return no_memory(part, f"the system ended the builder (SIGKILL); {said}")
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"exit code {status}"
    return EngineError(
        "engine-build",
        f"the builder of the part {part!r} died",
        why=f"{name}; {said}",
        fix="try --level 1; if it stays, report it with TensorRT's version",
    )
