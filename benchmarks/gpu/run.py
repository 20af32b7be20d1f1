"""``make gpu``: everything that needs a GPU, the most informative first, within a budget.

    python -m refedge.benchmarks.gpu.run [--budget MINUTES] [--work out/gpu]

Two interpreters exchange files: this one has torch; the kit's (TensorRT 8.6, Python 3.10) has
TensorRT, unless this one has it too. Each step is a process of its own that writes one JSON file;
a step that ended well is not run again, so a second call goes on where the first one stopped; of
one that failed or was ended, what it had written is ``NAME.failed.json``, where its next try goes
on, after all that were never tried. After every step there is one archive of at most 16 MiB, in
``$OUT`` where that is set. Without a GPU the same steps check themselves on small sizes and nothing
is written as a result. Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KIT = Path(os.environ.get("GPUKIT_DEST", "/tmp/gpukit"))  # where the kit unpacks itself
PLUGINS = ROOT / ".gpukit/plugins"  # our library for the kit's TensorRT: make kit-plugins
LIMIT = 16 << 20  # bytes of the archive
MODELS = ("slvit-tiny", "slvit:paper", "cm_masksd:paper", "lavt:paper", "lts:paper", "step:paper",
          "m3att:paper")  # fmt: skip
FIRST = 3  # models, before the kernels are looked at once more and ONNX Runtime's providers
MISSING = {
    "msgspec": "make wheels, and carry .gpukit/wheels"
}  # modules that steps cannot do without
GPU = "refedge.benchmarks.gpu"


@dataclass(frozen=True)
class Step:
    """A process; ``{out}`` in its command is the file it writes, ``{dry}`` an option or nothing.

    kit:     runs on the interpreter that has TensorRT.
    seconds: after which it is ended.
    needs:   seconds that must be left for it to begin.
    after:   the step whose result it cannot do without.
    makes:   folder without which its result is worth nothing.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    kit: bool = False
    needs: int = 60
    after: str = ""
    makes: str = ""


def steps(models: tuple[str, ...] = MODELS) -> list[Step]:
    """In order of what they tell."""
    checkout = (ROOT / "tests/gpu").is_dir()  # not an installed package
    found = [
        Step("machine", ("-m", f"{GPU}.machine", "{out}", "{dry}"), 240),
        Step("operators", ("-m", f"{GPU}.operators", "{out}", "{dry}"), 240, kit=True),
    ]
    if checkout:
        found.append(Step("kernels", ("-m", "refedge.tests.gpu.kernels", "{out}"), 400))
    for model in models[:FIRST]:
        found += _model(model)
    if checkout:
        sanitized = ("-m", "refedge.tests.gpu.sanitized", "{out}", "{dry}")
        found.append(Step("sanitizer", sanitized, 600, needs=150))
    for model in models[FIRST:]:
        found += _model(model)
    for model in models:
        name = model.replace(":", "-")
        bundle = f"{{work}}/{name}.refedge"
        command = ("-m", f"{GPU}.providers", bundle, "{out}", "{dry}")
        found.append(Step(f"providers-{name}", command, 300, after=f"export-{name}"))
    return found


def _model(model: str) -> list[Step]:
    """Its bundle, its engines, PyTorch beside them.

    With our plugin library each part is built and timed with and without it, so that at paper size
    no builds without it are made besides.
    """
    name, tiny = model.replace(":", "-"), ":" not in model
    bundle, after = f"{{work}}/{name}.refedge", f"export-{name}"
    said, needs = ("{out}", "{dry}"), 60 if tiny else 120
    export = ("-m", f"{GPU}.bundles", model, bundle, *said)
    found = [Step(after, export, 600, needs=needs, makes=bundle)]
    libraries, engines = sorted(PLUGINS.glob("*.so"))[:1], ("-m", f"{GPU}.engines")
    if tiny or not libraries:
        found.append(Step(f"engines-{name}", (*engines, bundle, *said), 600, True, needs, after))
    for library in libraries:
        plugin = (*engines, bundle, *said, f"--plugin={library}")
        found.append(Step(f"plugin-{name}", plugin, 600, True, needs, after))
    peers = ("-m", f"{GPU}.peers", model, bundle, *said)
    return [*found, Step(f"peers-{name}", peers, 500, needs=needs, after=after)]


def in_turn(found: list[Step], work: Path) -> list[Step]:
    """Those that failed before come last, but for those that others wait for."""
    waited = {step.after for step in found}

    def failed(step: Step) -> bool:
        return step.name not in waited and (work / f"results/{step.name}.tried").is_file()

    return sorted(found, key=failed)


def has_gpu() -> bool:
    """Whether the driver finds one."""
    try:
        return int(ctypes.CDLL("libcuda.so.1").cuInit(0)) == 0
    except OSError:
        return False


def interpreter(kit: bool) -> list[str] | None:
    """How to start Python; None where there is no TensorRT to be had."""
    if not kit or importlib.util.find_spec("tensorrt") is not None:
        return [sys.executable]
    started = KIT / "bin/python"
    return [str(started)] if started.is_file() else None


def prepare(work: Path, dry: bool) -> dict[str, str]:
    """Unpack what was carried along, and the environment that steps run in."""
    work.mkdir(parents=True, exist_ok=True)
    link = ROOT / ".mypath/refedge"  # the package under its own name, as the Makefile has it
    link.parent.mkdir(exist_ok=True)
    if not link.exists():
        link.symlink_to("..", target_is_directory=True)
    boot = ROOT / ".gpukit/boot/unpack.sh"
    if boot.is_file() and not dry and not (KIT / ".complete").is_file():
        subprocess.run(["bash", str(boot), "trt"], cwd=ROOT, check=False)
    wheels, site = sorted((ROOT / ".gpukit/wheels").glob("*.whl")), work / "site"
    installed = site / ".installed"
    if wheels and not dry and not installed.is_file():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        command += ["--upgrade", "--target", str(site)]
        if subprocess.run([*command, *map(str, wheels)], check=False).returncode == 0:
            installed.touch()
    if interpreter(True) is None:
        print("TensorRT is not here, no engine will be built: unpack the GPU kit")
    if not any(PLUGINS.glob("*.so")):
        print("our plugin library is not here: make kit-plugins, and carry .gpukit/plugins")
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    host = os.pathsep.join(p for p in (str(link.parent), str(site), *given) if p)
    return {
        "PYTHONPATH": host,
        "GPUKIT_PYTHONPATH": str(link.parent),
        "PYTHONUNBUFFERED": "1",  # the log of a step that is ended
    }


def _is_there(module: str, work: Path) -> bool:
    return importlib.util.find_spec(module) is not None or (work / "site" / module).is_dir()


def run_step(step: Step, work: Path, environment: dict[str, str], left: float, dry: bool) -> str:
    """Run one step; what became of it, in a few words."""
    out = work / ("dry" if dry else "results") / f"{step.name}.json"
    made = Path(step.makes.format(work=work))  # "" is here
    if out.is_file() and made.is_dir() and not dry:
        return "done before"
    python = interpreter(step.kit)
    if python is None:
        return "left out: no TensorRT here, and the kit is not unpacked"
    if step.after and not dry and not out.with_name(f"{step.after}.json").is_file():
        return f"left out: {step.after} has to be there"
    if left < min(step.seconds, step.needs):
        return "left for another time"
    out.parent.mkdir(parents=True, exist_ok=True)
    begun, failed = out.with_suffix(".part"), out.with_suffix(".failed.json")
    newer = begun.is_file() and (
        not failed.is_file() or begun.stat().st_mtime > failed.stat().st_mtime
    )
    if dry:
        begun.unlink(missing_ok=True)
    elif failed.is_file() and not newer:
        shutil.copy(failed, begun)  # it goes on from there
    words = {"out": str(begun), "work": str(work), "dry": "--dry" if dry else ""}
    command = [*python, *filter(None, (c.format(**words) for c in step.command))]
    started, log = time.monotonic(), out.with_suffix(".log")
    code = run_alone(command, environment, log, min(step.seconds, left))
    if begun.is_file():
        os.replace(begun, out if code == 0 else failed)
    spent = f"{time.monotonic() - started:.0f} s"
    if code is not None or left >= step.seconds:  # else the budget ended it: it keeps its place
        out.with_suffix(".tried").touch()
    if code is None:
        return f"ended after {spent}: it took too long"
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        return f"failed ({code}) after {spent}: {lines[-1] if lines else 'no output'}"
    failed.unlink(missing_ok=True)
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"ok, {spent}" + (f": {lines[-1][:100]}" if lines else "")


def run_alone(
    command: list[str], environment: dict[str, str], log: Path, seconds: float
) -> int | None:
    """Exit code, or None where it took too long; nothing that it started lives on."""
    with log.open("w") as written:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def archive(work: Path, said: dict[str, str]) -> Path:
    """Results, logs and the summary in one file; the largest stay out where it grows too large."""
    summary = work / "results/summary.json"
    summary.parent.mkdir(parents=True, exist_ok=True)
    summary.write_text(json.dumps(said, indent=1) + "\n")
    target = Path(os.environ.get("OUT") or work) / "gpu-results.tar.gz"
    files = sorted(summary.parent.iterdir(), key=lambda f: (f != summary, f.stat().st_size))
    while True:
        with tarfile.open(target, "w:gz") as tar:
            for file in files:
                tar.add(file, file.name)
        if target.stat().st_size <= LIMIT or len(files) == 1:
            return target
        print(f"left out of the archive, for its size: {files.pop().name}")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 unless a step failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=25.0, help="minutes")
    parser.add_argument("--work", type=Path, default=ROOT / "out/gpu")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--again", nargs="+", default=[], help="Steps to forget, after a repair.")
    asked = parser.parse_args(arguments)
    work, until = asked.work.resolve(), time.monotonic() + 60 * asked.budget
    dry = not has_gpu()
    if dry:
        print("no GPU here: dry checks only, nothing is measured")
        shutil.rmtree(work / "dry", ignore_errors=True)
    for name in asked.again:
        for suffix in (".json", ".failed.json", ".part", ".log", ".tried"):
            (work / "results" / f"{name}{suffix}").unlink(missing_ok=True)
        if name.startswith("export-"):
            shutil.rmtree(work / f"{name.removeprefix('export-')}.refedge", ignore_errors=True)
    environment = prepare(work, dry)
    if not dry and (missing := [m for m in MISSING if not _is_there(m, work)]):
        print(f"not begun: {', '.join(f'{m} ({MISSING[m]})' for m in missing)}")
        return 1
    said = {}
    found = steps(("slvit-tiny",) if dry else tuple(asked.models))
    for step in found if dry else in_turn(found, work):
        said[step.name] = run_step(step, work, environment, until - time.monotonic(), dry)
        print(f"{step.name:<24} {said[step.name]}", flush=True)
        if not dry:
            made = archive(work, said)  # now: the machine may be gone before the end
    if not dry:
        print(f"results: {made}")
    return 1 if any(text.startswith("failed") for text in said.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
