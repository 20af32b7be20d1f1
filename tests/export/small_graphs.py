"""Small graphs made by hand, and a way to run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from refedge.export.canonical import MODULE

Shape = Sequence[int | str]


def node(
    operator: str,
    inputs: Sequence[str],
    outputs: Sequence[str] | str,
    module: str = "",
    **attributes: Any,
) -> onnx.NodeProto:
    """A node that is named after its first output, and says which torch module it came from."""
    outputs = [outputs] if isinstance(outputs, str) else list(outputs)
    made = helper.make_node(
        operator, list(inputs), outputs, f"{module}/{operator}:{outputs[0]}", **attributes
    )
    made.metadata_props.append(onnx.StringStringEntryProto(key=MODULE, value=module))
    return made


def small(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Sequence[str],
    weights: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """A graph in the form of a canonical one: opset 20, ir 10, every shape known."""
    kinds = dict(dtypes or {})
    graph = helper.make_graph(
        list(nodes),
        "mask",
        [
            helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s)
            for n, s in inputs.items()
        ],
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), None) for n in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def run(
    model: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    taps: Mapping[str, int] | None = None,
    *,
    optimised: bool = False,
    keep: Path | None = None,
) -> dict[str, np.ndarray]:
    """Outputs by name on ONNX Runtime; with ``taps`` these tensors (and dtypes) instead.

    keep: where the optimised graph is written to.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if taps is not None:
        del copy.graph.output[:]
        copy.graph.output.extend(
            helper.make_tensor_value_info(name, kind, None) for name, kind in taps.items()
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if keep is not None:
        options.optimized_model_filepath = str(keep)
    session = onnxruntime.InferenceSession(
        copy.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def operators(model: onnx.ModelProto | Path) -> set[str]:
    model = onnx.load(model) if isinstance(model, Path) else model
    return {n.op_type for n in model.graph.node}
