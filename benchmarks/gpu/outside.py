"""A step that writes no result of its own: its output, if it ended well, is the result.

python -m refedge.benchmarks.gpu.outside OUT.json MODULE [ARGUMENT]...
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCHEMA = "refedge-gpu-outside-1"


def main(out: str, *command: str) -> int:
    """Exit code of the module."""
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False
    )
    print(done.stdout + done.stderr)
    if done.returncode == 0:
        record = {"schema": SCHEMA, "command": command, "output": done.stdout[-200_000:]}
        Path(out).write_text(json.dumps(record, indent=1) + "\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
