"""Hand-over on the device, on host memory: what is copied, joined and refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refedge.data.refshapes.dataset import RefShapes
from refedge.errors import EngineError
from refedge.runtime.backends.onnx_runtime import OnnxRuntimeBackend
from refedge.runtime.backends.tensors import DeviceArray, Place
from refedge.runtime.bundle import open_bundle
from refedge.runtime.manifest import PartSpec, TensorSpec
from refedge.runtime.segmenter import Segmenter, load

from .host_cuda import HostCuda

KEYS = TensorSpec("keys", "float32", ("batch", 3, 2))
SIZES = {"batch": 4, "images": 2}


def rows(count: int, first: float = 0) -> np.ndarray:
    return np.arange(first, first + 6 * count, dtype=np.float32).reshape(count, 3, 2)


def test_numpy_sees_an_array() -> None:
    array = HostCuda().array(rows(2))
    assert np.array_equal(array, rows(2))
    assert (array.shape, array.dtype, array.nbytes) == ((2, 3, 2), np.dtype("float32"), 48)
    assert np.asarray(array, np.float16).dtype == np.float16
    assert np.array_equal(np.stack([array, array])[1], rows(2))
    with pytest.raises(ValueError, match="without a copy"):
        array.__array__(copy=False)


def test_joining_moves_nothing() -> None:
    cuda = HostCuda()
    joined = np.concatenate([cuda.array(rows(1)), cuda.array(rows(2, 6))])
    assert isinstance(joined, DeviceArray)
    assert joined.shape == (3, 3, 2)
    assert sum(cuda.moved.values()) == 0
    assert np.array_equal(joined, rows(3))
    with pytest.raises(ValueError, match="cannot be joined"):
        np.concatenate([cuda.array(rows(1)), cuda.array(rows(1)[:, :2])])


def test_joined_with_an_array_of_the_host_it_comes_to_the_host() -> None:
    joined = np.concatenate([HostCuda().array(rows(1)), rows(1)])
    assert type(joined) is np.ndarray
    assert joined.shape == (2, 3, 2)


def test_memory_goes_back_when_the_last_array_is_gone() -> None:
    cuda = HostCuda()
    first, second = cuda.array(rows(1)), cuda.array(rows(1))
    joined = np.concatenate([first, second])
    del first, second
    assert cuda.pool == []
    del joined
    assert len(cuda.pool) == 2
    cuda.array(rows(1))
    assert len(cuda.memory) == 2, "a freed block is used again"


def test_who_reads_an_array_copies_it() -> None:
    """The launch that follows waits for its own stream alone."""
    wrote, reads = HostCuda(), HostCuda()
    array = wrote.array(rows(2))
    before = sum(wrote.moved.values())
    Place(reads, KEYS, SIZES, host=False).write(array, "mask")  # type: ignore[arg-type]
    assert sum(reads.moved.values()) == 48
    assert sum(wrote.moved.values()) == before


def test_a_place_takes_arrays_of_the_host_and_of_the_device() -> None:
    cuda = HostCuda()
    place = Place(cuda, KEYS, SIZES, host=False)  # type: ignore[arg-type]
    address = place.address
    assert place.write(rows(2), "mask") == (2, 3, 2)
    assert cuda.moved == {"up": 48, "down": 0, "copy": 0}
    place.fetch((2, 3, 2))
    assert np.array_equal(place.read((2, 3, 2)), rows(2))
    joined = np.concatenate([cuda.array(rows(1, 50)), cuda.array(rows(1, 80))])
    assert place.write(joined, "mask") == (2, 3, 2)
    assert cuda.moved["copy"] == 48
    place.fetch((2, 3, 2))
    assert np.array_equal(place.read((2, 3, 2))[1], rows(1, 80)[0])
    assert place.address == address, "a graph that was captured stays valid"


def test_what_does_not_lie_in_a_row_arrives_in_order() -> None:
    place = Place(HostCuda(), KEYS, SIZES, host=True)  # type: ignore[arg-type]
    turned = rows(2).reshape(2, 2, 3).transpose(0, 2, 1)
    place.write(turned, "mask")
    place.fetch((2, 3, 2))
    assert np.array_equal(place.read((2, 3, 2)), turned)


def test_integrated_memory_is_written_once() -> None:
    cuda = HostCuda(integrated=True)
    place = Place(cuda, KEYS, SIZES, host=True)  # type: ignore[arg-type]
    place.write(rows(4), "mask")
    place.fetch((4, 3, 2))
    assert sum(cuda.moved.values()) == 0
    assert np.array_equal(place.read((4, 3, 2)), rows(4))
    kept = place.read((4, 3, 2))
    place.write(rows(4, 9), "mask")
    assert np.array_equal(kept, rows(4)), "a result is the caller's own"
    other = Place(cuda, KEYS, SIZES, host=False)  # type: ignore[arg-type]
    other.write(rows(1), "mask")
    assert cuda.moved["up"] == 24, "what parts hand over lies in device memory"


@pytest.mark.parametrize(
    "value",
    [rows(5), rows(1)[0], rows(1)[:, :2], rows(1).astype(np.float64), rows(1)[:0]],
    ids=["batch", "rank", "size", "dtype", "empty"],
)
def test_what_the_engine_was_not_built_for_is_refused(value: np.ndarray) -> None:
    place = Place(HostCuda(), KEYS, SIZES, host=True)  # type: ignore[arg-type]
    with pytest.raises(EngineError) as caught:
        place.write(value, "mask")
    assert caught.value.code == "engine-shape"
    assert "batch of 1 to 4" in caught.value.why


class StaysOnDevice:
    """ONNX Runtime whose text and image parts leave what they give on a device."""

    name = "double"

    def __init__(self) -> None:
        self.cuda, self._cpu = HostCuda(), OnnxRuntimeBackend(threads=1)
        self.taken: list[type] = []

    def dialects(self, plan: str) -> list[str]:
        return list(self._cpu.dialects(plan))

    def load(self, graph: Path, part: PartSpec) -> Any:
        inner, outer = self._cpu.load(graph, part), self

        class Part:
            largest = inner.largest

            def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
                if part.name == "mask":
                    outer.taken += [type(v) for v in inputs.values()]
                    assert outer.cuda.moved["down"] == 0, "nothing came to the host on the way"
                found = inner.run({name: np.asarray(v) for name, v in inputs.items()})
                if part.name == "mask":
                    return found
                return {name: outer.cuda.array(v) for name, v in found.items()}

        return Part()


def test_a_segmenter_hands_over_on_the_device(bundle: Path) -> None:
    backend = StaysOnDevice()
    segmenter = Segmenter(open_bundle(bundle), "fp32", backend)
    sample = RefShapes("val")[1]
    texts = [e.text for e in sample.expressions]
    found = segmenter.scene(sample.image).segment(texts)
    assert backend.taken.count(DeviceArray) == 8, "keys and values of four stages, joined"
    wanted = load(bundle, threads=1).scene(sample.image).segment(texts)
    for mine, theirs in zip(found, wanted, strict=True):
        assert np.array_equal(mine.logits, theirs.logits)


def test_the_text_part_may_run_elsewhere(bundle: Path) -> None:
    opened, backend = open_bundle(bundle), StaysOnDevice()
    segmenter = Segmenter(opened, "fp32", backend, OnnxRuntimeBackend(threads=1))
    segmenter.segment(RefShapes("val")[1].image, "the red circle")
    assert set(backend.taken) == {np.ndarray}


def test_each_dynamic_dimension_has_its_own_largest() -> None:
    spec = TensorSpec("maps", "float32", ("images", 3, 2))
    place = Place(HostCuda(), spec, {"batch": 1, "images": 2}, host=True)  # type: ignore[arg-type]
    assert place.write(rows(2), "mask") == (2, 3, 2)
    with pytest.raises(EngineError) as caught:
        place.write(rows(3), "mask")
    assert "images of 1 to 2" in caught.value.why
