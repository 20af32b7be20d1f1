"""Any photo to the ``pixels`` a model takes: uint8 RGB at the model's size.

The resize is done here, on the host, by Pillow, exactly as the models' own evaluation did it;
normalisation is inside the graph.
"""

from __future__ import annotations

import io
import os
import warnings
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError
from .manifest import PreprocessSpec

Photo: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.generic]"

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def open_photo(photo: Photo) -> Image.Image:
    """An upright 8-bit RGB picture from a path, encoded bytes, a Pillow image or an array.

    Arrays are [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, bool or uint16 (scaled by 257).
    Transparent pixels are laid on white, 16-bit values scaled, EXIF rotation applied.
    """
    if isinstance(photo, np.ndarray):
        return _flatten(_from_array(photo))
    if isinstance(photo, Image.Image):
        return _flatten(ImageOps.exif_transpose(photo))
    source = io.BytesIO(photo) if isinstance(photo, bytes) else photo
    name = "the picture's bytes" if isinstance(photo, bytes) else str(photo)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                image.load()
                return _flatten(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise InputError(
            "image-missing",
            f"there is no picture at {name}",
            why="the file does not exist",
            fix="check the path",
        ) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(
            "image-too-large",
            f"{name} is too large",
            why=str(error),
            fix="scale the picture down first",
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError) as error:
        raise InputError(
            "image-unreadable",
            f"{name} cannot be read as a picture",
            why=str(error) or type(error).__name__,
            fix="give a complete PNG, JPEG, WebP, BMP or TIFF file",
        ) from error


def to_pixels(image: Image.Image, spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
    """[height, width, 3] uint8: the picture resized to its frame, the rest filled."""
    left, top, right, bottom = spec.frame(image.size)
    resized = image.resize((right - left, bottom - top), _FILTERS[spec.filter])
    if resized.size != (spec.width, spec.height):
        canvas = Image.new("RGB", (spec.width, spec.height), spec.fill)
        canvas.paste(resized, (left, top))
        resized = canvas
    return np.asarray(resized, dtype=np.uint8)


def _from_array(array: npt.NDArray[np.generic]) -> Image.Image:
    shape_ok = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not shape_ok or array.dtype not in (np.uint8, np.uint16, np.bool_) or array.size == 0:
        raise InputError(
            "image-array",
            f"an array of shape {array.shape} and dtype {array.dtype} is not a picture",
            why="pictures are [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, uint16 or bool",
            fix="convert the array; floats of 0 to 1 become (255 * array).round().astype('uint8')",
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _from_16_bit(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _from_16_bit(array: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _flatten(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise InputError(
                "image-unreadable",
                "the picture has 32-bit integer values",
                why="only 8- and 16-bit pictures have a known white",
                fix="convert it to 8 or 16 bits",
            )
        image = Image.fromarray(_from_16_bit(values))
    elif image.mode == "F":
        raise InputError(
            "image-unreadable",
            "the picture has floating-point values",
            why="its black and white are not known",
            fix="convert it to 8 or 16 bits",
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
