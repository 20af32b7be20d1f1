"""Which operators TensorRT's ONNX parser takes, and of which types.

From the parser's own tables, onnx-tensorrt ``docs/operators.md``: ``trt8`` is 8.6 (commit 6ba67d3);
``trt10`` is what 10.1 (96e7811), 10.15 and 11.1 (7c51a63) all take. The tables of 10.3 and 10.13
lie between these and were not to be had. Types are those of the data that an operator works on;
bfloat16, float8 and int4 are left out. Of more operators the dialects make no use.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from onnx import TensorProto

_F = {TensorProto.FLOAT, TensorProto.FLOAT16}
_I32 = {TensorProto.INT32, TensorProto.INT64}  # 8.6 casts int64 to int32, 10 has both
_B = {TensorProto.BOOL}
_I8 = {TensorProto.INT8}

_FLOATS = """
    BatchNormalization Ceil Einsum Erf Exp Floor InstanceNormalization LayerNormalization Log
    LogSoftmax MatMul Pow QuantizeLinear Reciprocal Resize Sin Softmax Sqrt
"""
_FLOATS_INT8 = """
    Clip Conv ConvTranspose Elu Gemm GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish
    LeakyRelu MaxPool PRelu Round Selu Sigmoid Softplus Tanh
"""  # int8 in 8.6 only; later it is all pairs
_NUMBERS = """
    Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min
    Mul Neg SpaceToDepth Sub Sum TopK
"""
_NUMBERS_INT8 = "Pad ScatterElements ScatterND Sign"
_REDUCE = "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum"
_MOVES_INT8 = """
    Concat Gather GatherElements GatherND Identity Reshape Slice Squeeze Transpose Unsqueeze
"""
_MOVES = "Expand Flatten Split Tile Where"
_LOGIC = "And Not Or Xor"


def _table(*rows: tuple[str, AbstractSet[int]]) -> dict[str, frozenset[int]]:
    return {name: frozenset(types) for names, types in rows for name in names.split()}


TYPES = {
    "trt8": _table(
        (_FLOATS, _F),
        (_FLOATS_INT8, _F | _I8),
        (_NUMBERS, _F | _I32),
        (_NUMBERS_INT8 + " AveragePool", _F | _I32 | _I8),
        ("Relu", _F | _I8),
        (_REDUCE, _F),
        (_MOVES_INT8, _F | _I32 | _I8 | _B),
        (_MOVES, _F | _I32 | _B),
        (_LOGIC, _B),
        ("Cast", _F | _I32 | _I8 | _B | {TensorProto.UINT8}),
        ("DequantizeLinear", _I8),
    ),
    "trt10": _table(
        (_FLOATS + _FLOATS_INT8 + " AveragePool", _F),
        (f"{_NUMBERS} {_NUMBERS_INT8} {_REDUCE} Relu", _F | _I32),
        (_MOVES_INT8 + _MOVES, _F | _I32 | _B),
        (_LOGIC, _B),
        ("Cast", _F | _I32 | _B | {TensorProto.UINT8}),
        ("DequantizeLinear", _I8),
        ("Gelu", _F | _I32 | _I8),
    ),
}
