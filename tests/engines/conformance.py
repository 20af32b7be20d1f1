"""Which names of TensorRT's bindings a module uses, and where one of its versions lacks them.

The module is walked once per version: a condition that asks ``hasattr`` of a TensorRT object is
decided by the table of real names, so that a guarded name is looked up only where its guard lets
it through. Types follow from annotations (``context: trt.IExecutionContext``), from the table (what
``create_network`` returns), and from our own classes and functions, in whatever module they are.
A name of TensorRT's on a value whose type is unknown is a fault too: nothing passes unseen.
"""

from __future__ import annotations

import ast
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

ROOT = Path(__file__).parents[2]
MODULES = [
    *sorted((ROOT / "engines").glob("*.py")),
    *sorted((ROOT / "runtime" / "backends").glob("*.py")),
    ROOT / "plugins" / "native.py",
    ROOT / "plugins" / "quick.py",
]
TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("tensorrt_names.json").read_text())
VERSIONS: list[str] = TABLE["versions"]
# what cannot be annotated: a module, and our logger, which TensorRT's class knows nothing of
ARGUMENTS = {"trt": "module", "trtp": "class plugin", "logger": "ILogger"}
OURS = {"open_tensorrt": "module", "tensorrt": "pair", "new_log": "ILogger"}
OWN = {"lines", "take"}  # what our logger adds
# arguments of type Any that have nothing to do with TensorRT
PLAIN = {"severity", "found", "items", "entry", "arguments", "layers", "lib", "memory", "value"}
PLAIN |= {"driver", "annotation", "function", "part", "whole"}
FLAGS = {"yes", "no", "nothing"}  # what a variable holds of a hasattr or getattr
VALUE = "a value"  # what TensorRT gives that is no object of its own: a number, a text, a list
METHODS = {name for kind in (str, int, list, tuple, bytes) for name in dir(kind)}
# names that TensorRT shares with numpy, dataclasses and ourselves: these alone say nothing
SHARED = """
    context dtype engine file flags graph itemsize load log name nbytes outputs precision profile
    run shape size stream type value
"""
TELLING = {n for group, names in TABLE.items() if group not in ("", "versions") for n in names}
TELLING |= {n for n in TABLE[""] if n[0].isupper() or n.startswith(("get_", "init_"))}
TELLING -= {*SHARED.split(), *METHODS}
# functions that may only be called, and are only read, where a class has a name
BEHIND = {
    "new_progress": ("IBuilderConfig", "progress_monitor"),
    "_pin": ("BuilderFlag", "OBEY_PRECISION_CONSTRAINTS"),
    "_declare": ("", "QuickPluginCreationRequest"),
}


def _calls(node: ast.expr, name: str) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def annotated(node: ast.expr | None) -> str:
    """What an annotation says: a class of TensorRT's, ``own X`` for any other, '' for Any."""
    if isinstance(node, ast.BinOp):  # X | None
        return annotated(node.left)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "trt" else f"own {node.attr}"
    if isinstance(node, ast.Subscript):
        return annotated(node.value)
    return f"own {node.id}" if isinstance(node, ast.Name) and node.id != "Any" else ""


@functools.cache
def _own(source: str) -> dict[str, dict[str, str]]:
    """A module's classes with their attributes, and its functions under '', by annotations."""
    found: dict[str, dict[str, str]] = {"": {}}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            found[""][node.name] = annotated(node.returns)
        if isinstance(node, ast.ClassDef):
            members = found.setdefault(node.name, {})
            for child in node.body:
                if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                    members[child.target.id] = annotated(child.annotation)
                if isinstance(child, ast.FunctionDef):
                    members[child.name] = annotated(child.returns)
                    if child.name == "__init__":
                        members |= _fields(child)
    return found


def _all_own(path: Path, source: str) -> dict[str, dict[str, str]]:
    """Of all our modules, and of a module as it is given."""
    found: dict[str, dict[str, str]] = {"": {}}
    for other in (*MODULES, *(ROOT / "runtime").glob("*.py"), path):
        for name, members in _own(source if other == path else other.read_text()).items():
            found[name] = {**found.get(name, {}), **members}
    found[""] |= OURS
    return found


def _fields(made: ast.FunctionDef) -> dict[str, str]:
    """``self.x`` of an ``__init__``: what an argument brought, or what was made there."""
    brought = {a.arg: annotated(a.annotation) for a in (*made.args.args, *made.args.kwonlyargs)}
    found = {}
    for node in ast.walk(made):
        pairs: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = list(zip(target.elts, value.elts)) if both else [(target, value)]  # type: ignore[attr-defined]  # noqa: B905
        for target, value in pairs:
            if isinstance(target, ast.Attribute):
                if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
                    found[target.attr] = f"own {value.func.id}"
                elif isinstance(value, ast.Name):
                    found[target.attr] = brought.get(value.id, "")
    return found


@dataclass
class Walk:
    """One module under one version.

    own: our classes, their attributes' types; under '' our functions, what they return.
    """

    version: str
    own: dict[str, dict[str, str]]
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
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for part, value in zip(target.elts, node.value.elts, strict=True):
                        self.bind(part, self.kind(value))
                else:
                    self.bind(target, kind)
            return False
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in node.names if isinstance(node, ast.Import) else []:
                self.types[name.asname or name.name.partition(".")[0]] = "own module"
            return False
        if isinstance(node, ast.AnnAssign):
            made = self.kind(node.value) if node.value is not None else ""
            self.bind(node.target, annotated(node.annotation) or made)
            return False
        if isinstance(node, ast.For):
            self.bind(node.target, self.element(node.iter))
            self.block(node.body)
            return False
        if isinstance(node, ast.Try):
            self.block(node.body)
            for handler in node.handlers:
                if handler.name is not None:
                    self.types[handler.name] = "own exception"
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
            held = self.kind(node.bases[0]) if node.bases else ""
            known = held.startswith("class ")
            self.types["self"] = held.removeprefix("class ") if known else f"own {node.name}"
        else:
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            for argument in arguments:
                name = argument.arg
                if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Any":
                    if name not in ARGUMENTS and name not in PLAIN:
                        self.fault(argument, f"an argument {name!r} of unknown type")
                    self.types[name] = ARGUMENTS.get(name, "")
                elif name != "self":
                    self.types[name] = annotated(argument.annotation)
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
            pair = ("module", "ILogger") if kind == "pair" else ("",) * len(target.elts)
            for part, held in zip(target.elts, pair, strict=True):
                self.bind(part, kind.removeprefix("each ") if kind.startswith("each ") else held)

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
            if self.group(kind) in TABLE and isinstance(test.args[1], ast.Constant):
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
        if isinstance(node, ast.Subscript) and self.kind(node.value) == "pair":
            which = node.slice.value if isinstance(node.slice, ast.Constant) else None
            return "module" if which == 0 else "ILogger"
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
        kind, name = self.kind(node.value), node.attr
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            held = self.types.get(f"self.{name}")
            if held is not None or (name.startswith("_") and not kind.startswith("own ")):
                return held or ""
        if kind.startswith("own "):
            return self.own.get(kind.removeprefix("own "), {}).get(name, "")
        if self.group(kind) not in TABLE:
            if (not kind and name in TELLING) or (kind == VALUE and name not in METHODS):
                self.faults.append(f"line {node.lineno}: .{name} of an unknown type is unresolved")
            return ""
        if kind == "ILogger" and name in OWN:
            return ""
        group = self.group(kind)
        if name.startswith("__") and name != "__version__":
            return ""
        self.seen.add((group, name))
        if not self.has(group, name):
            self.fault(node, f"{group or 'tensorrt'}.{name}")
            return ""
        if kind == "module":
            return f"class {name}" if name in TABLE else ""
        if kind.startswith(
            "class "
        ):  # an enumeration's member; of a submodule, a class or function
            return "" if group == "plugin" else group
        return str(TABLE[group][name][2]) or VALUE

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
        if isinstance(node.func, ast.Name) and not self.types.get(node.func.id):
            name = node.func.id
            return f"own {name}" if name in self.own else self.own[""].get(name, "")
        if isinstance(node.func, ast.Attribute):
            holder = self.kind(node.func.value)
            if self.group(holder) in TABLE:
                row = TABLE[self.group(holder)].get(node.func.attr)
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
        """The table's name for a kind; ``module`` is ''."""
        return "" if kind == "module" else kind.removeprefix("class ") or "none"

    def fault(self, node: ast.AST, what: str) -> None:
        self.faults.append(f"line {getattr(node, 'lineno', 0)}: {what} is not in {self.version}")


def walks(path: Path, source: str | None = None) -> list[Walk]:
    """A module, or what it would be with another source, under every version."""
    text = path.read_text() if source is None else source
    made = [Walk(version, _all_own(path, text)) for version in VERSIONS]
    for walk in made:
        walk.block(ast.parse(text).body)
    return made


def faults(path: Path, source: str | None = None) -> list[str]:
    """What a module uses that a supported version does not have, or that cannot be told."""
    return list(dict.fromkeys(fault for walk in walks(path, source) for fault in walk.faults))


def uses(path: Path) -> set[tuple[str, str]]:
    """Every (class, name) that a module uses under any version; class '' for the module itself."""
    return {use for walk in walks(path) for use in walk.seen}
