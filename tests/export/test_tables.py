"""Embedding tables as integers by row."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from refedge.export.tables import store_tables

from .small_graphs import node, run, small

ROWS, WIDTH = 3000, 96  # 1.15 MB
IDS = {"ids": np.array([[0, 1, 7, 2999], [5, 5, 2, 1]], np.int32)}


def table(rows: int = ROWS) -> np.ndarray:
    """Rows of very different sizes; the first is empty, as that of padding often is."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(size=(rows, 1)) * 2)
    values = (rng.normal(size=(rows, WIDTH)) * sizes).astype(np.float32)
    values[0] = 0
    return values


def network(values: np.ndarray, **settings: int) -> onnx.ModelProto:
    model = small(
        [node("Gather", ["table", "ids"], "y", **settings)],
        {"ids": ("batch", 4)},
        ["y"],
        {"table": values},
        {"ids": TensorProto.INT32},
    )
    return onnx.shape_inference.infer_shapes(model)


def kinds(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def test_a_row_is_as_near_as_eight_bits_are() -> None:
    values = table()
    model = store_tables(network(values))
    onnx.checker.check_model(model, full_check=True)
    found = run(model, IDS)["y"]
    wanted = values[IDS["ids"]]
    step = np.abs(wanted).max(axis=-1, keepdims=True) / 127
    assert (np.abs(found - wanted) <= step * 0.501).all()
    assert not found[0, 0].any()
    sizes = {t.name: numpy_helper.to_array(t).nbytes for t in model.graph.initializer}
    assert sizes.pop("table/int8") == ROWS * WIDTH
    assert sum(sizes.values()) == 4 * ROWS + 8


def test_no_table_is_computed_as_a_whole() -> None:
    model = store_tables(network(table()))
    gathered = {n.input[0] for n in model.graph.node if n.op_type == "Gather"}
    assert gathered == {
        t.name for t in model.graph.initializer if len(t.dims) and t.dims[0] == ROWS
    }


@pytest.mark.parametrize(
    "model",
    [
        network(table(100)),
        network(np.ascontiguousarray(table().T), axis=1),
    ],
    ids=["small", "by columns"],
)
def test_others_stay(model: onnx.ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    assert store_tables(model).SerializeToString(deterministic=True) == before


def test_a_table_that_something_else_reads_stays() -> None:
    model = network(table())
    model.graph.node.append(helper.make_node("Transpose", ["table"], ["turned"], "again"))
    model.graph.output.append(helper.make_tensor_value_info("turned", TensorProto.FLOAT, None))
    assert kinds(store_tables(model)) == ["Gather", "Transpose"]
