"""Bytes to RGB pixels: one rule for each kind of image, and a short reason for each that cannot be read.

- Formats: JPEG (with MPO), PNG, WebP, BMP, TIFF and GIF; anything else, whatever its name, is bad.
- Size: more than `MAX_PIXELS` is bad, decided from the header before any pixel is decoded.
- Truncated and damaged files are bad; half an image is never returned.
- Several frames or pages (GIF, TIFF): the first.
- EXIF rotation is applied; EXIF that cannot be read counts as none.
- Grey and bilevel: three equal channels.
- Grey of 16 bits, and of 32 bits with a value over 255: divided by 257. Colour of 16 bits: Pillow keeps the high byte.
- Floating point: 0..1 scaled by 255 if no value is over 1, else clipped to 0..255; NaN is 0.
- CMYK: Pillow's conversion, which heeds Adobe's inverted JPEGs. Colour profiles are not applied.
- Alpha, in channels or palette: composed on white.

This module knows nothing of files, labels or tensors. Pillow's warnings are silenced for the process: what they
announce is either bad by the rules above or harmless.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

# Pillow opens MPO, the format of many phones, as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 100_000_000

Array = npt.NDArray[Any]

_SILENCED = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """The bytes are no image that can be read whole; the message is a short reason."""


def decode(data: bytes) -> Image.Image:
    """The image in mode RGB, fully decoded and upright. Thread safe. Raises `BadImage`."""
    if not data:
        raise BadImage("the file is empty")
    # `warnings.catch_warnings` is not thread safe; a filter that stays in front is.
    if warnings.filters[:1] != [_SILENCED]:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
        image.load()
        method = _UPRIGHT.get(_orientation(image))
        upright = image if method is None else image.transpose(method)
        return _rgb(upright)
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise BadImage("not a JPEG, PNG, WebP, BMP, TIFF or GIF image") from error
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to
        raise BadImage(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels are good, whatever the EXIF block holds
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16"):
        return _grey(_sixteen_bits(np.asarray(image)))
    if mode == "I":
        values = np.asarray(image)
        return _grey(_sixteen_bits(values) if values.max() > 255 else values)
    if mode == "F":
        shades = np.clip(np.nan_to_num(np.asarray(image, np.float32)), 0, 255)
        return _grey(np.rint(shades * 255 if shades.max() <= 1 else shades))
    if "transparency" in image.info or mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _sixteen_bits(values: Array) -> Array:
    return np.rint(values / 257)


def _grey(values: Array) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")
