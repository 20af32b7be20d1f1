"""The kernels under compute-sanitizer: memory, races, barriers, values that nobody wrote.

    python -m refedge.tests.gpu.sanitized RESULT.json [--dry]

``kernels --check --small`` runs once per tool, with every tensor an allocation of its own. Where
compute-sanitizer is missing, refuses the device, or nothing was checked, the result says so: that
is no success.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from ...runtime.files import write_json

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
NAMES = ("cross_", "norm_", "mutual_")  # of our kernels; torch's are not looked at
FOUND = 9  # exit code for errors of the tool, apart from those of the checks themselves
SECONDS = 140  # for each; the step has 600
ELSEWHERE = "/usr/local/cuda/bin/compute-sanitizer"


def sanitize(tool: str, program: list[str]) -> dict[str, object]:
    """What a tool says of a program: ``clean``, ``errors``, or ``failed`` without an answer."""
    started = shutil.which("compute-sanitizer") or ELSEWHERE
    names = [word for name in NAMES for word in ("--kernel-name", f"kns={name}")]
    command = [started, "--tool", tool, "--error-exitcode", str(FOUND), *names, *program]
    if tool == "memcheck":  # torch tries calls that may fail; ours are checked where they are made
        command[3:3] = ["--report-api-errors", "no"]
    began = time.monotonic()
    try:
        code, said = _run(command)
    except OSError as error:
        code, said = -1, str(error)
    verdict = {0: "clean", FOUND: "errors"}.get(code, "failed")
    looked = "SUMMARY: 0 " in said and re.search(r"\b[1-9]\d* checks, 0 failed", said)
    if verdict == "clean" and not looked:
        verdict = "failed"  # it ended well without having looked
    spent = round(time.monotonic() - began, 1)
    return {"tool": tool, "verdict": verdict, "exit": code, "seconds": spent, "said": said[-4000:]}


def _run(command: list[str]) -> tuple[int, str]:
    """Exit code and output; what takes too long is ended with all that it has started."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # torch's blocks of 2 MB would hide what lies beyond a tensor
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            code, more = process.wait(SECONDS), ""
        except subprocess.TimeoutExpired:
            code, more = -1, f"ended after {SECONDS} s\n"
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()  # no session of its own: the step's end has to reach it too
            process.kill()
            process.wait()
        log.seek(0)
        return code, more + log.read()


def main(result: str, dry: str = "") -> int:
    """Exit code 0 once every tool was run; the record has the verdicts."""
    if dry:
        print("no GPU: nothing was looked at")
        return 0
    earlier = Path(result).read_bytes() if Path(result).is_file() else b'{"tools": []}'
    found = json.loads(earlier)["tools"]
    with tempfile.TemporaryDirectory() as folder:
        for tool in TOOLS[len(found) :]:
            checks = ["-m", "refedge.tests.gpu.kernels", f"{folder}/{tool}.json", "--check"]
            row = sanitize(tool, [sys.executable, *checks, "--small"])
            found.append(row)
            record = {"schema": "refedge-gpu-sanitizer-1", "tools": found}
            write_json(record, Path(result))
            print(f"{row['tool']:10} {row['verdict']:7} {row['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
