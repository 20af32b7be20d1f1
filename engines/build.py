"""Build a plan's engines on the machine that will run them.

Nothing but numpy's neighbours and the system's TensorRT is needed here; graphs come from the
bundle's dialect for that TensorRT, which was written where onnx is installed. Parts are built one
after the other, each in a process of its own (``part.py``), so that the memory of one is free
before the next begins. After each part the record is written anew: what is done is kept when a
later part fails, or when the same build is started again. Engines that an earlier build left
without weights are filled from the graphs in place of a build (``refit.py``). With plugins a part
may be built in two ways; the faster is kept (``race.py``).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import msgspec

from ..errors import EngineError, InputError
from ..runtime.backends.bindings import open_tensorrt
from ..runtime.backends.cuda import target_for
from ..runtime.bundle import Bundle, open_bundle, sha256_of
from ..runtime.engine import (
    FOLDER,
    RECORD,
    EngineSet,
    EngineSpec,
    Timed,
    decode_engines,
    encode_engines,
)
from ..runtime.files import make_folder, write_atomically
from ..runtime.manifest import PartSpec
from .child import against_each_other, in_a_process
from .layers import Inspection, inspect_layers, read_layers, require_plan
from .part import Options, PartResult, PartTask, Shapes
from .race import RaceTask
from .source import Source, profile_of, shapes_of, sizes_of, source_of
from .tensorrt import dialect_of


def build(
    path: str | Path,
    plan: str = "fp32",
    *,
    options: Options | None = None,
    plugins: Sequence[Path] = (),
    batches: Path | None = None,
    target: str = "",
    inspect: bool = True,
    race: bool = True,
    say: Callable[[str], None] = print,
) -> EngineSet:
    """Engines of all parts of a plan, in ``<bundle>/engines/<target>/<plan>/``.

    plugins: libraries to load first; they are copied beside the engines. With them, the dialect
             whose blocks are one node is taken where the bundle has it; ``options.quick`` does
             the same for ahead-of-time plugins.
    batches: JSON file with the batches that were seen (``docs/engines.md``); None: the manifest's.
    target:  refuse unless this machine's target has this in its name.
    inspect: raise EngineError ``engine-precision`` where an engine is not what the plan says.
    race:    parts that such a dialect changes are built from the usual one too, both are timed, and
             the faster is kept; else that with the plugin is.
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
    sources = [source]
    if race and fused and source.dialect.name.endswith(f"-{fused}"):
        sources.append(source_of(bundle, plan, dialect_of(trt.__version__)))
        _require_what_times(options)
    root = bundle.path / FOLDER / here.name
    folder = root / plan
    make_folder(folder)
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
        work = _Work(bundle, folder, record.plugins, here.sm, options, batches, say)
        for part in bundle.manifest.parts:
            ways = {  # by the graph's SHA-256
                sha256_of(bundle.file(one.dialect.graphs[part.name])): one
                for one in (sources if source.fuses(part.name) else [source])
            }
            done = record.parts.get(part.name)
            if done is not None and not work.fits(done, part, set(ways)):
                done = None
            if done is not None and done.stripped == options.strip:
                say(f"{part.name}: kept, its engine is up to date")
                continue
            if done is not None:
                say(f"{part.name}: its engine is here without weights; they are put in")
            for left in folder.glob(f"{part.name}.engine.new*"):
                left.unlink()  # of a build that failed
            made = work.builds(part, ways, done)
            timed, best = work.race(part, made, ways) if len(ways) > 1 else ((), 0)
            file, spec, result = made[best]
            try:
                inspection = _inspected(result, ways[spec.graph], part.name)
            except EngineError:  # its layers are told in a form that nobody knew
                if inspect:
                    raise
                inspection = Inspection()
            if inspect:
                require_plan(inspection, part.name, plan)
            os.replace(file, folder / spec.file)
            for other, _, _ in made:
                other.unlink(missing_ok=True)
            layers = msgspec.json.decode(msgspec.json.encode(inspection))
            spec = replace(spec, layers=layers, timed=timed)
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


@dataclass(frozen=True)
class _Work:
    """What the builds of all parts have in common."""

    bundle: Bundle
    folder: Path
    libraries: dict[str, str]
    sm: int
    options: Options
    batches: Path | None
    say: Callable[[str], None]

    def build(
        self, part: PartSpec, way: tuple[str, Source], done: EngineSpec | None, *, new: int
    ) -> tuple[Path, EngineSpec, PartResult]:
        """Build a graph, or fill what is ``done``; ``new`` counts the engines of the part."""
        graph, source = way
        file = self.folder / f"{part.name}.engine.new{new or ''}"
        task = PartTask(
            part.name,
            str(self.bundle.file(source.dialect.graphs[part.name])),
            str(file),
            str(self.folder.parent / "timing.cache"),
            source.rest,
            bool(source.int8(part.name)),
            source.pinned(part.name),
            self._shapes(part),
            self._plugins,
            self.sm,
            self.options,
            "" if done is None else str(self.folder / done.file),
        )
        result = in_a_process(task, self.say)
        spec = EngineSpec(
            f"{part.name}.engine",
            graph,
            file.stat().st_size,
            sha256_of(file),
            profile_of(part, self.batches),
            result.memory,
            stripped=self.options.strip,
            largest=self.largest(part),
        )
        return file, spec, result

    def builds(
        self, part: PartSpec, ways: dict[str, Source], done: EngineSpec | None
    ) -> list[tuple[Path, EngineSpec, PartResult]]:
        """One for each way; where TensorRT refuses one of two, the other."""
        errors: list[EngineError] = []

        def tried(way: tuple[str, Source]) -> tuple[Path, EngineSpec, PartResult] | None:
            try:
                return self.build(part, way, done, new=list(ways).index(way[0]))
            except EngineError as error:
                if error.code not in ("engine-parse", "engine-build"):
                    raise
                errors.append(error)
                self.say(f"{part.name}: not as {way[1].dialect.name}: {error.what}: {error.why}")
                return None

        made = [one for way in ways.items() if (one := tried(way)) is not None]
        if not made:
            raise errors[0]
        return made

    def race(
        self,
        part: PartSpec,
        made: list[tuple[Path, EngineSpec, PartResult]],
        ways: dict[str, Source],
    ) -> tuple[tuple[Timed, ...], int]:
        """What was timed, and which is the fastest."""
        if len(made) == 1:
            (_, spec, _), name = made[0], ways[made[0][1].graph].dialect.name
            return (Timed(name, spec.graph, None),), 0
        task = RaceTask(
            part,
            tuple((str(file), spec) for file, spec, _ in made),
            self._shapes(part),
            tuple(t.name for p in self.bundle.manifest.parts for t in p.outputs),
            self._plugins,
            self.options.versions,
        )
        try:
            spent = against_each_other(task, self.say)
        except EngineError as error:  # for want of memory for both, say
            (_, spec, _), name = made[-1], ways[made[-1][1].graph].dialect.name
            why = f"{error.what}: {error.why}"
            self.say(f"{part.name}: not timed, {why}; kept as {name}, without the plugin")
            return (Timed(name, spec.graph, None),), len(made) - 1
        timed = tuple(
            Timed(ways[spec.graph].dialect.name, spec.graph, each)
            for (_, spec, _), each in zip(made, spent, strict=True)
        )
        told = ", ".join(f"{t.milliseconds:.3f} ms as {t.dialect}" for t in timed)
        self.say(f"{part.name}: {told}; the faster is kept")
        return timed, min(range(len(spent)), key=spent.__getitem__)

    @property
    def _plugins(self) -> dict[str, str]:
        return {str(self.folder / name): sha256 for name, sha256 in self.libraries.items()}

    def fits(self, done: EngineSpec, part: PartSpec, graphs: set[str]) -> bool:
        """Whether an engine is what a build of these graphs would give."""
        chosen = {t.graph for t in done.timed} if len(graphs) > 1 else {done.graph}
        sizes = (profile_of(part, self.batches), self.largest(part))
        return (done.profile, done.largest) == sizes and chosen == graphs

    def largest(self, part: PartSpec) -> dict[str, int]:
        """By the symbol of a dynamic dimension."""
        profile = profile_of(part, self.batches)
        sizes = sizes_of(self.bundle.manifest, part, profile, self.batches)
        return {symbol: size[2] for symbol, size in sizes.items()}

    def _shapes(self, part: PartSpec) -> Shapes:
        profile = profile_of(part, self.batches)
        return shapes_of(self.bundle.manifest, part, profile, self.batches)


def _require_what_times(options: Options) -> None:
    if find_spec("pycuda") is None:
        raise EngineError(
            "backend-missing",
            "engines with and without plugins cannot be timed",
            why="pycuda, which runs them, is not installed",
            fix="pip install 'pycuda>=2024.1', or add --no-race to keep those with the plugins",
        )
    if options.strip:
        raise EngineError(
            "engine-option",
            "engines without weights cannot be timed",
            why="with plugins, a part is built with and without them and the faster is kept",
            fix="leave --strip out, or add --no-race to keep those with the plugins",
        )


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
    """One build at a time per target; the kernel takes the lock from processes that are gone."""
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
        os.set_inheritable(file.fileno(), True)  # a builder that outlives this process keeps it
        yield
