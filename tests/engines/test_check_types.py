"""What ``make stubs`` makes of generated stubs and of our modules; the check itself needs them."""

from __future__ import annotations

import ast
from pathlib import Path

from .check_types import copied, module_stub, tidied

STUB = '''from __future__ import annotations
import os
class Dims:
    pass
class IHostMemory:
    """Memory"""
class Profile:
    def set_shape(self, input: str, min: tensorrt_bindings.tensorrt.Dims) -> None:
        ...
    def odd(self, in: int) -> bool:
        ...
'''


def test_stubs_can_be_read_and_know_what_is_converted() -> None:
    stub = tidied(STUB)
    ast.parse(stub)
    assert "min: Dims | collections.abc.Sequence[int]" in stub
    assert "class Dims:\n    def __iter__(self) -> collections.abc.Iterator[int]: ..." in stub
    assert "class IHostMemory:\n    def __buffer__" in stub
    assert "    def odd(*_: typing.Any, **__: typing.Any) -> typing.Any:" in stub
    assert "    Profile: type[tensorrt.Profile]\n" in module_stub(stub)


def test_modules_are_copied_with_a_typed_module(tmp_path: Path) -> None:
    copied(tmp_path)
    part = (tmp_path / "refedge/engines/part.py").read_text()
    assert "def _built(trt: TensorRT, logger: Any" in part
    assert "trt: Any" not in part
    assert "from tensorrt_module import TensorRT\n" in part
    backend = (tmp_path / "refedge/runtime/backends/tensorrt.py").read_text()
    assert "def tensorrt() -> tuple[TensorRT, Any]:" in backend
    assert "tensorrt_module" not in (tmp_path / "refedge/runtime/plan.py").read_text()
