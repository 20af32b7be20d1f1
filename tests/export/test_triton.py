"""A Triton model repository: its configurations by Triton's own protobuf, its graphs by running."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from refedge.cli import main
from refedge.errors import BundleError, EngineError
from refedge.export.triton import write_repository
from refedge.runtime.bundle import open_bundle
from refedge.runtime.engine import EngineSet, EngineSpec, Target, encode_engines
from refedge.runtime.segmenter import load

from ..conftest import exported

TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int32)": "TYPE_INT32", "tensor(bool)": "TYPE_BOOL",
         "tensor(uint8)": "TYPE_UINT8"}  # fmt: skip


@pytest.fixture(scope="module")
def repository(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("triton") / "repository"
    result = CliRunner().invoke(main, ["export", str(bundle), "--triton", str(target)])
    assert result.exit_code == 0, result.output
    return target


def tensors(config: str, kind: str) -> dict[str, tuple[str, list[int]]]:
    found = re.findall(rf"^{kind} {{ name: \"(\w+)\" data_type: (\w+) dims: \[ (.*) \] }}$",
                       config, re.M)  # fmt: skip
    return {name: (dtype, [int(d) for d in dims.split(", ")]) for name, dtype, dims in found}


def test_configurations_say_what_the_graphs_take(repository: Path) -> None:
    graphs = sorted(repository.glob("*/1/model.onnx"))
    assert len(graphs) == 2
    for graph in graphs:
        config = (graph.parent.parent / "config.pbtxt").read_text()
        session = onnxruntime.InferenceSession(graph)  # finds its weights beside it
        for kind, has in (("input", session.get_inputs()), ("output", session.get_outputs())):
            wanted = {
                t.name: (TYPES[t.type], [-1 if isinstance(d, str) else d for d in t.shape])
                for t in has
            }
            assert tensors(config, kind) == wanted
        assert f'name: "{graph.parent.parent.name}"' in config
        assert "max_batch_size: 0" in config


def test_the_ensemble_computes_what_the_segmenter_does(bundle: Path, repository: Path) -> None:
    """Steps and maps followed as Triton's ensemble scheduler would."""
    segmenter = load(bundle, threads=1)
    token = segmenter.tokenize("the red circle")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 96, 96, 3), np.uint8)
    known: dict[str, Any] = {"pixels": pixels, "ids": token.ids[None], "words": token.words[None]}
    (ensemble,) = (f for f in repository.iterdir() if not (f / "1/model.onnx").exists())
    config = (ensemble / "config.pbtxt").read_text()
    assert (ensemble / "1").is_dir()
    assert tensors(config, "input").keys() == known.keys()
    for step in config.split("step {")[1:]:
        name = re.search(r'model_name: "(\w+)"', step)
        assert name is not None
        session = onnxruntime.InferenceSession(repository / name[1] / "1/model.onnx")
        takes = dict(re.findall(r'input_map { key: "(\w+)" value: "(\w+)" }', step))
        gives = dict(re.findall(r'output_map { key: "(\w+)" value: "(\w+)" }', step))
        found = session.run(list(gives), {key: known[value] for key, value in takes.items()})
        known |= dict(zip(gives.values(), found, strict=True))
    wanted = segmenter.logits(segmenter.image(pixels), [segmenter.text(token)[0]])
    assert np.abs(known["logits"] - wanted).max() <= 1e-4 * wanted.std()
    assert tensors(config, "output").keys() == {"logits"}


@pytest.mark.parametrize("model", ["slvit-tiny", "lts-tiny"])
def test_triton_reads_the_configurations(model: str, tmp_path: Path) -> None:
    config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    opened = open_bundle(exported(model))
    names = write_repository(opened, "fp32", tmp_path / "r")
    read = {
        name: text_format.Parse((tmp_path / "r" / name / "config.pbtxt").read_text(),
                                config.ModelConfig())
        for name in names
    }  # fmt: skip
    ensemble = read[names[0]]
    assert [s.model_name for s in ensemble.ensemble_scheduling.step] == names[1:]
    assert {i.name for i in ensemble.input} == {"pixels", "ids", "words"} | (
        {"image_index"} if model == "lts-tiny" else set()
    )
    for step in ensemble.ensemble_scheduling.step:
        assert set(step.input_map) == {i.name for i in read[step.model_name].input}
        assert set(step.output_map) == {o.name for o in read[step.model_name].output}
    for one in read.values():
        assert one.max_batch_size == 0
        assert all(t.dims[0] == -1 for t in (*one.input, *one.output))


def test_engines_are_served_as_plans(own_bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(own_bundle)
    dialect = opened.dialect(["ort"], "fp32")
    target = Target("10.3.0", 90, "H100", "12.6", "linux", "x86_64")
    folder = own_bundle / "engines" / target.name / "fp32"
    folder.mkdir(parents=True)
    parts = {}
    for part in opened.manifest.parts:
        data = part.name.encode()
        (folder / f"{part.name}.engine").write_bytes(data)
        graph = opened.manifest.files[dialect.graphs[part.name]].sha256
        digest = hashlib.sha256(data).hexdigest()
        parts[part.name] = EngineSpec(
            f"{part.name}.engine", graph, len(data), digest, part.profile, 0
        )
    record = EngineSet("fp32", "ort", opened.manifest.digest, target, parts)
    (folder / "engines.json").write_bytes(encode_engines(record))
    names = write_repository(opened, "fp32", tmp_path / "r", engines=target.name)
    assert (tmp_path / "r" / names[1] / "1/model.plan").read_bytes() == b"text"
    assert "tensorrt_plan" in (tmp_path / "r" / names[1] / "config.pbtxt").read_text()
    (folder / "mask.engine").write_bytes(b"mosk")
    with pytest.raises(EngineError) as caught:
        write_repository(opened, "fp32", tmp_path / "s", engines=target.name)
    assert caught.value.code == "engine-damaged"
    assert not (tmp_path / "s").exists()


def test_what_is_there_stays(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(BundleError, match="there already"):
        write_repository(open_bundle(bundle), "fp32", tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
    for engines in (None, "trt10-nowhere"):
        with pytest.raises(BundleError) as caught:
            write_repository(open_bundle(bundle), "int8", tmp_path / "r", engines=engines)
        assert caught.value.code == "plan-missing"
