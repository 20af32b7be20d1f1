from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from refedge.benchmarks.accuracy import Accuracy, PlanAccuracy
from refedge.benchmarks.bench import Bench, Contestant, series, write_bench
from refedge.benchmarks.compare import Comparison, compare
from refedge.benchmarks.timing import STAGES
from refedge.data.protocols import Scores
from refedge.errors import RefedgeError
from refedge.runtime.files import write_json

DEVICE = {"cpu": "one", "cores": 2, "flags": ["avx2"], "packages": {"onnxruntime": "1.20"}}
SETTINGS = {"threads": 1, "rounds": 20, "warm_up_runs": {"fp32": 10}}
ARTEFACTS = {"mask": "m", "checkpoint": "c"}


def contestant(name: str, ms: float, *, backend: str = "onnxruntime", shaky: bool = False) -> Any:
    steady = series([ms] * 20)
    timing = series([ms, 2 * ms] * 10) if shaky else steady
    return Contestant(
        name,
        backend,
        "ort",
        dict.fromkeys(STAGES, steady),
        {"uncached": timing, "cached": steady},
        {"uncached": 1.0, "cached": 1.0},
        1.0,
        1,
        1,
        ARTEFACTS,
    )


TORCH = contestant("torch", 30.0, backend="torch")


def speeds(*contestants: Contestant) -> Bench:
    return Bench("slvit", "digest", SETTINGS, DEVICE, contestants)


def scores(**mious: float | None) -> dict[str, Any]:
    plans = tuple(
        PlanAccuracy(name, "ort", Scores(2, m, m, (), None, None, None), {}, (), ARTEFACTS)
        for name, m in mious.items()
    )
    found = Accuracy("slvit", "digest", "refshapes:test", "refshapes", 1, ("a", "b"), plans)
    return found.record() | {"device": DEVICE}


@pytest.fixture
def judge(tmp_path: Path) -> Callable[..., Comparison]:
    def run(before: Any, after: Any, slower: float = 0.05, lower: float = 0.005) -> Comparison:
        paths = []
        for name, result in (("before", before), ("after", after)):
            path = tmp_path / f"{name}.json"
            write_bench(result, path) if isinstance(result, Bench) else write_json(result, path)
            paths.append(path)
        return compare(*paths, slower=slower, lower=lower)

    return run


Judge = Callable[..., Comparison]


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(RefedgeError) as caught:
        call()
    assert type(caught.value).__name__ in ("DataError", "InputError")
    return caught.value.code


def verdicts(found: Comparison) -> list[str]:
    assert all(len(row) == len(found.header) for row in found.rows)
    return [row[-1] for row in found.rows]


# speed


def test_the_same_is_not_worse(judge: Judge) -> None:
    result = speeds(TORCH, contestant("fp32", 10.0))
    found = judge(result, result)
    assert found.worse == ()
    assert verdicts(found) == ["yardstick, not judged"] * 2 + ["ok"] * 2
    assert "slvit" in found.title


def test_a_slower_plan_is_worse_in_both_timings(judge: Judge) -> None:
    found = judge(speeds(contestant("fp32", 10.0)), speeds(contestant("fp32", 10.6)))
    assert verdicts(found) == ["SLOWER", "SLOWER"]
    assert len(found.worse) == 2
    assert found.worse[0].startswith("fp32, uncached: p50 grew by 6.0 %")
    assert found.rows[0][2:5] == ["10.00", "10.60", "+6.0 %"]


@pytest.mark.parametrize(("ms", "worse"), [(5.0, 0), (10.0, 0), (10.5, 0), (10.51, 2)])
def test_the_limit_itself_is_allowed(judge: Judge, ms: float, worse: int) -> None:
    found = judge(speeds(contestant("fp32", 10.0)), speeds(contestant("fp32", ms)))
    assert len(found.worse) == worse


@pytest.mark.parametrize("when", ["before", "after"])
def test_unstable_timings_are_shown_and_not_judged(judge: Judge, when: str) -> None:
    before = speeds(contestant("fp32", 10.0, shaky=when == "before"))
    after = speeds(contestant("fp32", 20.0, shaky=when == "after"))
    found = judge(before, after)
    assert verdicts(found) == [f"unstable {when}, not judged", "SLOWER"]
    assert [line.split(":")[0] for line in found.worse] == ["fp32, cached"]


def test_a_plan_that_is_gone_is_worse_and_a_new_one_is_not(judge: Judge) -> None:
    before = speeds(contestant("fp32", 10.0), contestant("int8", 5.0))
    after = speeds(contestant("fp32", 10.0), contestant("fp16", 9.0))
    found = judge(before, after)
    assert found.worse == ("int8 is missing",)
    assert verdicts(found) == ["ok", "ok", "MISSING", "new"]


def test_torch_is_the_yardstick(judge: Judge) -> None:
    plan = contestant("fp32", 10.0)
    slow = contestant("torch", 90.0, backend="torch")
    assert judge(speeds(TORCH, plan), speeds(slow, plan)).worse == ()
    found = judge(speeds(TORCH, plan), speeds(plan))
    assert found.worse == ()
    assert verdicts(found) == ["not timed after", "ok", "ok"]


def test_other_packages_are_compared_and_named(judge: Judge) -> None:
    before = speeds(contestant("fp32", 10.0))
    newer = replace(before, device=DEVICE | {"packages": {"onnxruntime": "1.21"}})
    assert "onnxruntime 1.20 → 1.21" in judge(before, newer).title


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"device": DEVICE | {"cpu": "another"}}, "result-device"),
        ({"device": DEVICE | {"cores": 4}}, "result-device"),
        ({"device": DEVICE | {"flags": ["avx2", "avx512_vnni"]}}, "result-device"),
        ({"model": "lavt"}, "result-model"),
        ({"settings": SETTINGS | {"threads": 2}}, "result-settings"),
        ({"settings": SETTINGS | {"rounds": 30}}, "result-settings"),
        ({"settings": {"threads": 1}}, "result-settings"),
    ],
)
def test_runs_of_different_kinds_are_refused(
    judge: Judge, change: dict[str, Any], code: str
) -> None:
    before = speeds(contestant("fp32", 10.0))
    assert code_of(lambda: judge(before, replace(before, **change))) == code
    assert code_of(lambda: judge(replace(before, **change), before)) == code


def test_another_checkpoint_is_another_model(judge: Judge) -> None:
    plan = contestant("fp32", 10.0)
    other = replace(plan, artefacts=ARTEFACTS | {"checkpoint": "d"})
    assert code_of(lambda: judge(speeds(plan), speeds(other))) == "result-model"


def test_other_graphs_and_warm_ups_may_be_compared(judge: Judge) -> None:
    plan = contestant("fp32", 10.0)
    after = replace(
        speeds(replace(plan, artefacts=ARTEFACTS | {"mask": "n"})),
        bundle="another",
        settings=SETTINGS | {"warm_up_runs": {"fp32": 50}},
    )
    assert judge(speeds(plan), after).worse == ()


# accuracy


def test_a_lower_score_is_worse(judge: Judge) -> None:
    found = judge(scores(fp32=0.75, int8=0.74), scores(fp32=0.75, int8=0.70))
    assert verdicts(found) == ["ok", "LOWER"]
    assert found.worse == ("int8: mIoU dropped by 0.0400 (0.7400 to 0.7000), 0.005 is allowed",)


@pytest.mark.parametrize(("miou", "worse"), [(0.9, 0), (0.745, 0), (0.7449, 1)])
def test_the_limit_of_scores_is_allowed(judge: Judge, miou: float, worse: int) -> None:
    assert len(judge(scores(fp32=0.75), scores(fp32=miou)).worse) == worse


def test_undefined_and_missing_scores(judge: Judge) -> None:
    found = judge(scores(a=None, b=0.5, c=0.5), scores(a=0.1, b=None, d=0.5))
    assert verdicts(found) == ["undefined before, not judged", "UNDEFINED", "MISSING", "new"]
    assert found.worse == ("b: mIoU was 0.5000 and is undefined", "c is missing")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"device": DEVICE | {"cpu": "another"}}, "result-device"),
        ({"model": "lavt"}, "result-model"),
        ({"data": "refshapes:val"}, "result-data"),
        ({"protocol": "lavt480"}, "result-data"),
        ({"scenes": 2}, "result-data"),
        ({"ids": ["a", "c"]}, "result-data"),
        ({"ids": ["b", "a"]}, "result-data"),
        ({"plans": []}, "result-damaged"),
        ({"plans": [{"plan": "fp32"}]}, "result-damaged"),
    ],
)
def test_scores_of_different_kinds_are_refused(
    judge: Judge, change: dict[str, Any], code: str
) -> None:
    before = scores(fp32=0.75)
    assert code_of(lambda: judge(before, before | change)) == code


# files and limits


def test_timings_and_scores_do_not_mix(judge: Judge) -> None:
    speed, score = speeds(contestant("fp32", 10.0)), scores(fp32=0.75)
    assert code_of(lambda: judge(speed, score)) == "result-kind"
    assert code_of(lambda: judge(score, speed)) == "result-kind"


def test_files_that_are_no_results(tmp_path: Path) -> None:
    whole, cut, other = (tmp_path / f"{n}.json" for n in ("whole", "cut", "other"))
    write_bench(speeds(contestant("fp32", 10.0)), whole)
    cut.write_bytes(whole.read_bytes()[:-20])
    other.write_text(json.dumps({"schema": "coco"}))
    for path, code in (
        (cut, "result-damaged"),
        (other, "result-kind"),
        (tmp_path / "none.json", "data-missing"),
    ):
        for pair in ((whole, path), (path, whole)):
            assert code_of(lambda pair=pair: compare(*pair, slower=0.1, lower=0.1)) == code


@pytest.mark.parametrize("limit", [-0.1, float("nan")])
def test_a_limit_is_zero_or_more(judge: Judge, limit: float) -> None:
    result = speeds(contestant("fp32", 10.0))
    assert code_of(lambda: judge(result, result, slower=limit)) == "result-limit"
    assert code_of(lambda: judge(result, result, lower=limit)) == "result-limit"
