"""Type-check our TensorRT code against stubs of the real bindings, version by version.

    python check_types.py FOLDER        (make stubs)

FOLDER/VERSION/site holds the bindings' wheel, as pip unpacks it. They import without TensorRT over
empty libraries that only satisfy the linker; pybind11-stubgen writes their stubs; mypy reads a copy
of our modules in which ``trt: Any`` is what the version has. Which names exist is the conformance
test's business, since it knows what our guards let through; here arguments and results are checked:
their number, their types, what may be None.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("__init__.py", "errors.py", "engines/*.py", "runtime/*.py", "runtime/backends/*.py",
          "plugins/__init__.py", "plugins/native.py")  # fmt: skip
# what stands behind a guard that mypy cannot decide
GUARDED = {"8.6": ['Too many arguments for "create_execution_context"']}
SETTINGS = """[mypy]
check_untyped_defs = True
disable_error_code = attr-defined, name-defined
follow_imports = silent
ignore_missing_imports = True
[mypy-tensorrt]
ignore_errors = True
"""


def run(command: list[str], **said: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **said)  # type: ignore[call-overload]
    if done.returncode and command[2] != "mypy":
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def empty_libraries(bindings: Path, target: Path) -> None:
    """Libraries of the names that the bindings need, with every symbol that these lack."""
    target.mkdir(exist_ok=True)
    extension = next(bindings.glob("tensorrt*.so"))
    needed = re.findall(r"NEEDED.*\[(libnv.*?)\]", run(["readelf", "-d", str(extension)]))
    symbols = re.findall(r"^\s+U (\S+)$", run(["nm", "-D", str(extension)]), re.M)
    foreign = re.compile(
        r"_?Py|_ZN?K?St|_Z(dl|da|nw|na)|_ZTV|__|_Unwind|dl(open|sym|close|error)$|.*@"
    )
    lacking = [s for s in symbols if not foreign.match(s)]
    source = target / "empty.c"
    source.write_text("".join(f"void* {s}(void) {{ return 0; }}\n" for s in lacking))
    for library in needed:
        run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(target / library),
             str(source)])  # fmt: skip


def tidied(stub: str) -> str:
    """A stub that can be read, and that knows what pybind11 converts by itself.

    Sequences are taken for Dims, Dims can be iterated, host memory has the buffer protocol. A
    signature that is no Python takes anything.
    """
    stub = re.sub(r"(?:tensorrt_bindings\.)?tensorrt\.(?=[A-Z])", "", stub)
    stub = re.sub(r"(\w: )Dims\b", r"\1Dims | collections.abc.Sequence[int]", stub)
    for name, method in (
        ("Dims", "def __iter__(self) -> collections.abc.Iterator[int]: ..."),
        ("IHostMemory", "def __buffer__(self, flags: int, /) -> memoryview: ..."),
    ):
        stub = re.sub(rf"^class {name}:\n", rf"\g<0>    {method}\n", stub, flags=re.M)
    lines = stub.splitlines()
    while number := _unreadable("\n".join(lines)):
        head = re.match(r"\s*def \w+", lines[number - 1])
        if head is None:
            sys.exit(f"the stub cannot be read: {lines[number - 1]}")
        lines[number - 1] = f"{head[0]}(*_: typing.Any, **__: typing.Any) -> typing.Any:"
    imports = "import collections.abc\nimport typing\n"
    return "\n".join(lines).replace("\nimport ", f"\n{imports}import ", 1) + "\n"


def _unreadable(source: str) -> int:
    """The first line that is no Python; 0 where all of it is."""
    try:
        ast.parse(source)
    except SyntaxError as error:
        return error.lineno or 1
    return 0


def module_stub(stub: str) -> str:
    """The module as a class, which an argument can be of."""
    classes = re.findall(r"^class (\w+)", stub, re.M)
    names = "".join(f"    {name}: type[tensorrt.{name}]\n" for name in classes)
    return (
        f"import tensorrt\nfrom typing import Any\nclass TensorRT:\n    __version__: str\n{names}"
        "    get_plugin_registry: Any\n    init_libnvinfer_plugins: Any\n"
    )


def copied(target: Path) -> None:
    """Our modules, in which the module ``tensorrt`` has a type."""
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        text = path.read_text().replace("tuple[Any, Any]:", "tuple[TensorRT, Any]:")
        typed = re.sub(r"\btrt: Any\b", "trt: TensorRT", text)
        future = "from __future__ import annotations\n"
        typed = typed.replace(future, f"{future}from tensorrt_module import TensorRT\n", 1)
        place = target / "refedge" / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(typed if "TensorRT]" in typed or ": TensorRT" in typed else text)


def check(folder: Path) -> list[str]:
    """mypy's errors for a version."""
    empty_libraries(folder / "site" / "tensorrt_bindings", folder / "lib")
    made, work = folder / "made", folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    paths = {"LD_LIBRARY_PATH": str(folder / "lib"), "PYTHONPATH": str(folder / "site")}
    generate = [sys.executable, "-m", "pybind11_stubgen", "tensorrt_bindings", "-o", str(made)]
    run([*generate, "--ignore-all-errors"], env={**os.environ, **paths})
    stub = tidied((made / "tensorrt_bindings" / "tensorrt.pyi").read_text())
    (work / "tensorrt").mkdir(parents=True)
    (work / "tensorrt" / "__init__.pyi").write_text(stub)
    (work / "tensorrt_module.pyi").write_text(module_stub(stub))
    (work / "mypy.ini").write_text(SETTINGS)
    copied(work)
    mypy = [sys.executable, "-m", "mypy", "--cache-dir", str(folder / "cache")]
    parts = ["-p", "refedge.engines", "-p", "refedge.runtime.backends", "-p", "refedge.plugins"]
    said = run([*mypy, *parts], cwd=work, env={**os.environ, "MYPYPATH": str(work)})
    known = GUARDED.get(folder.name, [])
    errors = [line for line in said.splitlines() if ": error:" in line]
    if not errors and "no issues found" not in said:
        sys.exit(f"mypy did not come to an end:\n{said}")
    return [line for line in errors if not any(text in line for text in known)]


def main(folder: str) -> int:
    """Exit code 1 where a version has errors."""
    found = {path.name: check(path.resolve()) for path in sorted(Path(folder).iterdir())}
    for version, errors in found.items():
        print("\n".join([f"{version}: {len(errors)} errors", *(f"  {e}" for e in errors)]))
    return int(any(found.values()) or not found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
