from __future__ import annotations

from pathlib import Path

import pytest
from refedge.errors import ExportError
from refedge.models.own import open_own

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_model.py"


def changed(tmp_path: Path, before: str, after: str) -> str:
    text = EXAMPLE.read_text()
    assert text.count(before) == 1
    path = tmp_path / "mine.py"
    path.write_text(text.replace(before, after))
    return f"{path}:build"


def test_the_example_is_sound_and_short() -> None:
    model, tokenizer, digest = open_own(f"{EXAMPLE}:build")
    assert [part.name for part in model.parts()] == ["text", "mask"]
    assert tokenizer.get_vocab_size() <= model.config.vocabulary
    assert len(digest) == 64
    assert len(EXAMPLE.read_text().splitlines()) < 60
    assert open_own(f"{EXAMPLE}:build")[2] == digest, "seeded: bench finds what was exported"


WRONG = {
    "size": ("size: int = 64", "side: int = 64"),
    "gate": ("(BATCH, self.config.width))", "(BATCH, 7))"),
    "mask": ("self.decode), (pixels, gate)", "self.decode), (pixels, known)"),
    "words": ('Part("text", ', 'Part("words", '),
    "forward()": ("pixels, ids, words, image_index=None):", "pixels, ids):"),
    "different logits": ("return self.decode(", "return 0.5 * self.decode("),
    "logits": ("scale_factor=4", "scale_factor=2"),
    "door": ("decode), (pixels, gate)", 'decode), (pixels, Port("door", "float32", (BATCH, 24)))'),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, said: str) -> None:
    with pytest.raises(ExportError) as caught:
        open_own(changed(tmp_path, *WRONG[said]))
    assert caught.value.code == "model-protocol"
    assert said in caught.value.why


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (None, "build", "no file"),
        ("", "build", "build"),
        ("def build(): return 3", "build", "int"),
        ("def build(): return (1, 2)", "build", "(int, int)"),
        ("def build(x): return x", "build", "TypeError"),
        ("def build(): raise OSError('no weights here')", "build", "no weights here"),
        ("import nothing_of_that_name", "build", "ModuleNotFoundError"),
        ("def build(:", "build", "SyntaxError"),
    ],
)
def test_files_that_give_no_model(tmp_path: Path, text: str | None, name: str, said: str) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ExportError) as caught:
        open_own(f"{path}:{name}")
    assert caught.value.code == "model-file"
    assert said in caught.value.why
