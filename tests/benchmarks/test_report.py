"""The page: whole, self-contained, safe with any text, the same for the same records."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refedge.benchmarks.accuracy import (
    Accuracy,
    Agreement,
    Disagreement,
    Interval,
    PlanAccuracy,
)
from refedge.benchmarks.bench import Bench, Contestant, Series
from refedge.benchmarks.charts import Point, front, pareto
from refedge.benchmarks.report import headline, page, write_report
from refedge.data.protocols import Scores

VOID = {"meta", "br", "img", "link", "hr", "input"}
EVIL = '<script>alert("x")</script>'


class Reader(HTMLParser):
    """Checks that tags balance and collects what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def scores(miou: float | None, count: int = 3) -> Scores:
    precision = () if miou is None else (0.875, 0.75, 0.625, 0.5, 0.25)
    return Scores(count, miou, miou, precision, 0.9375 if miou else None, 0.8125, None)


def plan(name: str, miou: float, *, change: float | None = None) -> PlanAccuracy:
    paired = change is not None
    return PlanAccuracy(
        name,
        f"dialect-{name}",
        scores(miou),
        {"attribute": scores(miou), "none": scores(None, 0)},
        (0.9, 0.5, 0.0, 1.0),
        {"text": f"text-{name}", "mask": f"mask-{name}", "checkpoint": "weights"},
        (1.0, 0.8, 0.3, 0.9) if paired else (),
        Agreement(0.9751, 0.412, 0.037) if paired else None,
        Interval(change, change - 0.0021, change + 0.0021) if change is not None else None,
    )


def disagreement(name: str, size: tuple[int, int] = (48, 64)) -> Disagreement:
    rng = np.random.default_rng(0)
    masks = [np.zeros(size, bool) for _ in range(3)]
    for i, mask in enumerate(masks[:2]):
        mask[5 + i : 20, 5:30] = True
    pixels = rng.integers(0, 255, (48, 64, 3), np.uint8)
    text = f"the {EVIL} circle & more"
    return Disagreement(name, f"id/{EVIL}", text, "attribute", 0.3, 0.91, 0.27, pixels, *masks)


@pytest.fixture(scope="module")
def accuracy() -> Accuracy:
    plans = (
        plan("fp32", 0.7812),
        plan("int8", 0.7764, change=-0.0048),
        plan("int8 $a$ mixed", 0.7801, change=-0.0011),
    )
    worst = (disagreement("int8"), disagreement("int8 $a$ mixed", (300, 400)))
    ids = tuple(f"s/{i}" for i in range(4))
    return Accuracy("tiny", "bundledigest", "shapes:test", "refshapes", 2, ids, plans, worst)


def series(p50: float, unstable: bool = False) -> Series:
    return Series((p50,) * 3, p50, p50 + 1, p50 + 2, unstable)


def contestant(name: str, ms: float, artefacts: dict[str, str], backend: str = "ort") -> Contestant:
    stages = {"preprocess": series(0.5), "text": series(ms / 4), "mask": series(ms / 2)}
    ends = {"uncached": series(ms), "cached": series(ms * 0.8, unstable=name == "int8")}
    rates = {"uncached": 1000 / ms, "cached": 1250 / ms}
    return Contestant(
        name, backend, "", stages, ends, rates, 321.0, 150_400_000, 7_300_000, artefacts
    )


@pytest.fixture(scope="module")
def whole(accuracy: Accuracy, bench: Bench) -> str:
    return page(accuracy, bench)


@pytest.fixture(scope="module")
def bench(accuracy: Accuracy) -> Bench:
    fp32, int8, _ = accuracy.plans
    runs = (
        contestant("eager", 40.25, {"checkpoint": "weights"}, "torch"),
        contestant("fp32", 20.5, fp32.artefacts),
        contestant("int8", 10.0, int8.artefacts),
    )
    settings, device = {"size": 96, "threads": 1}, {"cpu": "some cpu", "packages": {"torch": "2"}}
    return Bench("tiny", "bundledigest", settings, device, runs)


def test_the_page_is_whole_and_loads_nothing(whole: str) -> None:
    text, read = whole, Reader(whole)
    assert set(re.findall(r"https?://[^\s\"'<)]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not read.all("script")
    assert not read.all("link")
    assert not re.search(r"@import|url\((?!#)", text)
    assert all(i["src"].startswith("data:image/png;base64,") for i in read.all("img"))
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:xlink:href="|url\()#([\w.-]+)', text)
    assert set(used) <= set(ids)
    assert all(i["alt"] for i in read.all("img"))
    assert all(s["aria-label"] for s in read.all("svg"))
    assert "width=device-width" in text
    assert "@media print" in text


def test_every_number_is_there(accuracy: Accuracy, whole: str) -> None:
    text = Reader(whole).text()
    for p in accuracy.plans:
        assert p.plan in text
        assert all(digest in text for digest in p.artefacts.values())
        assert f"{p.overall.miou:.3f}" in text
    for number in (
        "−0.0048", "−0.0069 … −0.0027", "0.9751", "0.412", "3.7 %",  # against fp32
        "20.50", "16.40", "4.03", "7.3", "150.4", "321", "125.0",  # of time and size
        "0.875", "0.938", "0.812", "bundledigest", "some cpu", "unstable",
    ):  # fmt: skip
        assert number in text, number
    assert "int8: cached" in text
    assert "time and memory of int8 $a$ mixed" in text


def test_text_from_outside_stays_text(accuracy: Accuracy, bench: Bench) -> None:
    evil = replace(accuracy, data=EVIL, plans=(*accuracy.plans, plan(EVIL, 0.5, change=-0.3)))
    runs = (*bench.contestants, contestant(f"{EVIL} -->\\1", 5.0, {"mask": EVIL}))
    text = page(evil, replace(bench, contestants=runs, settings={EVIL: EVIL}))
    assert "<script" not in text
    assert EVIL in Reader(text).text()


def test_the_same_records_give_the_same_bytes(
    accuracy: Accuracy, bench: Bench, whole: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_report(path, accuracy, bench)
    assert path.read_text(encoding="utf-8") == whole


def test_pictures_can_be_seen(accuracy: Accuracy) -> None:
    sizes = []
    for image in Reader(page(accuracy, None)).all("img"):
        data = base64.b64decode(image["src"].partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            sizes.append(opened.size)
    assert sizes == [(256, 192)] * 3 + [(288, 216)] * 3


def test_without_a_bench(accuracy: Accuracy) -> None:
    read = Reader(page(accuracy, None))
    assert "time, memory and file size: no result of bench was given" in read.text()
    assert len(read.all("svg")) == len(accuracy.plans)


def test_only_fp32(accuracy: Accuracy) -> None:
    alone = replace(accuracy, plans=accuracy.plans[:1], worst=())
    text = Reader(page(alone, None)).text()
    assert "fp32 is the only plan" in text
    assert "no plan besides fp32 was scored" in text
    assert "0.781 – – – – – – – – – –" in text


def test_without_fp32_and_without_expressions(accuracy: Accuracy) -> None:
    other = replace(accuracy, plans=(plan("int8", 0.7),), worst=())
    assert "fp32 plan was not among those" in Reader(page(other, None)).text()
    nothing = replace(other.plans[0], overall=scores(None, 0), families={}, ious=())
    Reader(page(replace(other, ids=(), scenes=0, plans=(nothing,)), None))
    Reader(page(replace(other, plans=()), None))


def test_torch_takes_its_accuracy_from_the_same_checkpoint_only(
    accuracy: Accuracy, bench: Bench, whole: str
) -> None:
    by_name = {line.name: line for line in headline(accuracy, bench)}
    assert by_name["eager"].borrowed
    assert by_name["int8"].faster == pytest.approx(4.025)
    assert "was not scored again" in whole
    for checkpoint in ("others", "none: seeded, untrained weights"):
        stranger = replace(bench.contestants[0], artefacts={"checkpoint": checkpoint})
        other = replace(bench, contestants=(stranger, *bench.contestants[1:]))
        by_name = {line.name: line for line in headline(accuracy, other)}
        assert by_name["eager"].accuracy is None
    assert "accuracy of eager: it was timed" in Reader(page(accuracy, other)).text()


def test_times_of_other_files_stand_beside_no_plan(accuracy: Accuracy, bench: Bench) -> None:
    renewed = replace(accuracy.plans[1], artefacts={"mask": "another", "checkpoint": "weights"})
    other = replace(accuracy, bundle="later", plans=(accuracy.plans[0], renewed))
    assert [(x.name, x.accuracy is None, x.speed is None) for x in headline(other, bench)] == [
        ("fp32", False, False),
        ("int8", False, True),
        ("eager", False, False),
        ("int8", True, False),
    ]
    text = Reader(page(other, bench)).text()
    assert "of the bundle bundledigest" in text


def test_the_front() -> None:
    fast, good, slow = Point("fast", 1, 0.7), Point("good", 2, 0.8), Point("slow", 3, 0.75)
    tie = Point("tie", 2, 0.8)
    assert front([slow, good, fast]) == [fast, good]
    assert front([good, tie]) == [good]
    assert "<svg" in pareto([fast])


def test_the_template_is_shipped() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '\n"refedge.benchmarks" = ["*.html"]\n' in project.partition("package-data]")[2]
