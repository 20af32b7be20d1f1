"""Engines that were never loaded here are tried in a child process first.

TensorRT trusts what it deserialises: an engine of a broken build, or one that a plugin's library
does not fit, ends the process. The child loads every part of a plan and runs it once on zeros;
what it dies of becomes an error here. Which records of engines have passed is kept in the user's
cache, so that each is tried once.

    python -m refedge.runtime.backends.probe BUNDLE PLAN
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ...errors import BackendError, BundleError, EngineError, RefedgeError

_SECONDS = 600
_REFUSED = 3  # exit code: the last line is an error of ours


def require(bundle: Path, plan: str, digest: str) -> None:
    """Try the engines of a plan, unless a record of that digest has passed before."""
    stamp = _cache() / digest
    if stamp.exists():
        return
    try_in_child([sys.executable, "-m", __name__, str(bundle.resolve()), plan])
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    except OSError:
        return  # tried again next time


def try_in_child(command: Sequence[str], seconds: float = _SECONDS) -> None:
    """Run it; raises what it printed as an error, or EngineError ``engine-crash``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _crash(f"it did not end within {seconds:g} s") from error
    if done.returncode == _REFUSED:
        said = json.loads(done.stdout.splitlines()[-1])
        kind = {e.__name__: e for e in (BackendError, BundleError)}.get(said["kind"], EngineError)
        raise kind(said["code"], said["what"], why=said["why"], fix=said["fix"])
    if done.returncode < 0:
        raise _crash(f"it died of {signal.Signals(-done.returncode).name}", done.stderr)
    if done.returncode:
        raise _crash(f"it ended with {done.returncode}", done.stderr)


def main(bundle: str, plan: str) -> int:
    """What the child does."""
    import numpy as np

    from ..bundle import open_bundle
    from .tensorrt import TensorRTBackend

    try:
        opened = open_bundle(bundle)
        backend = TensorRTBackend(opened, plan, trusted=True)
        dialect = opened.dialect(backend.dialects(plan), plan)
        for part in opened.manifest.parts:
            sizes = {t.name: tuple(1 if isinstance(d, str) else d for d in t.shape)
                     for t in part.inputs}  # fmt: skip
            zeros = {t.name: np.zeros(sizes[t.name], t.dtype) for t in part.inputs}
            backend.load(opened.file(dialect.graphs[part.name]), part).run(zeros)
    except RefedgeError as error:
        said = {key: getattr(error, key) for key in ("code", "what", "why", "fix")}
        print(json.dumps({"kind": type(error).__name__, **said}))
        return _REFUSED
    return 0


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "refedge" / "engines"


def _crash(how: str, said: str = "") -> EngineError:
    return EngineError(
        "engine-crash",
        "TensorRT crashed on these engines",
        why="\n".join([f"a child process tried them first, and {how}", *said.splitlines()[-5:]]),
        fix="build the engines again on this machine: refedge build",
    )


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all parts ran: what TensorRT does while a process ends says nothing of them
