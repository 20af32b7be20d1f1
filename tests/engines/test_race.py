"""Which of a part's engines is faster: in turns, on inputs of its shapes, by the runtime's code."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from refedge.engines import build, race
from refedge.engines.race import RaceResult, RaceTask
from refedge.errors import EngineError
from refedge.runtime.backends import tensorrt
from refedge.runtime.engine import EngineSpec
from refedge.runtime.manifest import PartSpec, TensorSpec

PART = PartSpec(
    "mask",
    (
        TensorSpec("pixels", "uint8", ("batch", 4, 4, 3)),
        TensorSpec("keys", "float16", ("batch", 8)),
        TensorSpec("words", "bool", ("batch", 5)),
        TensorSpec("image_index", "int32", ("batch",)),
        TensorSpec("grid", "float32", (2, 3)),
    ),
    (TensorSpec("logits", "float32", ("batch", 4, 4)),),
    (1, 2, 4),
)
SIZES = {"pixels": (2, 4, 4, 3), "keys": (2, 8), "words": (2, 5), "image_index": (2,)}


class Clock:
    """Time passes only in what is timed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(race.time, "perf_counter", made)
    return made


def test_in_turns(clock: Clock) -> None:
    order: list[str] = []

    def run(name: str, seconds: float) -> Any:
        def once() -> None:
            order.append(name)
            clock.now += seconds

        return once

    assert race.in_turns([run("a", 0.002), run("b", 0.001)], 4) == pytest.approx((2.0, 1.0))
    assert "".join(order) == "abbaabba"


def test_medians_are_told(clock: Clock) -> None:
    seconds = iter([0.001, 0.009, 0.002])

    def once() -> None:
        clock.now += next(seconds)

    assert race.in_turns([once], 3) == pytest.approx((2.0,))


def task_of(folder: Path) -> RaceTask:
    engines = []
    for name in ("new", "other"):
        (folder / name).write_bytes(name.encode())
        sha256 = hashlib.sha256(name.encode()).hexdigest()
        spec = EngineSpec("mask.engine", "a" * 64, len(name), sha256, PART.profile, 0)
        engines.append((str(folder / name), spec))
    shapes = {name: (size, size, size) for name, size in SIZES.items()}
    return RaceTask(PART, tuple(engines), shapes, ("keys",), {"p.so": "c" * 64}, True)


def test_both_are_run_on_inputs_of_the_usual_shapes(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[bytes] = []

    class Part:
        def __init__(self, seconds: float) -> None:
            self.seconds, self.runs = seconds, 0

        def run(self, inputs: Mapping[str, np.ndarray]) -> None:
            self.runs += 1
            assert [(n, v.shape, v.dtype.name) for n, v in inputs.items()] == [
                (t.name, SIZES.get(t.name, (2, 3)), t.dtype) for t in PART.inputs
            ]
            assert inputs["words"].all()
            assert not inputs["image_index"].any()
            assert inputs["pixels"].std() > 0
            assert inputs["keys"].std() > 0

        def again(self) -> None:
            assert self.runs == race.WARM
            clock.now += self.seconds

    def open_part(
        data: bytes, spec: EngineSpec, part: PartSpec, made: set[str], **more: Any
    ) -> Part:
        assert (part, made) == (PART, {"keys"})
        assert more == {"plugins": {Path("p.so"): "c" * 64}, "host_code": True}
        opened.append(data)
        return Part(0.003 if data == b"new" else 0.002)

    monkeypatch.setattr(tensorrt, "open_part", open_part)
    task = task_of(tmp_path)
    assert race.race(task) == pytest.approx((3.0, 2.0))
    assert opened == [b"new", b"other"]
    (tmp_path / "other").write_bytes(b"mother")
    with pytest.raises(EngineError) as caught:
        race.race(task)
    assert caught.value.code == "engine-damaged"


def test_tasks_and_results_survive_the_way(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    assert msgspec.json.decode(msgspec.json.encode(task), type=RaceTask) == task
    for result in (RaceResult((1.5, 2.0)), RaceResult(error=("a", "b", "c", "d"))):
        assert msgspec.json.decode(msgspec.json.encode(result), type=RaceResult) == result


def test_errors_cross_the_process(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:  # TensorRT is not here
        build.against_each_other(task_of(tmp_path), print)
    assert caught.value.code in ("backend-missing", "cuda-missing")


def test_a_process_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -11 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(EngineError) as caught:
        build.against_each_other(task_of(tmp_path), print)
    assert caught.value.code == "engine-build"
    assert "timed the engines of the part 'mask' died" in caught.value.what
    assert "SIGSEGV" in caught.value.why
