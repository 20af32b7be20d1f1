"""The engine inspector's JSON as TensorRT 8.6, 10 and 11 write it.

The entries below keep the keys, spellings and value forms of outputs that are public: 8.6 with
``Format/Datatype`` sentences and ``Bindings``, 10 with ``Metadata`` and Myelin's ``gemm`` and
``kgen``, 11 with ``Datatype`` beside ``Format`` and ``I/O Tensors``.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refedge.engines.layers import Inspection, Wanted, inspect_layers, read_layers, require_plan
from refedge.errors import EngineError


def tensor8(name: str, shape: list[int], kind: str) -> dict[str, Any]:
    return {"Name": name, "Location": "Device", "Dimensions": shape, "Format/Datatype": kind}


def tensor11(name: str, shape: list[int], kind: str) -> dict[str, Any]:
    return {"Name": name, "Dimensions": shape, "Format": "LINEAR", "Datatype": kind}


INT8 = "Thirty-two wide channel vectorized row major Int8 format"
HALF = "Channel major FP16 format where channel % 8 == 0"
FLOAT = "Row major linear FP32"
UNKNOWN = "N/A due to dynamic shapes"

CONV_8 = {
    "Name": "stem/Conv:c + stem/Relu:y",
    "LayerType": "CaskConvolution",
    "Inputs": [tensor8("x", [1, 16, 28, 28], INT8)],
    "Outputs": [tensor8("y", [1, 32, 14, 14], INT8)],
    "ParameterType": "Convolution",
    "Kernel": [3, 3],
    "PaddingMode": "kEXPLICIT_ROUND_DOWN",
    "PrePadding": [1, 1],
    "PostPadding": [1, 1],
    "Stride": [2, 2],
    "Dilation": [1, 1],
    "OutMaps": 32,
    "Groups": 2,
    "Weights": {"Type": "Int8", "Count": 2304},
    "Bias": {"Type": "Float", "Count": 32},
    "HasSparseWeights": 0,
    "Activation": "RELU",
    "HasBias": 1,
    "HasReLU": 1,
    "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs",
    "TacticValue": "0x11bde0e1d9f2f35d",
}
REFORMAT_8 = {
    "Name": "Reformatting CopyNode for Input Tensor 0 to stem/Conv:c + stem/Relu:y",
    "LayerType": "Reformat",
    "Inputs": [tensor8("pixels", [1, 16, 28, 28], FLOAT)],
    "Outputs": [tensor8("x", [1, 16, 28, 28], INT8)],
    "ParameterType": "Reformat",
    "Origin": "REFORMAT",
    "TacticValue": "0x00000000000003e8",
}
MYELIN_8 = {
    "Name": "{ForeignNode[head/Transpose:t...head/Softmax:s]}",
    "LayerType": "Myelin",
    "Inputs": [tensor8("y", [1, 32, 14, 14], HALF)],
    "Outputs": [tensor8("s", [1, 20, 196], HALF)],
    "TacticValue": "0x0000000000000000",
}
PLUGIN_8 = {
    "Name": "head/CrossAttention:a",
    "LayerType": "PluginV2",
    "Inputs": [tensor8("y", [1, 32, 196], HALF)],
    "Outputs": [tensor8("a", [1, 32, 196], HALF)],
    "ParameterType": "PluginV2",
    "PluginType": "CrossAttention",
    "TacticValue": "0x0000000000000000",
}
GEMM_10 = {
    "Name": "head/MatMul:m_myl0_4",
    "LayerType": "gemm",
    "Inputs": [tensor8("a", [2, 196, 64], "Half"), tensor8("w", [64, 32], "Half")],
    "Outputs": [tensor8("m", [2, 196, 32], "Half")],
    "TacticName": "sm80_xmma_gemm_f16f16_f16f32_f32_nn_n",
    "StreamId": 0,
    "Metadata": "[ONNX Layer: head/MatMul:m]\x1f[ONNX Layer: head/Add:b]",
}
KGEN_10 = {
    "Name": "__myl_ReplCastMulMean_myl0_3",
    "LayerType": "kgen",
    "Inputs": [tensor8("m", [2, 196, 32], "Half")],
    "Outputs": [tensor8("n", [2, 196, 1], "Float")],
    "TacticName": "__myl_ReplCastMulMean_0x29a1",
    "StreamId": 0,
    "Metadata": "[ONNX Layer: head/LayerNormalization:n]",
}
CONV_11 = {
    **{k: v for k, v in CONV_8.items() if k not in ("Inputs", "Outputs", "Weights")},
    "Name": "stem/Conv:c_myl0_1",
    "Inputs": [tensor11("x", [1, 16, 28, 28], "FP32")],
    "Outputs": [tensor11("y", [1, 32, 14, 14], "FP32")],
    "TacticName": "sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32",
    "Metadata": "[ONNX Layer: stem/Conv:c]",
}
WRITTEN_8 = json.dumps({"Layers": [REFORMAT_8, CONV_8, MYELIN_8, PLUGIN_8], "Bindings": ["pixels"]})
WRITTEN_10 = json.dumps({"Layers": [GEMM_10, KGEN_10], "Bindings": ["a", "n"]})
WRITTEN_11 = json.dumps(
    {
        "Layers": [CONV_11],
        "I/O Tensors": [
            {"Name": "x", "IOMode": "Input", "DataType": "FP32", "Dimensions": [-1, 16, 28, 28]}
        ],
    }
)


def test_what_8_6_writes() -> None:
    reformat, conv, myelin, plugin = read_layers(WRITTEN_8)
    assert (reformat.kind, reformat.macs) == ("other", 0)
    assert (conv.kind, conv.precision) == ("conv", "int8")
    assert conv.nodes == ("stem/Conv:c", "stem/Relu:y")
    assert conv.macs == 32 * 14 * 14 * 9 * 8  # 16 channels in two groups
    assert (myelin.kind, plugin.kind) == ("opaque", "plugin")


def test_what_10_writes() -> None:
    gemm, kgen = read_layers(WRITTEN_10)
    assert (gemm.kind, gemm.precision, gemm.macs) == ("gemm", "fp16", 2 * 196 * 64 * 32)
    assert gemm.nodes == ("head/MatMul:m", "head/Add:b")
    assert kgen.kind == "opaque"


def test_what_11_writes() -> None:
    (conv,) = read_layers(WRITTEN_11)
    assert (conv.kind, conv.precision, conv.nodes) == ("conv", "fp32", ("stem/Conv:c",))


def test_types_that_dynamic_shapes_hide_are_read_from_weights_and_kernels() -> None:
    shape = [-1, 16, 28, 28]
    hidden = {
        **CONV_8,
        "Inputs": [tensor8("x", shape, UNKNOWN)],
        "Outputs": [tensor8("y", [-1, 32, 14, 14], UNKNOWN)],
    }
    kernel = {k: v for k, v in hidden.items() if k != "Weights"}
    neither = {k: v for k, v in kernel.items() if k != "TacticName"}
    layers = read_layers(json.dumps({"Layers": [hidden, kernel, neither]}))
    assert [x.precision for x in layers] == ["int8", "int8", ""]
    assert {x.macs for x in layers} == {0}


def test_an_engine_without_details_has_names_only() -> None:
    layers = read_layers('{"Layers": ["stem/Conv:c", "head/MatMul:m"], "Bindings": ["x"]}')
    assert [(x.name, x.precision, x.kind) for x in layers] == [
        ("stem/Conv:c", "", "other"),
        ("head/MatMul:m", "", "other"),
    ]


def inspected(raw: str, **wanted: Any) -> Inspection:
    return inspect_layers(read_layers(raw), Wanted(**wanted))


def test_an_engine_that_is_what_the_plan_says() -> None:
    found = inspected(WRITTEN_8, int8=frozenset({"stem/Conv:c"}), rest="fp16", typed=False)
    assert found.findings == ()
    assert found.precision == {"int8": 1}
    assert found.macs == {"int8": 32 * 14 * 14 * 9 * 8}
    assert found.plugins == ("head/CrossAttention:a",)
    assert found.opaque == ("{ForeignNode[head/Transpose:t...head/Softmax:s]}",)
    require_plan(found, "mask", "int8")


def test_fp32_where_the_plan_wants_less_fails() -> None:
    for wanted in ({"rest": "fp16"}, {"int8": frozenset({"stem/Conv:c"})}):
        with pytest.raises(EngineError) as caught:
            require_plan(inspected(WRITTEN_11, **wanted), "mask", "fp16")
        assert caught.value.code == "engine-precision"
        assert "stem/Conv:c_myl0_1 runs in fp32" in caught.value.why


def test_what_the_plan_keeps_high_may_be_high() -> None:
    high = frozenset({"stem/Conv:c"})
    assert inspected(WRITTEN_11, rest="fp16", high=high).findings == ()
    assert inspected(WRITTEN_11, rest="fp32").findings == ()


def test_integers_that_became_floats_fail_above_five_per_cent() -> None:
    def engine(small: int) -> str:
        lost = {
            **GEMM_10,
            "Inputs": [tensor8("a", [1, small, 64], "Half")],
            "Outputs": [tensor8("m", [1, small, 32], "Half")],
        }
        kept = {**GEMM_10, "Metadata": "[ONNX Layer: head/MatMul:k]"}
        kept["Inputs"] = [tensor8("a", [1, 1000, 64], "Int8")]
        kept["Outputs"] = [tensor8("k", [1, 1000, 32], "Int8")]
        return json.dumps({"Layers": [lost, kept]})

    both = frozenset({"head/MatMul:m", "head/MatMul:k"})
    assert inspected(engine(50), int8=both, rest="fp16").findings == ()  # 4.8 %
    (finding,) = inspected(engine(60), int8=both, rest="fp16").findings  # 5.7 %
    assert finding.startswith("5.7 %")


def test_where_tensorrt_chooses_a_small_layer_may_stay_in_fp32() -> None:
    small = {**CONV_8, "Name": "tiny/Conv:t", "Weights": {"Type": "Float", "Count": 9}}
    small["Outputs"] = [tensor8("t", [1, 1, 1, 1], FLOAT)]
    raw = json.dumps({"Layers": [CONV_8, small]})
    assert inspected(raw, rest="fp16", typed=False).findings == ()
    assert len(inspected(raw, rest="fp16", typed=True).findings) == 1


@pytest.mark.parametrize(
    "raw", ["", "nonsense", "[]", "{}", '{"Layers": 3}', '{"Layers": [{}]}', '{"Layers": [[1]]}']
)
def test_what_is_no_inspector_output_is_refused(raw: str) -> None:
    if raw == '{"Layers": [[1]]}':
        raw = '{"Layers": [{"Name": "c", "LayerType": "gemm", "Inputs": [3], "Outputs": [3]}]}'
    with pytest.raises(EngineError) as caught:
        read_layers(raw)
    assert caught.value.code == "engine-inspector"


words = st.sampled_from(["", "gemm", "Int8", "Dimensions", "Convolution", "x + y"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine
@given(
    st.dictionaries(
        st.sampled_from(
            ["Name", "LayerType", "Inputs", "Outputs", "Weights", "Metadata", "Kernel"]
        ),
        json_values,
    )
)
def test_any_json_is_read_or_refused(entry: dict[str, Any]) -> None:
    try:
        read_layers(json.dumps({"Layers": [entry]}))
    except EngineError as error:
        assert error.code == "engine-inspector"
