"""Run the runtime's and the data's tests on Python 3.10 with NumPy 1.26, where 3.10 is found.

That is what JetPack 6 and TensorRT 8.6's bindings have. The bundles come from the main test run,
since the exporter is not installed here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".venv310"
NEEDS = ("numpy==1.26.*", "onnxruntime", "pillow", "tokenizers", "msgspec", "click", "rich")
TESTS = ("pytest", "hypothesis", "pytest-xdist", "pycocotools")


def interpreter() -> list[str] | None:
    """A Python 3.10 that starts, or None."""
    check = "import sys, venv; sys.exit(sys.version_info[:2] != (3, 10))"
    # a version manager's shim needs to be told which of its versions is meant
    os.environ.setdefault("PYENV_VERSION", "3.10")
    try:
        found = subprocess.run(["python3.10", "-c", check], capture_output=True, check=False)
    except OSError:
        return None
    return ["python3.10"] if found.returncode == 0 else None


def main() -> int:
    """Make the environment if there is none, then run the tests."""
    python = interpreter()
    if python is None:
        print("py310: no Python 3.10 here; skipped")
        return 0
    if not (VENV / ".installed").exists():
        subprocess.run([*python, "-m", "venv", str(VENV)], check=True)
        pip = [str(VENV / "bin/python"), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "--upgrade", "pip"], check=True)
        subprocess.run([*pip, *NEEDS, *TESTS], check=True)
        subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
        (VENV / ".installed").touch()
    newest = max((ROOT / "build/test-bundles").glob("*/"), key=lambda p: p.stat().st_mtime)
    command = [str(VENV / "bin/python"), "-m", "pytest", "-n", "2", "tests/runtime", "tests/data"]
    environment = os.environ | {"REFEDGE_TEST_BUNDLES": str(newest)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
