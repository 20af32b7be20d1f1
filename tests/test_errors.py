from __future__ import annotations

import pickle
import re
from pathlib import Path

from refedge.errors import BundleError, RefedgeError

FAMILIES = (
    "backend|bench|bundle|calibrate|checkpoint|config|convert|cuda|data|dialect|engine|export|expression|image"
    "|mask|model|output|plan|plugin|protocol|result|threads|tokenizer|train|weights"
)
ROOT = Path(__file__).parent.parent


def codes_in_the_code() -> set[str]:
    found: set[str] = set()
    for path in ROOT.glob("**/*.py"):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("tests", "build") or relative.parts[0].startswith("."):
            continue
        found |= set(re.findall(rf'"((?:{FAMILIES})-[a-z0-9-]+)"', path.read_text()))
    # calibrate-{kind} in calibration/quantize.py
    return found | {"calibrate-plan", "calibrate-rest", "calibrate-method"}


def test_an_error_says_what_why_and_how() -> None:
    error = BundleError("bundle-x", "it broke", why="because", fix="mend it")
    assert str(error) == "[bundle-x] it broke\n  why: because\n  fix: mend it"
    assert isinstance(error, RefedgeError)


def test_errors_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(BundleError("bundle-x", "a", why="b", fix="c")))
    assert type(error) is BundleError
    assert (error.code, error.what, error.why, error.fix) == ("bundle-x", "a", "b", "c")


def test_every_code_is_documented_and_none_is_invented() -> None:
    documented = set(re.findall(r"^\| `([a-z0-9-]+)`", (ROOT / "docs/errors.md").read_text(), re.M))
    assert documented == codes_in_the_code() | {"package-missing"}
