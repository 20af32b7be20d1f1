"""The compiled kernels by their table, and the library by TensorRT's own headers and registry."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from refedge.errors import EngineError, InputError
from refedge.plugins import compile as compiling
from refedge.plugins import native

ROOT = Path(__file__).parents[2]
TABLE = json.loads(compiling.TABLE.read_text())["cubins"]
JETPACK_6 = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90")
KERNELS = {
    f"{name}_{dtype}"
    for name in ("cross_attention", "norm_scores", "norm_columns", "norm_thin", "norm_output",
                 "mutual_seen", "mutual_pairs", "mutual_product")
    for dtype in ("float32", "float16", "bfloat16")
}  # fmt: skip


def test_the_cubins_are_of_this_source() -> None:
    """Otherwise: make cubins."""
    assert json.loads(compiling.TABLE.read_text())["source"] == compiling.source_hash()
    assert set(TABLE) == {f"sm_{sm}" for architectures, _ in compiling.SETS for sm in architectures}


def registers(image: bytes) -> dict[str, int]:
    """Registers of each kernel by the image itself: ``EIATTR_REGCOUNT`` of its ``.nv.info``."""
    start, count = struct.unpack_from("<Q", image, 40)[0], struct.unpack_from("<H", image, 60)[0]
    heads = [struct.unpack_from("<IIQQQQIIQQ", image, start + 64 * i) for i in range(count)]

    def text(table: tuple[int, ...], at: int) -> str:
        begin = table[4] + at
        return image[begin : image.index(b"\0", begin)].decode()

    names = heads[struct.unpack_from("<H", image, 62)[0]]
    by_name = {text(names, h[0]): h for h in heads}
    symbols, strings, info = by_name[".symtab"], by_name[".strtab"], by_name[".nv.info"]
    found, at = {}, info[4]
    while at < info[4] + info[5]:
        form, attribute, size = struct.unpack_from("<BBH", image, at)
        if (form, attribute) == (4, 0x2F):
            symbol, used = struct.unpack_from("<II", image, at + 4)
            found[text(strings, struct.unpack_from("<I", image, symbols[4] + 24 * symbol)[0])] = (
                used
            )
        at += 4 + (size if form == 4 else 0)
    return found


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    return native.cubins()


@pytest.mark.parametrize("architecture", list(TABLE))
def test_a_cubin_is_what_its_row_says(architecture: str, images: dict[str, bytes]) -> None:
    image, row = images[architecture], TABLE[architecture]
    assert len(image) == row["bytes"]
    assert image[:4] == b"\x7fELF"
    assert struct.unpack_from("<H", image, 18)[0] == 190  # EM_CUDA
    assert set(row["kernels"]) == KERNELS
    assert registers(image) == {name: used["registers"] for name, used in row["kernels"].items()}


@pytest.mark.parametrize("architecture", JETPACK_6)
def test_jetpack_6_can_load_it(architecture: str, images: dict[str, bytes]) -> None:
    """Drivers of CUDA 12.6 take ELF ABI version 7 and PTX 8.5, nothing later."""
    image, row = images[architecture], TABLE[architecture]
    assert image[8] <= 7
    assert struct.unpack_from("<I", image, 48)[0] & 0xFF == int(architecture[3:])
    assert tuple(map(int, row["ptx"].split("."))) <= (8, 5)


def test_the_page_shows_the_table() -> None:
    page = compiling.PAGE.read_text().split(compiling.MARK)[1]
    assert page == compiling.table(json.loads(compiling.TABLE.read_text()))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to ask for the launches")
def test_shared_memory_is_that_of_the_launches() -> None:
    assert compiling.shared() == json.loads(compiling.TABLE.read_text())["shared"]


@pytest.mark.parametrize("architecture", list(TABLE))
def test_kernels_stay_within_their_resources(architecture: str) -> None:
    """Of the half types two blocks of 256 threads fit 65,536 registers, but for two kernels that
    keep sums of all heads; pointers may be kept in memory, sums not. Where there are no tensor
    cores for a type (float32, and bfloat16 before 8.0) products are made by hand."""
    for name, used in TABLE[architecture]["kernels"].items():
        kernel, dtype = name.rsplit("_", 1)
        by_hand = dtype == "float32" or (dtype == "bfloat16" and architecture == "sm_75")
        alone = dtype == "float32" or kernel in ("cross_attention", "mutual_product")
        assert used["registers"] <= (255 if alone else 128), name
        assert used["stack"] <= (256 if by_hand else 64), name


def test_a_changed_cubin_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(compiling.KERNELS, copy)
    monkeypatch.setattr(native, "_TABLE", copy / "cubins.json")
    packed = copy / "cubins" / "sm_87.cubin.xz"
    good = packed.read_bytes()
    for bad in (good[:-20], (copy / "cubins" / "sm_86.cubin.xz").read_bytes(), b""):
        packed.write_bytes(bad)
        with pytest.raises(EngineError) as error:
            native.cubins()
        assert error.value.code == "plugin-kernels"


def header(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "NvInferVersion.h").write_text(text)
    (folder / "NvInferRuntime.h").write_text("#error not these\n")
    return folder


def test_versions_of_headers_are_read(tmp_path: Path) -> None:
    plain = "#define NV_TENSORRT_MAJOR 8 //!< major\n#define NV_TENSORRT_MINOR 6\n"
    plain += "#define NV_TENSORRT_PATCH 1\n"
    named = "#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 13\n"
    named += "#define TRT_PATCH_ENTERPRISE 0\n"
    for part in ("MAJOR", "MINOR", "PATCH"):
        named += f"#define NV_TENSORRT_{part} TRT_{part}_ENTERPRISE //!< {part}\n"
    assert native.version_of(header(tmp_path / "a", plain)) == (8, 6, 1)
    assert native.version_of(header(tmp_path / "b", named)) == (10, 13, 0)
    assert native.version_of(header(tmp_path / "c", "nothing")) == ()
    assert native.version_of(tmp_path / "d") == ()


def test_a_build_says_what_is_missing(tmp_path: Path) -> None:
    def refused(code: str, headers: Path, compiler: str = "g++") -> str:
        with pytest.raises(EngineError) as error:
            native.build(tmp_path / "out", headers, compiler)
        assert error.value.code == code
        assert not list(tmp_path.glob("out/*")), "nothing is left half-made"
        return str(error.value)

    define = "#define NV_TENSORRT_MAJOR {}\n#define NV_TENSORRT_MINOR 5\n"
    define += "#define NV_TENSORRT_PATCH 0\n"
    refused("plugin-headers", tmp_path)
    refused("plugin-headers", header(tmp_path / "old", define.format(8)))
    new = header(tmp_path / "new", define.format(10))
    refused("plugin-compiler", new, str(tmp_path / "no-compiler"))
    if shutil.which("g++"):
        assert "not these" in refused("plugin-compiler", new)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        native.build(tmp_path / "file" / "out", new)
    assert caught.value.code == "output-unwritable"


class Registry:
    """Answers as the registries of 8.6 (None) and of 10 (RuntimeError) answer to a bad library."""

    __version__ = "0"

    def __init__(self, raises: bool) -> None:
        self.raises = raises

    def get_plugin_registry(self) -> Registry:
        return self

    def load_library(self, path: str) -> None:
        # a library that registers by itself would be refused for what it registered
        assert "REFEDGE_PLUGINS_REGISTER" not in os.environ
        if self.raises:
            raise RuntimeError("no such symbol")


@pytest.mark.parametrize("raises", [True, False])
def test_libraries_are_verified_before_they_are_loaded(
    tmp_path: Path, raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFEDGE_PLUGINS_REGISTER", "1")
    library = tmp_path / "librefedge_plugins-0.so"
    cases = [("plugin-missing", ""), ("plugin-changed", "0" * 64)]
    for code, sha256 in cases:
        with pytest.raises(EngineError) as error:
            native.register(Registry(raises), {library: sha256})
        assert error.value.code == code
        library.write_bytes(b"not a library")
    right = hashlib.sha256(b"not a library").hexdigest()
    with pytest.raises(EngineError) as error:
        native.register(Registry(raises), {library: right}, ["a", "b"])
    assert error.value.code == "plugin-refused"
    assert "a | b" in error.value.why
    assert os.environ["REFEDGE_PLUGINS_REGISTER"] == "1"


HEADERS = Path(os.environ.get("REFEDGE_TENSORRT_HEADERS", ""))
LEAN = os.environ.get("REFEDGE_TENSORRT_LEAN", "")
FOUND = sorted(p.parent.parent.name for p in HEADERS.glob("*/include/NvInferRuntime.h"))
needs_headers = pytest.mark.skipif(
    not os.environ.get("REFEDGE_TENSORRT_HEADERS") or shutil.which("g++") is None,
    reason="TensorRT's headers are not here: make plugins",
)


def conformance(folder: Path, tag: str) -> Path:
    program = folder / f"conformance-{tag}"
    source = Path(__file__).parent / "emulation" / "conformance.cpp"
    include = ["-I", str(ROOT / "plugins" / "cpp"), "-I", str(HEADERS / tag / "include")]
    flags = ["-std=c++17", "-O0", "-w", *include]
    subprocess.run(["g++", *flags, "-o", str(program), str(source), "-ldl"], check=True)
    return program


@needs_headers
@pytest.mark.parametrize("tag", FOUND)
def test_the_library_answers_as_tensorrt_asks(tag: str, tmp_path: Path) -> None:
    library = native.build(tmp_path, HEADERS / tag / "include")
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    assert library.name == f"librefedge_plugins-{digest[:16]}.so"
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True)
    assert "cuda" not in needed.stdout
    assert "nvinfer" not in needed.stdout
    done = run(conformance(tmp_path, tag), library)
    assert "0 failed" in done, done


@needs_headers
@pytest.mark.skipif(not LEAN, reason="TensorRT's lean runtime is not here: make plugins")
@pytest.mark.parametrize("tag", [t for t in FOUND if not t.startswith("v8")])
def test_tensorrt_s_own_registry_takes_the_library(tag: str, tmp_path: Path) -> None:
    """The registry of 11, asked through 11's headers, with libraries of every generation."""
    library = native.build(tmp_path, HEADERS / tag / "include")
    latest = max(FOUND, key=lambda t: [int(n) for n in t[1:].split(".")])
    program = conformance(tmp_path, latest)
    done = run(program, library, LEAN)
    assert "0 failed" in done, done
    done = run(program, library, LEAN, "alone")
    # a library of another generation does not touch the registry
    assert ("0 failed" if tag == latest else "no creator of that name") in done, done


def run(*command: Any) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
