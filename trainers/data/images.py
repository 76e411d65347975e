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

`pixels` may make an image smaller while it is decoded, by a `Reduction`: what a recipe never needs is not decoded.

This module knows nothing of files, labels or tensors. Pillow's warnings are silenced for the process: what they
announce is either bad by the rules above or harmless.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from trainers.data.spaces import Spaces

# Pillow opens MPO, the format of many phones, as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 100_000_000

_spaces = Spaces(1 << 25)
"""For decoded JPEGs: what a few dozen of usual photos take."""

Array = npt.NDArray[Any]
Pixels = npt.NDArray[np.uint8]

_SILENCED = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_APP1 = 0xE1
_FRAMES = (0xC0, 0xC1, 0xC2)
"""Headers of baseline, extended and progressive JPEGs, all with Huffman coding."""
_SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}
"""What may stand before them: tables, restart interval, comment, APPn."""
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


@dataclass(frozen=True)
class Reduction:
    """By how much an image of a size may shrink before any pixel that a recipe shows is made up.

    Attributes:
        share: least share of the image's area that a crop takes; 0: nothing is ever reduced.
        ratio: least and most width / height of a crop.
        side: pixels that the short side of each crop keeps.
        short: pixels that the short side of the image keeps.
    """

    share: float
    ratio: tuple[float, float]
    side: int
    short: int

    @property
    def name(self) -> str:
        """The rule in words that do not change: part of the key of what is kept of its results."""
        return f"{self.share:.8g} {self.ratio[0]:.8g} {self.ratio[1]:.8g} {self.side} {self.short}"

    def __call__(self, width: int, height: int) -> int:
        """1, 2, 4 or 8: what to divide both sides by, rounding up."""
        least, most = self.ratio
        for factor in (8, 4, 2):
            w, h = -(-width // factor), -(-height // factor)
            if min(w, h) < max(self.short, self.side):
                continue  # as most photos are; what follows takes a dozen times as long
            crop = round(math.sqrt(w * h * self.share * min(least, 1 / most, 1)))
            # Where no crop fits, an image too long for the ratios gives its middle.
            middle = round(min(w, h) * min(1, 1 / least, most))
            if min(crop, middle) >= self.side:
                return factor
        return 1


NO_REDUCTION = Reduction(share=0, ratio=(1, 1), side=1, short=1)


def pixels(data: bytes | memoryview, reduction: Reduction = NO_REDUCTION) -> Pixels:
    """The image as uint8 [height, width, 3], contiguous, maybe not writable. Thread safe. Raises `BadImage`.

    Without reduction the pixels are those of `decode`. A JPEG is reduced by decoding fewer of its frequencies, anything
    else by the mean of each square.
    """
    view = memoryview(data).cast("B")
    found = _jpeg(view, reduction)
    if found is not None:
        return found
    image = decode(view)
    factor = reduction(*image.size)
    return np.asarray(image if factor == 1 else image.reduce(factor))


def _jpeg(data: memoryview, reduction: Reduction) -> Pixels | None:
    """A grey or colour JPEG that libjpeg decodes without a warning; None: anything else, `decode` is to judge it."""
    try:
        header = _jpeg_header(data)
        if header is None or header[0] * header[1] > MAX_PIXELS:
            return None
        width, height, method = header
        factor = reduction(width, height)
        w, h = -(-width // factor), -(-height // factor)
        if factor > 1 and max(width, height) < 8:  # more than one scale leads to this size
            return None
        found = _spaces.lend(h, w, 3)
        smaller = {} if factor == 1 else {"min_height": h, "min_width": w}
        if simplejpeg.decode_jpeg(data, "RGB", buffer=found, **smaller).shape != found.shape:
            return None
    except MemoryError:
        raise
    except Exception:  # whatever the damage leads to
        return None
    return found if method is None else np.asarray(Image.fromarray(found).transpose(method))


def _jpeg_header(data: memoryview) -> tuple[int, int, Image.Transpose | None] | None:
    """Width and height as stored, and how to turn the image upright; None for JPEGs that are not common."""
    if bytes(data[:2]) != b"\xff\xd8":
        return None
    at, turned = 2, False
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker in _FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            if bits != 8 or channels not in (1, 3) or not width or not height:
                return None
            return width, height, _turn(data) if turned else None
        if marker not in _SEGMENTS:
            return None
        if marker == _APP1:
            # What may be the orientation in EXIF of either byte order, or in XMP; what it is Pillow shall say.
            segment = bytes(data[at + 4 : at + 2 + length])
            turned |= b"\x12\x01" in segment or b"\x01\x12" in segment or b"Orientation" in segment
        at += 2 + length
    return None


def _turn(data: memoryview) -> Image.Transpose | None:
    _silence()
    return _UPRIGHT.get(_orientation(Image.open(io.BytesIO(data), formats=("JPEG",))))


def decode(data: bytes | memoryview) -> Image.Image:
    """The image in mode RGB, fully decoded and upright. Thread safe. Raises `BadImage`."""
    if not len(data):
        raise BadImage("the file is empty")
    _silence()
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


def _silence() -> None:
    # `warnings.catch_warnings` is not thread safe; a filter that stays in front is.
    if warnings.filters[:1] != [_SILENCED]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


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
