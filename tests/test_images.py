"""One rule for each kind of image, by its pixels; and each kind of damage is refused, with a reason.

There are two decoders, a fast one for common JPEGs and Pillow; whatever the bytes, they agree.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from trainers.data import images
from trainers.data.images import MAX_PIXELS, NO_REDUCTION, BadImage, Reduction, decode

RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    found = images.pixels(memoryview(data))
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert (found == np.asarray(image)).all()
    return found.astype(int)


def reason(data: bytes) -> str:
    """Why the bytes are bad."""
    with pytest.raises(BadImage) as raised:
        decode(data)
    with pytest.raises(BadImage) as again:
        images.pixels(data)
    assert str(raised.value) == str(again.value)
    return str(raised.value)


def _png(header: bytes, body: bytes) -> bytes:
    """A PNG put together by hand, for what Pillow cannot write."""
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in chunks
    )


def _header_only(side: int) -> bytes:
    """A bilevel PNG of `side` x `side` pixels, none of which is there."""
    return _png(struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), b"")


def photo(width: int = 48, height: int = 32) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    planes = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1)
    return Image.fromarray(planes.astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_lossless_formats_give_their_pixels(kind: str) -> None:
    image = Image.fromarray(np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert pixels(encoded(image, kind, **options)).tolist() == [[RED, GREEN], [BLUE, WHITE]]


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_near_its_pixels(progressive: bool) -> None:
    data = encoded(photo(), "JPEG", quality=95, progressive=progressive)
    assert np.abs(pixels(data) - np.asarray(photo()).astype(int)).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(kind: str, orientation: int) -> None:
    upright = photo()
    # The stored picture is the upright one with the inverse of what EXIF asks for.
    stored = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(upright if stored is None else upright.transpose(stored), kind, exif=exif, quality=95)
    found = pixels(data)
    assert found.shape == (32, 48, 3)
    assert np.abs(found - np.asarray(upright).astype(int)).max() < 16


def test_exif_that_cannot_be_read_counts_as_none() -> None:
    data = encoded(photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff\xff\xff\xff")
    assert pixels(data).shape == (32, 48, 3)


def test_pillows_warnings_do_not_leak() -> None:
    # An EXIF directory that says it has more entries than there are bytes; Pillow warns of it.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + struct.pack("<HHII", 0x010F, 2, 500, 90)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(encoded(photo(), "JPEG", exif=exif)).shape == (32, 48, 3)
        assert pixels(encoded(palette, "PNG", transparency=bytes([255, 0]))).tolist() == [[RED, RED], [RED, RED]]
        assert "bomb" not in reason(_header_only(9_900))


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "lime", "blue")]
    assert pixels(encoded(frames[0], kind, save_all=True, append_images=frames[1:])).tolist() == [[RED] * 3] * 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_grey_gives_three_equal_channels(kind: str) -> None:
    grey = Image.fromarray(np.full((8, 8), 77, np.uint8))
    assert (pixels(encoded(grey, kind)) == 77).all()


def test_bilevel_is_black_and_white() -> None:
    assert pixels(encoded(Image.new("1", (1, 1), 1), "PNG")).tolist() == [[WHITE]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_divided_by_257(kind: str) -> None:
    values = np.array([[0, 257, 32768, 65535, 128, 129]], np.uint16)
    assert pixels(encoded(Image.fromarray(values), kind))[0, :, 0].tolist() == [0, 1, 128, 255, 0, 1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 100, 255], [0, 100, 255]), ([0, 257, 65535], [0, 1, 255]), ([-5, 0, 70000], [0, 0, 255])],
)
def test_grey_of_32_bits_is_scaled_if_it_exceeds_a_byte(values: list[int], expected: list[int]) -> None:
    data = encoded(Image.fromarray(np.array([values], np.int32)), "TIFF")
    assert pixels(data)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([-3.0, 100.4, 300.0], [0, 100, 255]), ([np.nan, 1.0, -np.inf], [0, 255, 0])],
)
def test_floating_point_is_scaled_or_clipped(values: list[float], expected: list[int]) -> None:
    data = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert pixels(data)[0, :, 0].tolist() == expected


def test_colour_of_16_bits_keeps_the_high_byte() -> None:
    # Pillow cannot write such a PNG: one pixel, 0xff80 0x7f10 0x00ff.
    data = _png(struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), zlib.compress(b"\0" + bytes.fromhex("ff807f1000ff")))
    assert pixels(data).tolist() == [[[0xFF, 0x7F, 0x00]]]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted_and_adobes_inversion_heeded(kind: str) -> None:
    # Pillow writes CMYK JPEGs as Adobe does, inverted.
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(pixels(encoded(ink, kind)) - RED).max() <= 3


def _palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return image


def test_palette_gives_its_colours() -> None:
    assert pixels(encoded(_palette(), "PNG")).tolist() == [[RED, BLUE]]
    assert pixels(encoded(_palette(), "GIF")).tolist() == [[RED, BLUE]]


def _half_red() -> Image.Image:
    return Image.fromarray(np.array([[[255, 0, 0, 128], [255, 0, 0, 0]]], np.uint8))


def _half_black() -> Image.Image:
    return Image.fromarray(np.array([[[0, 128], [0, 0]]], np.uint8))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (lambda: encoded(_half_red(), "PNG"), [[255, 127, 127], WHITE]),
        (lambda: encoded(_half_red(), "WEBP", lossless=True, exact=True), [[255, 127, 127], WHITE]),
        (lambda: encoded(_half_red(), "TIFF"), [[255, 127, 127], WHITE]),
        (lambda: encoded(_half_black(), "PNG"), [[127, 127, 127], WHITE]),
        (lambda: encoded(_palette(), "PNG", transparency=1), [RED, WHITE]),
        (lambda: encoded(_palette(), "GIF", transparency=1), [RED, WHITE]),
        (lambda: encoded(_palette(), "PNG", transparency=bytes([128, 255])), [[255, 127, 127], BLUE]),
        (lambda: encoded(Image.new("RGB", (2, 1), "red"), "PNG", transparency=(255, 0, 0)), [WHITE, WHITE]),
        (lambda: encoded(Image.new("L", (2, 1), 9), "PNG", transparency=9), [WHITE, WHITE]),
    ],
    ids=["png", "webp", "tiff", "grey", "palette", "gif", "palette-bytes", "colour-key", "grey-key"],
)
def test_alpha_is_composed_on_white(data: Callable[[], bytes], expected: list[list[int]]) -> None:
    assert pixels(data()).tolist() == [expected]


def test_an_image_of_one_pixel_is_an_image() -> None:
    assert pixels(encoded(Image.new("RGB", (1, 1), "blue"), "PNG")).tolist() == [[BLUE]]


# -- damage


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_truncated_image_is_bad(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    assert pixels(data).shape == (64, 64, 3)
    for share in (0.1, 0.5, 0.9):
        assert reason(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "not a JPEG"),
        (b"\0" * 1000, "not a JPEG"),
        (b"\xff\xd8\xff", "."),
        (b"%PDF-1.4 ...", "not a JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not a JPEG"),
    ],
)
def test_what_is_no_image_is_bad(data: bytes, why: str) -> None:
    assert re.search(why, reason(data))
    assert 0 < len(reason(data)) < 250


@pytest.mark.parametrize("kind", ["PPM", "ICO", "JPEG2000", "TGA"])
def test_other_formats_are_bad(kind: str) -> None:
    assert "not a JPEG" in reason(encoded(photo(), kind))


@pytest.mark.parametrize("side", [10_001, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    assert f"more than {MAX_PIXELS:,}" in reason(_header_only(side))
    jpeg = bytearray(encoded(photo(), "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", side, side)
    assert f"more than {MAX_PIXELS:,}" in reason(bytes(jpeg))


def _jpegs() -> list[bytes]:
    """Of each kind that differs in its header or its scans."""
    exif = Image.Exif()
    exif[0x0112] = 6
    ways: list[dict[str, object]] = [
        {}, {"progressive": True}, {"exif": exif}, {"subsampling": 0}, {"keep_rgb": True}, {"restart_marker_rows": 1},
        {"qtables": "web_high", "comment": b"x" * 99}, {"xmp": b"<x tiff:Orientation='3'/>"},
    ]  # fmt: skip
    found = [encoded(photo(), "JPEG", **way) for way in ways]
    return [*found, encoded(photo().convert("L"), "JPEG"), encoded(photo().convert("CMYK"), "JPEG")]


def _damaged(data: bytes, random: np.random.Generator) -> bytes:
    found = np.frombuffer(data, np.uint8).copy()
    way = random.integers(3)
    if way == 0:
        places = random.integers(0, len(found), 4)
        found[places] = random.integers(0, 256, 4)
    elif way == 1:
        places = random.integers(0, min(len(found), 620), 3)
        found[places] = random.integers(0, 256, 3)
    else:
        found = np.delete(found, random.integers(0, len(found), 2))
    return found.tobytes()


@pytest.mark.parametrize("data", _jpegs())
def test_of_damaged_jpegs_both_decoders_say_the_same(data: bytes) -> None:
    random = np.random.default_rng(len(data))
    assert pixels(data).size > 0
    for _ in range(150):
        damaged = _damaged(data, random)
        try:
            decode(damaged)
        except BadImage:
            assert reason(damaged)
        else:
            assert pixels(damaged).size > 0


def test_damaged_bytes_never_raise_anything_else() -> None:
    random = np.random.default_rng(1)
    for kind in ("PNG", "WEBP", "BMP", "TIFF", "GIF"):
        data = encoded(photo(), kind)
        for _ in range(60):
            with contextlib.suppress(BadImage):
                assert images.pixels(_damaged(data, random)).shape[2] == 3


def test_threads_do_not_disturb_each_other() -> None:
    kinds = ["PNG", "JPEG"]
    data = [encoded(Image.new("RGB", (64, 64), (value,) * 3), kinds[value % 2]) for value in range(64)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(images.pixels, data * 4))
    assert [image[5, 5].tolist() for image in found] == [[value] * 3 for value in range(64)] * 4


# -- reduction


def reducing(factor: int) -> Reduction:
    """One that reduces any image that is large enough by the factor, and by no more."""
    return Reduction(share=1, ratio=(1, 1), side=1, short=64 // factor)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 99), (71, 65)])
def test_an_image_is_reduced_to_its_size_over_the_factor_rounded_up(
    shape: tuple[int, int], kind: str, factor: int
) -> None:
    width, height = shape
    data = encoded(photo(width, height), kind, quality=100)
    found = images.pixels(data, reducing(factor))
    assert found.shape == (-(-height // factor), -(-width // factor), 3)
    means = np.asarray(photo(width, height).reduce(factor)).astype(int)
    assert np.abs(found - means).max() <= (0 if kind == "PNG" else 6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_photo_is_turned_as_a_whole_one(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x927C] = b"n" * 65_000  # a maker's note fills the segment
    data = encoded(photo(160, 64), "JPEG", exif=exif, quality=100)
    whole = decode(data)
    assert whole.size == ((160, 64) if orientation < 5 else (64, 160))
    assert np.abs(images.pixels(data, reducing(4)) - np.asarray(whole.reduce(4)).astype(int)).max() <= 6


@pytest.mark.parametrize("width", range(1, 20))
def test_small_jpegs_are_decoded_at_their_own_scale(width: int) -> None:
    for height in (1, 3, 7, 8, 17):
        data = encoded(photo(width, height), "JPEG", quality=100)
        assert pixels(data).shape == (height, width, 3)
        smaller = Reduction(share=1, ratio=(1, 1), side=1, short=1)
        factor = smaller(width, height)
        assert images.pixels(data, smaller).shape == (-(-height // factor), -(-width // factor), 3)


def test_nothing_is_reduced_unless_asked() -> None:
    assert {NO_REDUCTION(width, height) for width in (1, 500, 60_000) for height in (1, 9_000)} == {1}
