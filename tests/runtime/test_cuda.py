"""libcuda through ctypes: what is said where there is no driver, or one that refuses.

The drivers here are small C libraries that answer as the real one does; nothing else is pretended.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from refedge.errors import BackendError
from refedge.runtime.backends import cuda

WORKING = r"""
#include <string.h>
#include <stddef.h>
#define ANSWER(name, ...) int name(__VA_ARGS__)
static int ended, launched, destroyed;
ANSWER(cuInit, unsigned f) { return INIT; }
ANSWER(cuDriverGetVersion, int *v) { *v = 12060; return 0; }
ANSWER(cuDeviceGet, int *d, int i) { *d = 7; return i; }
ANSWER(cuDeviceGetName, char *n, int len, int d) { strncpy(n, "Orin", len); return d != 7; }
ANSWER(cuDeviceTotalMem_v2, size_t *b, int d) { *b = (size_t)8 << 30; return d != 7; }
ANSWER(cuDeviceGetAttribute, int *p, int a, int d) {
  *p = a == 18 ? 1 : a == 75 ? 8 : a == 76 ? 7 : 0; return d != 7; }
ANSWER(cuGetErrorName, int e, const char **s) {
  *s = e == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_NO_DEVICE"; return e > 900; }
ANSWER(cuGetErrorString, int e, const char **s) { *s = "in words"; return e > 900; }
ANSWER(cuStreamBeginCapture_v2, void *s, int mode) { return s != (void *)5 || mode != 1; }
ANSWER(cuStreamEndCapture, void *s, void **g) { ended++; *g = (void *)11; return s != (void *)5; }
ANSWER(cuGraphInstantiateWithFlags, void **e, void *g, unsigned long long flags) {
  *e = (void *)12; return g != (void *)11 || flags; }
ANSWER(cuGraphLaunch, void *e, void *s) { launched++; return e != (void *)12 || s != (void *)5; }
ANSWER(cuGraphDestroy, void *g) { return g != (void *)11; }
ANSWER(cuGraphExecDestroy, void *e) { destroyed++; return e != (void *)12; }
int test_ended(void) { return ended; }
int test_launched(void) { return launched; }
int test_destroyed(void) { return destroyed; }
"""

Driver = Callable[..., None]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Compile a driver and make it this machine's."""

    def install(code: str = WORKING, init: int = 0) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler here")
        (tmp_path / "d.c").write_text(f"#define INIT {init}\n{code}")
        built = tmp_path / "libcuda.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", built, tmp_path / "d.c"],
                       check=True)  # fmt: skip
        monkeypatch.setattr(cuda, "_LIBRARY", str(built))

    cuda.library.cache_clear()
    cuda.device.cache_clear()
    yield install
    cuda.library.cache_clear()
    cuda.device.cache_clear()


def test_no_driver(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_LIBRARY", "libcuda-that-is-not-there.so.1")
    for ask in (cuda.device, cuda.Cuda):
        with pytest.raises(BackendError) as caught:
            ask()
        assert caught.value.code == "cuda-missing"
        assert "libcuda-that-is-not-there.so.1" in caught.value.why


def test_a_driver_from_before_graphs(driver: Driver) -> None:
    driver("int cuInit(unsigned f) { return 0; }")
    with pytest.raises(BackendError) as caught:
        cuda.device()
    assert caught.value.code == "cuda-missing"
    assert "cuDriverGetVersion" in caught.value.why


def test_a_driver_without_a_gpu(driver: Driver) -> None:
    driver(init=100)
    with pytest.raises(BackendError) as caught:
        cuda.device()
    assert caught.value.code == "cuda-missing"
    assert caught.value.why == "CUDA_ERROR_NO_DEVICE (100): in words"


def test_the_device(driver: Driver) -> None:
    driver()
    assert cuda.device() == cuda.Device("Orin", 87, "12.6", 8 << 30, integrated=True)


@pytest.mark.parametrize(
    ("status", "code", "why"),
    [
        (2, "cuda-memory", "CUDA_ERROR_OUT_OF_MEMORY (2): in words"),
        (700, "cuda-failed", "CUDA_ERROR_NO_DEVICE (700): in words"),
        (999, "cuda-failed", "driver error 999"),
    ],
)
def test_a_call_that_fails(driver: Driver, status: int, code: str, why: str) -> None:
    driver()
    with pytest.raises(BackendError, match="run") as caught:
        cuda.check(status, "run")
    assert (caught.value.code, caught.value.why) == (code, why)


def test_a_graph_is_captured_launched_and_freed(driver: Driver) -> None:
    driver()
    calls: list[int] = []
    graph = cuda.Graph(5, lambda: calls.append(1))
    graph.launch()
    graph.launch()
    lib = cuda.library()
    assert (calls, lib.test_ended(), lib.test_launched()) == ([1], 1, 2)
    del graph
    assert lib.test_destroyed() == 1


def test_a_capture_that_fails_is_ended(driver: Driver) -> None:
    driver()

    def refuse() -> None:
        raise ValueError("not under capture")

    with pytest.raises(ValueError, match="not under capture"):
        cuda.Graph(5, refuse)
    assert cuda.library().test_ended() == 1
    with pytest.raises(BackendError, match="begin a graph"):
        cuda.Graph(6, lambda: None)


@pytest.fixture
def pycuda(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """As much of pycuda.driver as a ``Cuda`` takes; ``said`` keeps what was asked of it."""
    driver()
    made = ModuleType("pycuda.driver")
    said: list[tuple[object, ...]] = []

    class Error(Exception):
        pass

    class OutOfMemoryError(Error):
        pass

    class Context:
        def push(self) -> None:
            said.append(("push",))

        @staticmethod
        def pop() -> None:
            said.append(("pop",))

        def detach(self) -> None:
            said.append(("detach",))

    class Device:
        def __init__(self, number: int) -> None:
            pass

        def retain_primary_context(self) -> Context:
            return Context()

    class Stream:
        handle = 5

        def __init__(self, flags: int = 0) -> None:
            said.append(("stream", flags))

    room = {"left": 2}

    def mem_alloc(size: int) -> int:
        said.append(("alloc", size))
        if not room["left"]:
            raise OutOfMemoryError
        room["left"] -= 1
        return 4096 * room["left"]

    given = {"said": said, "Error": Error, "MemoryError": OutOfMemoryError, "Context": Context,
             "Device": Device, "Stream": Stream, "mem_alloc": mem_alloc, "room": room,
             "init": lambda: None}  # fmt: skip
    made.__dict__.update(given)
    package = ModuleType("pycuda")
    package.driver = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", made)
    cuda._process.cache_clear()
    yield made
    cuda._process.cache_clear()


def test_a_stream_is_not_bound_to_the_legacy_one(pycuda: ModuleType) -> None:
    made = cuda.Cuda()
    assert ("stream", 1) in pycuda.said
    assert made.stream == 5


def test_the_context_is_never_released(pycuda: ModuleType) -> None:
    """TensorRT's objects may be destroyed after everything that Python calls at its end."""
    kept = weakref.ref(cuda.Cuda()._process)
    cuda._process.cache_clear()
    gc.collect()
    assert kept() is not None
    assert ("detach",) not in pycuda.said


def test_what_is_free_goes_back_when_memory_is_short(pycuda: ModuleType) -> None:
    made = cuda.Cuda()
    first = made.take(1000)
    del first
    assert made.take(900).nbytes == 900  # of the same size: the same memory
    assert [s for s in pycuda.said if s[0] == "alloc"] == [("alloc", 1024)]
    pools = made._process.pools
    assert pools[("device", 1024)] == [4096]
    pycuda.room["left"] = 0
    with made.current("take"), pytest.raises(pycuda.MemoryError):
        made.take(5000)
    assert pools[("device", 1024)] == []


def test_trimming_makes_no_context(pycuda: ModuleType) -> None:
    cuda.trim()
    assert pycuda.said == []
    block = cuda.Cuda().take(1000)
    del block
    pycuda.said.clear()
    cuda.trim()
    assert pycuda.said == [("push",), ("pop",)]
    assert not any(cuda._process().pools.values())


def test_a_gpu_that_cannot_be_opened(pycuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> None:
        raise pycuda.Error("cuInit failed: device busy")

    monkeypatch.setattr(pycuda, "init", busy)
    with pytest.raises(BackendError) as caught:
        cuda.Cuda()
    assert (caught.value.code, caught.value.what) == ("cuda-failed", "CUDA could not open the GPU")
