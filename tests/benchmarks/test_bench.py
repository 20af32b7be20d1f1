from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refedge.benchmarks import bench as module
from refedge.benchmarks import worker
from refedge.benchmarks.bench import Bench, bench, read_bench, series, table, write_bench
from refedge.benchmarks.contestants import PlanRunner, TorchRunner, open_original, torch_threads
from refedge.benchmarks.timing import (
    AT_MOST,
    STAGES,
    WINDOW,
    clocked,
    run_once,
    summary,
    take_turn,
    take_turns,
    task_for,
    warm_up,
)
from refedge.errors import RefedgeError
from refedge.runtime.bundle import open_bundle
from refedge.runtime.manifest import Manifest
from refedge.runtime.segmenter import load

SHA = "0123456789abcdef" * 4
milliseconds = st.floats(1e-3, 1e5, allow_nan=False)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(RefedgeError) as caught:
        call()
    return caught.value.code


# what a series says


@given(st.lists(milliseconds, min_size=1, max_size=40))
def test_percentiles_rise_within_the_samples(samples: list[float]) -> None:
    found = series(samples)
    assert len(found.samples) == len(samples)
    assert min(found.samples) <= found.p50 <= found.p90 <= found.p99 <= max(found.samples) + 1e-9
    assert found.p50 == pytest.approx(float(np.median(found.samples)))


@given(st.lists(milliseconds, min_size=1, max_size=40), st.randoms())
def test_percentiles_do_not_depend_on_the_order(samples: list[float], random: Any) -> None:
    shuffled = list(samples)
    random.shuffle(shuffled)
    a, b = series(samples), series(shuffled)
    assert (a.p50, a.p90, a.p99) == (b.p50, b.p90, b.p99)


@given(milliseconds, st.integers(1, 40))
def test_a_constant_is_stable_once_there_are_enough(value: float, count: int) -> None:
    found = series([value] * count)
    assert found.p50 == found.p90 == found.p99 == found.samples[0]
    assert found.unstable == (count < 8)


@pytest.mark.parametrize(
    ("samples", "unstable"),
    [
        ([10.0] * 10 + [10.9] * 10, False),
        ([10.0] * 10 + [12.0] * 10, True),  # the halves drift apart
        ([10.0, 13.0] * 10, True),  # spread, without a drift
        ([10.0, 11.0] * 10, False),
        ([10.0] * 19 + [500.0], False),  # one outlier does not move quartiles
    ],
)
def test_unstable_means_spread_or_drift(samples: list[float], unstable: bool) -> None:
    assert series(samples).unstable is unstable


# the clock


def test_everyone_takes_a_turn_in_each_round_and_another_one_begins() -> None:
    seen: list[tuple[int, str]] = []
    turns = {name: (lambda i, name=name: seen.append((i, name))) for name in "abc"}
    take_turns(turns, 4, iter)
    rounds = ["".join(n for i, n in seen if i == r) for r in range(4)]
    assert rounds == ["abc", "bca", "cab", "abc"]


def test_short_runs_follow_an_untimed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that the runs themselves set, in seconds."""
    now, runs = [0.0], {"short": 0, "long": 0}

    def run(name: str, seconds: float) -> None:
        now[0] += seconds
        runs[name] += 1

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    found = clocked({"short": lambda: run("short", 0.05), "long": lambda: run("long", 0.5)}, 3)
    assert runs == {"short": 6, "long": 4}
    assert found["short"]["wall"] == pytest.approx([50.0] * 3)
    assert found["long"]["wall"] == pytest.approx([500.0] * 3)
    assert len(found["long"]["cpu"]) == 3


def test_a_speedup_is_the_median_over_rounds() -> None:
    before, after = [10.0, 40.0, 10.0], [5.0, 10.0, 10.0]
    found = summary({"before": {"cpu": before}, "after": {"cpu": after}})
    assert found["before"]["cpu"] == {"least": 10.0, "median": 10.0, "speedup": 1.0}
    assert found["after"]["cpu"] == {"least": 5.0, "median": 10.0, "speedup": 2.0}


def test_the_warm_up_ends_when_two_windows_agree() -> None:
    times = iter([100.0] * WINDOW + [50.0] * WINDOW + [49.0] * WINDOW + [1.0])
    assert warm_up(lambda: next(times)) == 3 * WINDOW
    assert next(times) == 1.0


def test_the_warm_up_ends_even_if_nothing_settles() -> None:
    runs = iter(range(10_000))
    assert warm_up(lambda: 2.0 ** (next(runs) // WINDOW)) == AT_MOST
    assert next(runs) == AT_MOST


def test_a_cached_run_does_not_run_the_text_part(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = load(bundle, threads=1)
    runner, task = PlanRunner(segmenter), task_for(segmenter.manifest)
    calls = []
    real = segmenter.run_text
    monkeypatch.setattr(segmenter, "run_text", lambda *a: calls.append(1) or real(*a))
    samples: dict[str, list[float]] = {}
    take_turn(runner, task, 0, samples)
    assert len(calls) == 3  # untimed, into the cache, new
    take_turn(runner, task, len(task.expressions), samples)
    assert len(calls) == 5  # the same expression again: untimed, new
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys(
        (*STAGES, "uncached", "cached"), 2
    )


def test_the_stages_make_up_the_whole(bundle: Path) -> None:
    segmenter = load(bundle, threads=1)
    spent = run_once(PlanRunner(segmenter), task_for(segmenter.manifest), 1, cached=False)
    total = spent.pop("total")
    assert tuple(spent) == STAGES
    assert sum(spent.values()) == pytest.approx(total)


def test_the_picture_is_larger_than_the_model(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    task = task_for(manifest)
    assert task.photo.shape == (192, 192, 3)
    assert len(set(task.expressions)) > 1
    assert task_for(manifest).expressions == task.expressions


# the PyTorch model


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return open_bundle(bundle).manifest


def test_torch_and_the_plan_compute_the_same(bundle: Path, manifest: Manifest) -> None:
    import torch

    before = torch.get_num_threads()
    original = open_original(manifest)
    assert (original.name, original.loaded.card.sha256) == (
        "slvit-tiny",
        manifest.provenance["checkpoint"],
    )
    assert original.file_bytes > 1_000_000
    task = task_for(manifest)
    with torch_threads(1):
        assert torch.get_num_threads() == 1
        runners = (
            TorchRunner(original.loaded, open_bundle(bundle)),
            PlanRunner(load(bundle, threads=1)),
        )
        pixels = np.ascontiguousarray(task.photo[::2, ::2])
        logits = []
        for runner in runners:
            tokens = runner.tokenize(task.expressions[0])
            texts = (runner.text(tokens), runner.recall(tokens), runner.recall(tokens))
            features = runner.image(pixels)
            logits += [runner.mask(features, tokens, text) for text in texts]
    assert torch.get_num_threads() == before
    assert all(found.shape == (96, 96) for found in logits)
    # export's parity allows 1e-3 of the logits' spread
    assert all(np.abs(f - logits[0]).max() < 1e-3 * logits[0].std() for f in logits)


@pytest.fixture
def quick_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values do not matter here, and drawing them takes seconds."""
    monkeypatch.setattr("refedge.models.checkpoint.seed_weights", lambda *_: None)


@pytest.mark.usefixtures("quick_seeds")
def test_seeded_weights_are_found_by_their_configuration(manifest: Manifest) -> None:
    seeded = replace(manifest, provenance={"checkpoint": "none: seeded, untrained weights"})
    found = open_original(seeded)
    assert (found.name, found.file_bytes) == ("slvit:tiny", 0)


@pytest.mark.parametrize(
    ("provenance", "name", "code"),
    [
        ({}, None, "bench-model"),
        ({"checkpoint": SHA}, None, "bench-model"),
        ({"checkpoint": SHA}, "slvit-tiny", "bench-checkpoint"),
        (None, "slvit:tiny", "bench-checkpoint"),
        (None, "nothing-of-that-name", "checkpoint-missing"),
    ],
)
@pytest.mark.usefixtures("quick_seeds")
def test_another_pytorch_model_is_refused(
    manifest: Manifest, provenance: dict[str, Any] | None, name: str | None, code: str
) -> None:
    changed = manifest if provenance is None else replace(manifest, provenance=provenance)
    assert code_of(lambda: open_original(changed, name)) == code


def test_another_configuration_is_refused_and_named(manifest: Manifest) -> None:
    changed = replace(manifest, config=manifest.config | {"regions": 5})
    with pytest.raises(RefedgeError, match="regions") as caught:
        open_original(changed)
    assert caught.value.code == "bench-checkpoint"


# the worker


def test_a_worker_measures_one_plan(bundle: Path) -> None:
    found = worker.footprint(bundle, "fp32", 1)
    assert found.load_ms > 0
    assert 10e6 < found.peak_rss < 1e9


def test_a_worker_measures_torch(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch_threads(1):
        worker.main([str(bundle), "torch", "1", "slvit-tiny"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"load_ms", "peak_rss"}
    assert min(found.values()) > 0


def test_a_worker_that_fails_says_why(bundle: Path) -> None:
    with pytest.raises(RefedgeError, match="plan-missing") as caught:
        worker.footprint(bundle, "int3", 1)
    assert caught.value.code == "bench-worker"


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_peak_memory_is_not_inherited_from_the_parent() -> None:
    ballast = np.ones(400 << 20, np.uint8)
    code = "from refedge.benchmarks.worker import peak_rss; print(peak_rss())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < ballast.nbytes / 2


# a whole run


@pytest.fixture(scope="module")
def result(bundle: Path) -> Iterator[Bench]:
    """torch and fp32, three rounds; torch's worker is replaced, because its imports take long."""
    real = worker.footprint

    def footprint(path: Path, plan: str, threads: int, model: Any = None, **more: str) -> Any:
        if plan == "torch":
            assert model == "slvit-tiny"
            return worker.Footprint(12.5, 345_000_000)
        return real(path, plan, threads, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "footprint", footprint)
        yield bench(bundle, rounds=3)


def test_a_run_holds_what_was_measured_and_where(result: Bench, manifest: Manifest) -> None:
    assert (result.model, result.bundle) == ("slvit", manifest.digest)
    assert [(c.name, c.backend, c.dialect) for c in result.contestants] == [
        ("torch", "torch", "eager fp32"),
        ("fp32", "onnxruntime", "ort"),
    ]
    settings = result.settings
    assert (settings["threads"], settings["rounds"], settings["batch"]) == (1, 3, 1)
    assert settings["image_size"] == [96, 96]
    assert set(settings["warm_up_runs"]) == {"torch", "fp32"}
    assert all(10 <= runs <= AT_MOST for runs in settings["warm_up_runs"].values())
    assert result.device["cores"] >= 1
    for c in result.contestants:
        assert tuple(c.stages) == STAGES
        assert tuple(c.end_to_end) == tuple(c.throughput) == ("uncached", "cached")
        for found in (*c.stages.values(), *c.end_to_end.values()):
            assert len(found.samples) == 3
            assert found.unstable  # three samples prove nothing
        assert c.artefacts["checkpoint"] == manifest.provenance["checkpoint"]
        for name, rate in c.throughput.items():
            assert rate == pytest.approx(3e3 / sum(c.end_to_end[name].samples))
        for i, whole in enumerate(c.end_to_end["uncached"].samples):
            assert sum(s.samples[i] for s in c.stages.values()) == pytest.approx(whole, abs=1e-4)
    torch, fp32 = result.contestants
    assert (torch.load_ms, torch.peak_rss) == (12.5, 345_000_000)
    files = manifest.files
    assert fp32.artefacts["mask"] == files["graphs/mask.ort.fp32.onnx"].sha256
    assert fp32.file_bytes == sum(
        spec.bytes for name, spec in files.items() if "ort.fp32" in name or ".onnx" not in name
        if name.startswith("graphs/")
    )  # fmt: skip


def test_a_result_comes_back_as_it_was(result: Bench, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write_bench(result, path)
    assert read_bench(path) == result
    assert json.loads(path.read_text())["schema"] == "refedge-bench-1"


def test_the_table_shows_everyone(result: Bench) -> None:
    (_, speed_header, speed), (_, weight_header, weight) = table(result)
    for header, rows in ((speed_header, speed), (weight_header, weight)):
        assert [r[0] for r in rows] == ["torch", "fp32"]
        assert all(len(r) == len(header) for r in rows)
        assert all(isinstance(cell, str) for r in rows for cell in r)
    torch, fp32 = result.contestants
    ratio = torch.end_to_end["uncached"].p50 / fp32.end_to_end["uncached"].p50
    column = speed_header.index("vs torch")
    assert [r[column] for r in speed] == ["1.00×", f"{ratio:.2f}×"]
    assert speed[0][-1] == "uncached, cached"
    assert weight[0][-2] == "345.0"


def test_the_table_without_torch_has_no_ratio(result: Bench) -> None:
    (_, header, rows), _ = table(replace(result, contestants=result.contestants[1:]))
    assert rows[0][header.index("vs torch")] == "-"


def test_plans_alone_need_no_torch(bundle: Path) -> None:
    code = """
import sys
from pathlib import Path
from refedge.benchmarks.bench import bench
result = bench(Path(sys.argv[1]), torch_model=None, plans=["fp32"], rounds=1)
print(*(c.name for c in result.contestants), "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["fp32", "False"], done.stderr


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"rounds": 0}, "bench-rounds"),
        ({"rounds": -1}, "bench-rounds"),
        ({"threads": 0}, "threads-range"),
        ({"plans": ["int3"]}, "plan-missing"),
        ({"torch_model": "nothing-of-that-name"}, "checkpoint-missing"),
    ],
)
def test_what_cannot_be_timed_is_refused(bundle: Path, options: dict[str, Any], code: str) -> None:
    assert code_of(lambda: bench(bundle, **options)) == code


# files


@pytest.fixture
def written(result: Bench, tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    write_bench(result, path)
    return path


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused(written: Path, share: float) -> None:
    raw = written.read_bytes()
    written.write_bytes(raw[: int(share * (len(raw) - 2))])
    assert code_of(lambda: read_bench(written)) == "result-damaged"


@pytest.mark.parametrize(
    "raw",
    [b"[]", b"{}", b"3", b'{"schema": 1}', b"\xff\xfe", b"[" * 100_000, b'{"schema": "x"'],
    ids=lambda raw: repr(raw[:12]),
)
def test_a_foreign_file_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "foreign.json"
    path.write_bytes(raw)
    assert code_of(lambda: read_bench(path)) == "result-damaged"


@pytest.mark.parametrize("schema", ["refedge-accuracy-1", "refedge-bench-2", ""])
def test_another_kind_of_result_is_refused(written: Path, schema: str) -> None:
    plain = json.loads(written.read_text())
    written.write_text(json.dumps(plain | {"schema": schema}))
    assert code_of(lambda: read_bench(written)) == "result-kind"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert code_of(lambda: read_bench(tmp_path / "none.json")) == "data-missing"


def _without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda plain: plain.pop(key)


MUTATIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no device": _without("device"),
    "no contestants": lambda p: p.update(contestants=[]),
    "twice the same": lambda p: p["contestants"].append(p["contestants"][0]),
    "a stage is missing": lambda p: p["contestants"][0]["stages"].pop("mask"),
    "no cached": lambda p: p["contestants"][1]["end_to_end"].pop("cached"),
    "no throughput": lambda p: p["contestants"][1]["throughput"].clear(),
    "words for a number": lambda p: p["contestants"][0].update(load_ms="fast"),
    "no samples": lambda p: p["contestants"][0]["stages"]["text"].update(samples=[]),
    "negative": lambda p: p["contestants"][0]["stages"]["text"].update(samples=[-1.0]),
    "p90 below p50": lambda p: p["contestants"][0]["stages"]["text"].update(p90=0.0),
    "no time": lambda p: p["contestants"][0]["end_to_end"]["cached"].update(p50=0.0),
    "null": lambda p: p["contestants"][0]["end_to_end"]["cached"].update(p50=None),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_result_that_is_not_whole_is_refused(written: Path, name: str) -> None:
    plain = json.loads(written.read_text())
    MUTATIONS[name](plain)
    written.write_text(json.dumps(plain))
    assert code_of(lambda: read_bench(written)) == "result-damaged"


def test_progress_sees_the_rounds(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "footprint", lambda *_, **__: worker.Footprint(1.0, 1))
    seen: list[int] = []

    def watch(rounds: Iterable[int]) -> Iterator[int]:
        for i in rounds:
            seen.append(i)
            yield i

    found = bench(bundle, torch_model=None, rounds=2, progress=watch)
    assert seen == [0, 1]
    assert [c.name for c in found.contestants] == ["fp32"]
    assert asdict(found)["contestants"][0]["peak_rss"] == 1
