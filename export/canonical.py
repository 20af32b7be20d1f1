"""The canonical form of a graph: what every dialect is made from.

fp32, opset 20, ``ir_version`` 10; every node named after the torch module it came from (metadata
``refedge.module``); constants folded; nothing in the file that depends on the machine it was
made on, so that equal models give equal bytes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from ..errors import ExportError
from .fold import fold_affine
from .linear import reorder

OPSET = 20
IR_VERSION = 10
MODULE = "refedge.module"

_SCOPES = "pkg.torch.onnx.name_scopes"
_MOVED = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Cast", "Identity", "Slice")
_FOLDED = (*_MOVED, "Pad", "Gather", "Add", "Conv")


def canonical(model: onnx.ModelProto, name: str, *, squeeze: bool = True) -> onnx.ModelProto:
    """Clean an exported graph in place and return it; see ``linear.reorder``."""
    _merge_dimension_names(model)
    fold_constants(model)
    _name_modules(model)
    _rename(model)
    fold_affine(model)
    reorder(model, squeeze=squeeze)
    _strip(model, name)
    model.ir_version = IR_VERSION
    versions = {o.domain: o.version for o in model.opset_import}
    if versions.get("") != OPSET:
        raise ExportError(
            "export-opset",
            f"the part {name!r} has opset {versions.get('')}",
            why=f"the canonical graph has opset {OPSET}",
            fix="export with a torch version that writes it (2.11 or later)",
        )
    return model


def module_of(node: onnx.NodeProto) -> str:
    """Name of the torch module a node came from; empty at the top."""
    return next((p.value for p in node.metadata_props if p.key == MODULE), "")


def place(node: onnx.NodeProto, module: str) -> None:
    """Say of a new node which torch module it belongs to."""
    node.metadata_props.append(onnx.StringStringEntryProto(key=MODULE, value=module))


def fold_constants(model: onnx.ModelProto) -> None:
    """Compute now what depends on weights alone.

    Mostly their movement, which is exact; sums of tables and convolutions of constant maps are what
    they would be at run time, in float32.
    """
    graph = model.graph
    constants: dict[str, TensorProto] = {t.name: t for t in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type in _FOLDED and all(i in constants for i in node.input if i):
            evaluator = ReferenceEvaluator(
                onnx.helper.make_model(
                    onnx.helper.make_graph(
                        [node],
                        "fold",
                        [],
                        [onnx.helper.make_empty_tensor_value_info(node.output[0])],
                        initializer=[constants[i] for i in node.input if i],
                    ),
                    opset_imports=model.opset_import,
                )
            )
            values: Any = evaluator.run(None, {})
            name = str(node.output[0])
            constants[name] = numpy_helper.from_array(np.asarray(values[0]), name)
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    used = {i for node in kept for i in node.input}
    del graph.initializer[:]
    graph.initializer.extend(t for name, t in constants.items() if name in used)


def _merge_dimension_names(model: onnx.ModelProto) -> None:
    """``images`` where the exporter says so, else ``batch``, whatever it called it."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        shape = value.type.tensor_type.shape
        for axis, dim in enumerate(shape.dim):
            if axis == 0 and dim.HasField("dim_param"):
                dim.dim_param = "images" if "images" in dim.dim_param else "batch"


def _name_modules(model: onnx.ModelProto) -> None:
    """Replace the exporter's metadata by the innermost module of each node."""
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), "")
        # "['', 'model.a', 'model.a.b', 'conv2d']": modules from outside in, then the operation
        modules = [s.strip(" '\"") for s in scopes.strip("[]").split(",")][:-1]
        module = modules[-1].removeprefix("model").removeprefix(".") if modules else ""
        del node.metadata_props[:]
        place(node, module)
    _inherit_modules(model)


def _inherit_modules(model: onnx.ModelProto) -> None:
    """A node the exporter did not place belongs where its first placed neighbour belongs."""
    makers = {o: node for node in model.graph.node for o in node.output}
    takers = {i: node for node in reversed(model.graph.node) for i in node.input}
    for node in model.graph.node:
        if module_of(node):
            continue
        near = [makers[i] for i in node.input if i in makers]
        near += [takers[o] for o in node.output if o in takers]
        module = next((module_of(n) for n in near if module_of(n)), "")
        node.metadata_props[0].value = module


def _rename(model: onnx.ModelProto) -> None:
    """Nodes by module, operator and number; weights by their torch name or their user's."""
    graph = model.graph
    counts: Counter[str] = Counter()
    for node in graph.node:
        stem = f"{module_of(node)}/{node.op_type}"
        counts[stem] += 1
        node.name = stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"
    renamed: dict[str, str] = {}
    for node in graph.node:
        for position, value in enumerate(node.input):
            renamed.setdefault(value, f"{node.name}.{position}")
    for tensor in graph.initializer:
        made_up = not tensor.name.startswith("model.")
        new = renamed[tensor.name] if made_up else tensor.name.removeprefix("model.")
        renamed[tensor.name] = tensor.name = new
    names = {t.name for t in graph.initializer}
    for node in graph.node:
        for position, value in enumerate(node.input):
            if renamed.get(value) in names:
                node.input[position] = renamed[value]


def _strip(model: onnx.ModelProto, name: str) -> None:
    """Drop what is not the graph: traces, paths, the exporter's notes."""
    graph = model.graph
    graph.name = name
    for holder in (model, graph):
        holder.doc_string = ""
        del holder.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    made = {o for node in graph.node for o in node.output}
    kept = [v for v in graph.value_info if v.name in made]
    del graph.value_info[:]
    graph.value_info.extend(sorted(kept, key=lambda v: v.name))
    for value in (*graph.value_info, *graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    model.producer_name, model.producer_version = "refedge", ""
