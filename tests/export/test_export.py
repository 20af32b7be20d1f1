"""The exported graphs: their form, their parity, their size."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from refedge.cli import main
from refedge.export import export as module
from refedge.export.graph import GraphIndex
from refedge.export.lint import lint
from refedge.runtime.bundle import open_bundle
from refedge.runtime.segmenter import load

from ..conftest import exported


def graphs(bundle: Path) -> dict[str, onnx.ModelProto]:
    canonical = open_bundle(bundle).manifest.canonical
    return {name: onnx.load(bundle / file) for name, file in canonical.graphs.items()}


@pytest.fixture(scope="module")
def models(bundle: Path) -> dict[str, onnx.ModelProto]:
    return graphs(bundle)


@pytest.mark.parametrize(("name", "size"), [("slvit-tiny", None), ("slvit:tiny", 160)])
def test_every_size_exports_with_parity(name: str, size: int | None) -> None:
    bundle = exported(name, size)
    manifest = open_bundle(bundle).manifest
    assert set(manifest.parity["runs"]) == {
        f"{graph}, batch {batch}" for graph in ("canonical", "ort fp32") for batch in (1, 4)
    }
    for run in manifest.parity["runs"].values():
        # design §7: logits within 1e-3 σ, masks within 0.999; float32 leaves two more digits
        assert run["end_to_end"]["sigma"] < 1e-3
        assert run["end_to_end"]["iou"] >= 0.999
        assert run["text"]["sigma"] < 1e-4
    assert all(margin > 0 for margin in manifest.parity["topk_margin"].values())
    segmenter = load(bundle)
    side = size or 96
    assert segmenter.segment(np.zeros((40, 70, 3), np.uint8), "the red circle").logits.shape == (
        side,
        side,
    )


def test_the_graphs_are_canonical(models: dict[str, onnx.ModelProto]) -> None:
    assert set(models) == {"text", "mask"}
    for model in models.values():
        assert lint(model) == []
        assert model.ir_version == 10
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
        assert len(model.functions) == 0


def test_norms_and_gelus_are_single_nodes(models: dict[str, onnx.ModelProto]) -> None:
    counts = Counter(n.op_type for n in models["mask"].graph.node)
    # tiny: 7 blocks with two Gelus each and one in the stem; 4 stages and 4 fused maps
    assert counts["Gelu"] == 15
    assert counts["LayerNormalization"] == 8
    # 7 blocks with two each, two group norms
    assert counts["InstanceNormalization"] == 16
    assert counts["TopK"] == 1
    assert not {"Erf", "Shape", "Loop", "If", "Pow", "ScatterND"} & set(counts)
    assert Counter(n.op_type for n in models["text"].graph.node)["Gelu"] == 2


def test_pixels_are_cast_then_transposed(models: dict[str, onnx.ModelProto]) -> None:
    nodes = models["mask"].graph.node
    (cast,) = [n for n in nodes if "pixels" in n.input]
    assert cast.op_type == "Cast"
    (transpose,) = [n for n in nodes if cast.output[0] in n.input]
    assert transpose.op_type == "Transpose"


def test_borders(models: dict[str, onnx.ModelProto]) -> None:
    def border(values: list[onnx.ValueInfoProto]) -> dict[str, tuple[str, tuple[object, ...]]]:
        kinds = {v.name: v.type.tensor_type for v in values}
        return {
            name: (
                onnx.TensorProto.DataType.Name(t.elem_type),
                tuple(d.dim_param or d.dim_value for d in t.shape.dim),
            )
            for name, t in kinds.items()
        }

    text, mask = (border(list(models[n].graph.input)) for n in ("text", "mask"))
    assert text == {"ids": ("INT32", ("batch", 20)), "words": ("BOOL", ("batch", 20))}
    assert mask["pixels"] == ("UINT8", ("batch", 96, 96, 3))
    assert mask["keys_3"] == ("FLOAT", ("batch", 3, 20, 72))
    assert border(list(models["mask"].graph.output)) == {"logits": ("FLOAT", ("batch", 96, 96))}


def test_every_tensor_has_a_shape(models: dict[str, onnx.ModelProto]) -> None:
    """Placement, work and float16 ask for it; a tensor without one would be left out silently."""
    for model in models.values():
        index = GraphIndex(model)
        unknown = [o for n in index.nodes for o in n.output if o and index.shape(o) is None]
        assert unknown == []


def test_nodes_name_their_module(models: dict[str, onnx.ModelProto]) -> None:
    for model in models.values():
        for node in model.graph.node:
            (entry,) = node.metadata_props
            assert entry.key == "refedge.module"
            if node.op_type == "Conv":
                assert entry.value.split(".")[0] in (
                    "backbone",
                    "classifier",
                    "inter_trans",
                    "squeelayers",
                )
        names = [n.name for n in model.graph.node]
        assert len(set(names)) == len(names)
    modules = {n.metadata_props[0].value for n in models["mask"].graph.node}
    assert "backbone.block3.1.attn.spatial_gating_unit.conv1_2" in modules
    assert "classifier.hamburger.ham" in modules


def test_weights_keep_their_torch_names(models: dict[str, onnx.ModelProto]) -> None:
    names = {t.name for t in models["mask"].graph.initializer}
    assert "backbone.block2.0.mlp.fc1.weight" in names
    assert not [n for n in names if n.startswith(("val_", "model."))]


def test_nothing_of_this_machine_is_in_the_files(bundle: Path) -> None:
    here = str(Path(__file__).resolve().parent.parent.parent).encode()
    for path in bundle.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            assert here not in raw
            assert b"site-packages" not in raw


def test_dialects_and_canonical_share_one_weight_file(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    for part, file in manifest.canonical.graphs.items():
        places = set()
        for graph in (file, manifest.dialects[0].graphs[part]):
            model = onnx.load(bundle / graph, load_external_data=False)
            for tensor in model.graph.initializer:
                places |= {e.value for e in tensor.external_data if e.key == "location"}
        assert len(places) == 1
        assert (bundle / "graphs" / places.pop()).is_file()


def test_onnx_reads_the_files_back(bundle: Path) -> None:
    """onnx itself can read the files back, weights and all."""
    for file in open_bundle(bundle).manifest.canonical.graphs.values():
        onnx.checker.check_model(str(bundle / file), full_check=True)


def test_a_checkout_that_was_not_installed_is_of_an_unknown_version() -> None:
    """So it runs on a GPU's machine, where only the files are."""
    assert module._version("refedge-that-is-not-here") == "unknown"
    assert module._version("numpy") == np.__version__


def test_parity_may_be_left_to_another_machine(tmp_path: Path) -> None:
    target = tmp_path / "o.refedge"
    result = CliRunner().invoke(main, ["export", "slvit-tiny", "-o", str(target), "--no-parity"])
    assert result.exit_code == 0, result.output
    assert "measuring parity" not in result.output
    assert open_bundle(target).manifest.parity == {}
