from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from refedge.errors import InputError
from refedge.runtime.manifest import PreprocessSpec
from refedge.runtime.preprocess import open_photo, to_pixels

RED = np.zeros((4, 6, 3), np.uint8)
RED[:, :, 0] = 200


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_rgb_passes_unchanged_however_it_comes(tmp_path: Path) -> None:
    image = Image.fromarray(RED)
    path = tmp_path / "red.png"
    image.save(path)
    for photo in (RED, image, encode(image), path, str(path)):
        assert np.array_equal(np.asarray(open_photo(photo)), RED)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    source = Image.fromarray(RED)
    image = source.convert("P").convert("PA") if mode == "PA" else source.convert(mode)
    photo = open_photo(image)
    assert photo.mode == "RGB"
    assert photo.size == (6, 4)


def test_transparent_pixels_lie_on_white() -> None:
    rgba = np.dstack((RED, np.full((4, 6), 0, np.uint8)))
    assert (np.asarray(open_photo(rgba)) == 255).all()
    half = np.dstack((RED, np.full((4, 6), 255, np.uint8)))
    assert np.array_equal(np.asarray(open_photo(half)), RED)
    palette = Image.fromarray(RED).convert("P")
    palette.info["transparency"] = int(np.asarray(palette)[0, 0])
    assert (np.asarray(open_photo(palette)) == 255).all()


def test_16_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.array([[0, 257, 32896, 65535]], np.uint16)
    expected = [0, 1, 128, 255]
    assert np.asarray(open_photo(ramp))[0, :, 0].tolist() == expected
    path = tmp_path / "deep.png"
    Image.fromarray(ramp).save(path)
    assert np.asarray(open_photo(path))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("orientation", "size"), [(1, (6, 4)), (3, (6, 4)), (6, (4, 6)), (8, (4, 6))]
)
def test_exif_rotation_is_applied(orientation: int, size: tuple[int, int]) -> None:
    image = Image.fromarray(RED)
    exif = image.getexif()
    exif[0x0112] = orientation
    photo = open_photo(encode(image, "JPEG", exif=exif.tobytes()))
    assert photo.size == size


def test_exif_turns_the_right_way() -> None:
    corner = np.zeros((4, 6, 3), np.uint8)
    corner[0, 0] = 255
    image = Image.fromarray(corner)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    turned = np.asarray(open_photo(encode(image, "PNG", exif=exif.tobytes())))
    assert turned[0, -1].tolist() == [255, 255, 255]


def test_resize_is_pillows_antialiased_bilinear() -> None:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (100, 150, 3), np.uint8))
    pixels = to_pixels(photo, PreprocessSpec(32, 48))
    assert pixels.shape == (32, 48, 3)
    expected = np.asarray(photo.resize((48, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4,), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.int64),
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray) -> None:
    with pytest.raises(InputError) as caught:
        open_photo(array)
    assert caught.value.code == "image-array"


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_photo(tmp_path / "no.png")
    assert caught.value.code == "image-missing"
    whole = encode(
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    )
    for broken in (b"", b"not a picture", whole[: len(whole) // 2], whole[:20]):
        with pytest.raises(InputError) as caught:
            open_photo(broken)
        assert caught.value.code == "image-unreadable"
    with pytest.raises(InputError):
        open_photo(tmp_path)  # a folder


def test_a_bomb_is_refused() -> None:
    import zlib

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    )
    with pytest.raises(InputError) as caught:
        open_photo(bomb)
    assert caught.value.code == "image-too-large"


def test_floats_and_wide_integers_have_no_known_white() -> None:
    for mode in ("F", "I"):
        image = Image.new(mode, (4, 4), 70000)
        with pytest.raises(InputError) as caught:
            open_photo(image)
        assert caught.value.code == "image-unreadable"


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with pytest.raises(InputError):
        open_photo(data)
