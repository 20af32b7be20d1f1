"""Write tensorrt_names.json: which public names TensorRT's Python bindings have, by version.

    python make_names.py VERSION=PYTHON ...        (make stubs)

PYTHON is a command that runs an interpreter in which ``tensorrt_bindings`` or ``tensorrt`` imports:
the GPU kit's, whose 8.6.0 lacks names of 8.6.1, or one over the bindings alone (whose
wheels import without a GPU over empty stand-ins for libnvinfer, which only have to satisfy the
linker). Only names, argument names and result classes are kept; ``plugin`` is ``tensorrt.plugin``.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).with_name("tensorrt_names.json")
_CLASSES = """
    Builder BuilderFlag DataType EngineInspector ExecutionContextAllocationStrategy
    HardwareCompatibilityLevel IBuilderConfig ICudaEngine IExecutionContext IGpuAllocator
    IHostMemory ILayer ILogger INetworkDefinition IOptimizationProfile IOutputAllocator
    IPluginRegistry IProgressMonitor IRuntimeConfig ISerializationConfig ITensor ITimingCache
    LayerInformationFormat LayerType MemoryPoolType NetworkDefinitionCreationFlag OnnxParser
    OnnxParserFlag OnnxParserRefitter ParserError PreviewFeature ProfilingVerbosity Refitter Runtime
    SerializationFlag TacticSource TensorFormat TensorIOMode TensorLocation
"""
CLASSES = _CLASSES.split()
LOOK = r"""
import inspect, json, re, sys
try:
    import tensorrt_bindings as trt
except ImportError:  # 8.6.0's wheel has all in one package
    import tensorrt as trt
out = {"": {}}
def about(member):
    text = member.__doc__ or getattr(getattr(member, "fget", None), "__doc__", None) or ""
    lines = re.findall(r"^\s*(?:\d+\. )?\w*\((.*)\) -> (\S+)", text, re.M)
    arguments = sorted({a for head, _ in lines for a in re.findall(r"(?:^|, )(\w+): ", head)
                        if a not in ("self", "arg0", "arg1")})
    result = next((re.split(r"[.:]+", r)[-1] for _, r in lines), "")
    return [arguments, re.sub(r"^I(?=EngineInspector|ParserError)", "", result)]
for name in dir(trt):
    if not name.startswith("_") or name == "__version__":
        member = getattr(trt, name)
        out[""][name] = about(member) if not isinstance(member, (type, str)) else [[], ""]
for name in CLASSES:
    if hasattr(trt, name):
        members = [m for m in dir(getattr(trt, name)) if not m.startswith("_")]
        out[name] = {m: about(getattr(getattr(trt, name), m)) for m in members}
sys.modules["tensorrt"] = trt
try:
    import tensorrt.plugin as plugin
except ImportError:  # before 10.6
    plugin = None
for name in sorted(getattr(plugin, "__all__", [])):
    member = getattr(plugin, name)
    out.setdefault("plugin", {})[name] = [
        sorted(inspect.signature(member).parameters) if callable(member) else [], ""]
print(json.dumps(out))
"""


def main(arguments: list[str]) -> None:
    versions = [a.split("=", 1)[0] for a in arguments]
    table: dict[str, dict[str, list[object]]] = {}
    for version, command in (a.split("=", 1) for a in arguments):
        code = f"CLASSES = {CLASSES!r}\n{LOOK}"
        done = subprocess.run(
            [*shlex.split(command), "-c", code], capture_output=True, text=True, check=True
        )
        for group, members in json.loads(done.stdout.splitlines()[-1]).items():
            for member, (names, result) in members.items():
                held = table.setdefault(group, {}).setdefault(member, ["", [], ""])
                held[0] = f"{held[0]} {version}".strip()
                held[1] = sorted({*held[1], *names})  # type: ignore[misc]
                held[2] = held[2] or (result if result in CLASSES else "")
    lines = []
    for group, found in sorted(table.items()):
        rows = [f"  {json.dumps(m)}: {json.dumps(found[m])}" for m in sorted(found)]
        lines.append(f" {json.dumps(group)}: {{\n" + ",\n".join(rows) + "\n }")
    versions_line = f' "versions": {json.dumps(versions)}'
    TABLE.write_text("{\n" + ",\n".join([versions_line, *lines]) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
