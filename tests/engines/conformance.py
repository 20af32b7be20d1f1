"""Which names of TensorRT's bindings a module uses, and where one of its versions lacks them.

The module is walked once per version: a condition that asks ``hasattr`` of a TensorRT object is
decided by the table of real names, so that a guarded name is looked up only where its guard lets
it through. Types follow from the table (what ``create_network`` returns), and, at a function's
door, from the names of its arguments.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("tensorrt_names.json").read_text())
VERSIONS: list[str] = TABLE["versions"]
# what an argument of that name is; every argument typed Any must be here or in PLAIN
ARGUMENTS = {
    "trt": "module",
    "trtp": "class plugin",
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "logger": "ILogger",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "registry": "IPluginRegistry",
    "runtime": "Runtime",
    "tensor": "ITensor",
}
PLAIN = {"severity", "found", "items", "entry", "arguments", "layers", "driver", "annotation"}
PLAIN |= {"function", "part", "whole"}
FLAGS = {"yes", "no", "nothing"}  # what a variable holds of a hasattr or getattr
OWN = {"lines"}  # what our own subclasses add
# what our own functions return
OURS = {"new_log": "ILogger", "open_tensorrt": "module", "_timing_cache": "ITimingCache"}
# functions that may only be called, and are only read, where a class has a name
BEHIND = {
    "new_progress": ("IBuilderConfig", "progress_monitor"),
    "_pin": ("BuilderFlag", "OBEY_PRECISION_CONSTRAINTS"),
    "_declare": ("", "QuickPluginCreationRequest"),
}


def _calls(node: ast.expr, name: str) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


@dataclass
class Walk:
    """One module under one version."""

    version: str
    faults: list[str] = field(default_factory=list)
    seen: set[tuple[str, str]] = field(default_factory=set)
    types: dict[str, str] = field(default_factory=dict)

    def has(self, group: str, name: str) -> bool:
        return self.version in TABLE.get(group, {}).get(name, [""])[0].split()

    # statements -----------------------------------------------------------------------------
    def block(self, body: list[ast.stmt]) -> bool:
        """Walk statements; True where what follows them is not reached."""
        return any(self.statement(node) for node in body)

    def statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.If):
            decided = self.decide(node.test)
            ends = [
                self.block(branch)
                for branch, value in ((node.body, True), (node.orelse, False))
                if decided in (None, value)
            ]
            return all(ends)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self.definition(node)
            return False
        if isinstance(node, ast.Assign):
            kind = self.kind(node.value)
            if _calls(node.value, "hasattr"):
                kind = {True: "yes", False: "no", None: ""}[self.decide(node.value)]
            for target in node.targets:
                self.bind(target, kind)
            return False
        if isinstance(node, ast.For):
            self.bind(node.target, self.element(node.iter))
            self.block(node.body)
            return False
        if isinstance(node, ast.Try):
            self.block(node.body)
            for handler in node.handlers:
                self.block(handler.body)
            self.block(node.finalbody)
            return False
        if isinstance(node, (ast.With, ast.While)):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.kind(child)
            return self.block(node.body) and isinstance(node, ast.With)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.kind(child)
        return isinstance(node, (ast.Return, ast.Raise, ast.Continue, ast.Break))

    def definition(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        if node.name in BEHIND and not self.has(*BEHIND[node.name]):
            return
        outer = dict(self.types)
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                self.kind(base)
            if node.bases and (held := self.kind(node.bases[0])).startswith("class "):
                self.types["self"] = held.removeprefix("class ")
        else:
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            for argument in arguments:
                if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Any":
                    name = argument.arg
                    if name not in ARGUMENTS and name not in PLAIN:
                        self.fault(argument, f"an argument {name!r} of unknown type")
                    self.types[name] = ARGUMENTS.get(name, "")
                elif argument.arg != "self":
                    self.types[argument.arg] = ""
        self.block(node.body)
        kept = {k: v for k, v in self.types.items() if k.startswith("self.")}
        self.types = {**outer, **kept}

    def bind(self, target: ast.expr, kind: str) -> None:
        if isinstance(target, ast.Name):
            self.types[target.id] = kind
        elif isinstance(target, ast.Attribute):
            self.kind(target)
            if isinstance(target.value, ast.Name) and target.value.id == "self":
                self.types[f"self.{target.attr}"] = kind
        elif isinstance(target, ast.Tuple):
            for part in target.elts:
                self.bind(part, kind.removeprefix("each ") if kind.startswith("each ") else "")

    # expressions ----------------------------------------------------------------------------
    def decide(self, test: ast.expr) -> bool | None:
        """True or False where the table knows; None elsewhere, having walked the test."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            decided = self.decide(test.operand)
            return None if decided is None else not decided
        if isinstance(test, ast.BoolOp):
            stop = isinstance(test.op, ast.Or)
            results = []
            for value in test.values:
                results.append(self.decide(value))
                if results[-1] is stop:
                    return stop
            return None if None in results else not stop
        if _calls(test, "hasattr"):
            kind = self.kind(test.args[0])
            if kind and isinstance(test.args[1], ast.Constant):
                return self.has(self.group(kind), str(test.args[1].value))
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.Is, ast.IsNot)):
            kind = self.kind(test.left)  # of getattr(trt, "Name", None)
            if kind == "nothing" or kind.startswith("class "):
                return (kind == "nothing") == isinstance(test.ops[0], ast.Is)
        kind = self.kind(test)
        return {"yes": True, "no": False}.get(kind)

    def kind(self, node: ast.expr) -> str:
        """What an expression is: a class's name, ``class X``, ``list X``, ``module`` or ''."""
        if isinstance(node, ast.Name):
            return self.types.get(node.id, "")
        if isinstance(node, ast.Attribute):
            return self.attribute(node)
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.IfExp):
            decided = self.decide(node.test)
            kinds = [
                self.kind(branch)
                for branch, value in ((node.body, True), (node.orelse, False))
                if decided in (None, value)
            ]
            return kinds[0]
        if isinstance(node, ast.BoolOp):
            self.decide(node)
            return ""
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)):
            for generator in node.generators:
                self.bind(generator.target, self.element(generator.iter))
                for test in generator.ifs:
                    self.decide(test)
            if isinstance(node, ast.DictComp):
                self.kind(node.key)
                self.kind(node.value)
                return ""
            inner = self.kind(node.elt)
            return f"list {inner}" if inner else ""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.kind(child)
        return ""

    def attribute(self, node: ast.Attribute) -> str:
        kind = self.kind(node.value)
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            own = self.types.get(f"self.{node.attr}")
            if own is not None or node.attr.startswith("_") or not kind:
                return own or ""
        if not kind or kind in FLAGS or kind.startswith("list ") or node.attr in OWN:
            return ""
        group = self.group(kind)
        if node.attr.startswith("__") and node.attr != "__version__":
            return ""
        self.seen.add((group, node.attr))
        if not self.has(group, node.attr):
            self.fault(node, f"{group or 'tensorrt'}.{node.attr}")
            return ""
        if kind == "module":
            return f"class {node.attr}" if node.attr in TABLE else ""
        if kind.startswith("class "):
            return ""
        return str(TABLE[group][node.attr][2])

    def call(self, node: ast.Call) -> str:
        for name, behind in BEHIND.items():
            if _calls(node, name) and not self.has(*behind):
                self.fault(node, f"{name} outside its guard")
        if _calls(node, "getattr") and isinstance(node.args[1], ast.Constant):
            kind, name = self.kind(node.args[0]), str(node.args[1].value)
            if kind == "module":
                return f"class {name}" if self.has("", name) else "nothing"
        made = self.kind(node.func)
        for argument in [*node.args, *(k.value for k in node.keywords)]:
            self.kind(argument)
        for name, result in OURS.items():
            if _calls(node, name):
                return result
        if isinstance(node.func, ast.Attribute):
            holder = self.kind(node.func.value)
            if holder and not holder.startswith("list "):
                row = TABLE.get(self.group(holder), {}).get(node.func.attr)
                for keyword in node.keywords:
                    if row is not None and keyword.arg not in row[1]:
                        self.fault(node, f"{node.func.attr}({keyword.arg}=)")
                if holder == "module" and row is not None:
                    return made.removeprefix("class ") or str(row[2])
        return made

    def element(self, node: ast.expr) -> str:
        if _calls(node, "enumerate"):
            inner = self.element(node.args[0])
            return f"each {inner}" if inner else ""
        kind = self.kind(node)
        return kind.removeprefix("list ") if kind.startswith("list ") else ""

    def group(self, kind: str) -> str:
        return "" if kind == "module" else kind.removeprefix("class ")

    def fault(self, node: ast.AST, what: str) -> None:
        self.faults.append(f"line {getattr(node, 'lineno', 0)}: {what} is not in {self.version}")


def faults(source: str) -> list[str]:
    """What a module uses that a supported version does not have."""
    found = []
    for version in VERSIONS:
        walk = Walk(version)
        walk.block(ast.parse(source).body)
        found += walk.faults
    return found


def uses(source: str) -> set[tuple[str, str]]:
    """Every (class, name) that a module uses under any version; class '' for the module itself."""
    found: set[tuple[str, str]] = set()
    for version in VERSIONS:
        walk = Walk(version)
        walk.block(ast.parse(source).body)
        found |= walk.seen
    return found
