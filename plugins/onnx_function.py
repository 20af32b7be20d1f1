"""The fused operators as ONNX functions of one dtype each: what a runtime without a plugin runs.

Domain ``refedge``; the name says the dtype, ``NormAttention_float16``, because a function that
casts like its input is one that TensorRT's parser does not take. Softmax, mean, covariance and the
centring compute in float32 whatever the dtype; rounding comes after ``P - mean(P)``.
"""

from __future__ import annotations

from typing import Any, Literal

import onnx
from onnx import parser

DOMAIN = "refedge"
OPSET = 20
Dtype = Literal["float32", "float16", "bfloat16"]
_TO = {"float16": 10, "bfloat16": 16}  # of onnx.TensorProto
_MASKED = "-10000.0"
# attributes by which TensorRT's parser finds a plugin; the function has no use for them
PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
_PLUGIN = ", ".join(f'{name}: string = "{value}"' for name, value in PLUGIN.items())

_CROSS = """
CrossAttention_{dtype} <{plugin}> (x, keys, values, words, offset) => (y) {{
  pixels = Constant <value_ints = [1]> ()
  middle = Constant <value_ints = [1, 2]> ()
  columns = Constant <value_ints = [0, 0, -1]> ()
  kept = Constant <value_ints = [0, 0]> ()
  rows = Constant <value_ints = [0, -1]> ()
  keys_flat = Reshape (keys, columns)
  scores = MatMul (x, keys_flat)
  scores_f = {up} (scores)
  counts = Shape <start = 2> (keys)
  split = Concat <axis = 0> (kept, counts)
  apart = Reshape (scores_f, split)
  offset_f = {up} (offset)
  shift = Unsqueeze (offset_f, pixels)
  shifted = Add (apart, shift)
  valid = Unsqueeze (words, middle)
  masked = Constant <value = float {{{masked}}}> ()
  only = Where (valid, shifted, masked)
  weights_f = Softmax <axis = 3> (only)
  weights = {down} (weights_f)
  together = Reshape (weights, columns)
  width = Shape <start = 3> (values)
  size = Concat <axis = 0> (rows, width)
  values_flat = Reshape (values, size)
  y = MatMul (together, values_flat)
}}"""

_NORM = """
NormAttention_{dtype} <epsilon: float = 1e-5, {plugin}> (query, keys, values, words, first, second)
    => (y, relevance) {{
  last = Constant <value_ints = [2]> ()
  over = Constant <value_ints = [1]> ()
  scores = MatMul (keys, query)
  scores_f = {up} (scores)
  valid = Unsqueeze (words, last)
  masked = Constant <value = float {{{masked}}}> ()
  only = Where (valid, scores_f, masked)
  weights = Softmax <axis = 1> (only)
  relevance = ReduceMax <keepdims = 0> (weights, over)
  mean = ReduceMean (weights, last)
  centred = Sub (weights, mean)
  turned = Transpose <perm = [0, 2, 1]> (centred)
  sums = MatMul (centred, turned)
  size = Shape <start = 2> (weights)
  pixels = Cast <to = 1> (size)
  covariance = Div (sums, pixels)
  values_f = {up} (values)
  shared = MatMul (values_f, mean)
  shifted = Sub (values_f, shared)
  spread = MatMul (shifted, covariance)
  squares = Mul (spread, shifted)
  variance = ReduceSum (squares, last)
  positive = Relu (variance)
  small = Constant <value_float: float = @epsilon> ()
  safe = Add (positive, small)
  deviation = Sqrt (safe)
  columns_f = Div (shifted, deviation)
  columns = {down} (columns_f)
  rounded = {down} (centred)
  found = MatMul (columns, rounded)
  thin = MatMul (first, columns)
  opened = MatMul (thin, rounded)
  rectified = Relu (opened)
  gate = MatMul (second, rectified)
  open = Tanh (gate)
  y = Mul (open, found)
}}"""

_MUTUAL = """
MutualAttention_{dtype} <{plugin}> (keys, values, words, seen_keys, seen_values) => (y, told) {{
  heads = Constant <value_ints = [1]> ()
  sides = Constant <value_ints = [1, 3]> ()
  flat = Constant <value_ints = [0, -1, 0]> ()
  scores = MatMul (keys, seen_keys)
  scores_f = {up} (scores)
  by_pixel_f = Softmax <axis = 3> (scores_f)
  by_pixel = {down} (by_pixel_f)
  seen = MatMul (by_pixel, seen_values)
  valid = Unsqueeze (words, sides)
  masked = Constant <value = float {{{masked}}}> ()
  only = Where (valid, scores_f, masked)
  by_word_f = Softmax <axis = 2> (only)
  told = ReduceMean <keepdims = 0> (by_word_f, heads)
  by_word = {down} (by_word_f)
  turned = Transpose <perm = [0, 1, 3, 2]> (values)
  pairs_raw = MatMul (seen, turned)
  pairs_f = {up} (pairs_raw)
  nothing = Constant <value = float {{0.0}}> ()
  pairs_valid = Where (valid, pairs_f, nothing)
  shape = Shape <start = 1> (values)
  head_count = Gather <axis = 0> (shape, first_place)
  depth = Gather <axis = 0> (shape, last_place)
  widths = Mul (head_count, depth)
  widths_f = Cast <to = 1> (widths)
  root = Sqrt (widths_f)
  shared_f = Div (pairs_valid, root)
  shared = {down} (shared_f)
  each = MatMul (shared, by_word)
  y = ReduceSum <keepdims = 0> (each, heads)
}}"""
_MUTUAL = _MUTUAL.replace(
    "  shape = Shape",
    "  first_place = Constant <value_int = 0> ()\n  last_place = Constant <value_int = 2> ()\n"
    "  shape = Shape",
)
_BODIES = {"CrossAttention": _CROSS, "NormAttention": _NORM, "MutualAttention": _MUTUAL}


def function(operator: str, dtype: Dtype = "float32") -> onnx.FunctionProto:
    """The function of an operator: ``CrossAttention``, ``NormAttention``, ``MutualAttention``."""
    up, down = "Identity", "Identity"
    if dtype in _TO:
        up, down = "Cast <to = 1>", f"Cast <to = {_TO[dtype]}>"
    body = _BODIES[operator].format(dtype=dtype, up=up, down=down, masked=_MASKED, plugin=_PLUGIN)
    head = f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">'
    return parser.parse_function(head + body)


def node(
    operator: str,
    inputs: list[str],
    outputs: list[str],
    dtype: Dtype = "float32",
    name: str = "",
    **attributes: float,
) -> onnx.NodeProto:
    """A call of the function, which the model needs among its functions; see ``attach``."""
    kind = f"{operator}_{dtype}"
    settings: dict[str, Any] = {**PLUGIN, **attributes}
    return onnx.helper.make_node(kind, inputs, outputs, name, domain=DOMAIN, **settings)


def attach(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a model the functions that its nodes call; in place."""
    called = {n.op_type for n in model.graph.node if n.domain == DOMAIN}
    for name in sorted(called - {f.name for f in model.functions}):
        operator, _, dtype = name.rpartition("_")
        model.functions.append(function(operator, dtype))
    if called and DOMAIN not in {o.domain for o in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return model
