"""The kernel against Pillow, on real photos and on images of every shape; and that it reads no byte it must not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from trainers.data.kernel import FILTERS, crop_resize

ROOT = Path(__file__).parent.parent
SMOOTH = [name for name in FILTERS if name != "nearest"]
SHAPES = [(1, 1), (1, 700), (700, 1), (2, 3), (40, 31), (97, 300), (300, 97), (427, 640)]
"""Height and width."""
BOUND = 1
"""Levels between the two: each rounds to bytes once or twice."""


@pytest.fixture(scope="module", params=["china.jpg", "flower.jpg"])
def photo(request: pytest.FixtureRequest) -> np.ndarray:
    return np.ascontiguousarray(load_sample_image(request.param))


def noise(height: int, width: int) -> np.ndarray:
    """Black and white: every filter that can overshoot does."""
    return np.random.default_rng(height * width).integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255)


def resized(
    images: list[np.ndarray], boxes: Sequence[tuple[float, ...]], side: int, name: str = "bilinear", inside: bool = True
) -> np.ndarray:
    out = np.empty((len(images), side, side, 3), np.uint8)
    crop_resize(
        np.array([image.ctypes.data for image in images], np.uint64),
        np.array([image.shape[:2] for image in images], np.int32),
        np.array(boxes, np.float64),
        np.zeros(len(images), bool),
        inside,
        FILTERS[name],
        out,
    )
    return out


def cropped_by_pillow(image: np.ndarray, box: tuple[float, ...], side: int, name: str) -> np.ndarray:
    crop = Image.fromarray(image).crop(tuple(int(edge) for edge in box))  # type: ignore[arg-type]
    return np.asarray(crop.resize((side, side), Image.Resampling[name.upper()]))


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(float(np.mean((a.astype(float) - b.astype(float)) ** 2)), 1e-9)))


@pytest.mark.parametrize("name", SMOOTH)
def test_crops_of_photos_are_pillows_crops_resized(photo: np.ndarray, name: str) -> None:
    chance = np.random.default_rng(0)
    boxes = []
    for _ in range(12):
        width, height = chance.integers(20, 640), chance.integers(20, 427)
        left, top = chance.integers(0, 641 - width), chance.integers(0, 428 - height)
        boxes.append((float(left), float(top), float(left + width), float(top + height)))
    found = resized([photo] * len(boxes), boxes, 112, name)
    expected = np.stack([cropped_by_pillow(photo, box, 112, name) for box in boxes])
    assert difference(found, expected) <= BOUND
    assert decibels(found, expected) > 50


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [7, 64])
def test_images_of_any_shape_grow_and_shrink_as_pillows(shape: tuple[int, int], name: str, side: int) -> None:
    if name == "nearest" and side == 7 and shape == (2, 3):
        pytest.skip("a result lies right between two pixels")
    image = noise(*shape)
    whole = (0.0, 0.0, float(shape[1]), float(shape[0]))
    assert difference(resized([image], [whole], side, name)[0], cropped_by_pillow(image, whole, side, name)) <= BOUND


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("shape", [(90, 61), (61, 290), (400, 61)])
def test_a_box_between_pixels_sees_what_is_around_it_as_pillows(shape: tuple[int, int], name: str) -> None:
    image = noise(*shape)
    box = (3.25, 7.5, 58.125, 60.75)
    for side in (9, 33, 80):
        pillow = Image.fromarray(image).resize((side, side), Image.Resampling[name.upper()], box=box)
        assert difference(resized([image], [box], side, name, inside=False)[0], np.asarray(pillow)) <= BOUND


def test_a_crop_does_not_see_what_is_around_it() -> None:
    image = np.zeros((60, 60, 3), np.uint8)
    image[20:40, 20:40] = 100
    box = (20.0, 20.0, 40.0, 40.0)
    for name in FILTERS:
        for side in (5, 50):
            assert (resized([image], [box], side, name) == 100).all()
    assert resized([image], [box], 5, inside=False).min() < 100


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("shape", [(50, 70), (500, 70), (20, 700)])
def test_a_flip_mirrors_exactly(shape: tuple[int, int], name: str) -> None:
    image = noise(*shape)
    plain, mirrored = np.empty((2, 1, 40, 40, 3), np.uint8)
    where = np.array([image.ctypes.data], np.uint64), np.array([shape], np.int32)
    box = np.array([[2.0, 3.0, shape[1] - 1.0, shape[0] - 2.0]])
    for flip, out in ((False, plain), (True, mirrored)):
        crop_resize(*where, box, np.array([flip]), True, FILTERS[name], out)
    assert (mirrored == plain[:, :, ::-1]).all()


def test_without_a_change_of_size_nothing_changes(photo: np.ndarray) -> None:
    square = np.ascontiguousarray(photo[:64, :64])
    for name in FILTERS:
        assert (resized([square], [(0.0, 0.0, 64.0, 64.0)], 64, name)[0] == square).all()


def test_a_part_of_a_batch_is_filled_and_nothing_else() -> None:
    images = [noise(30 + number, 50) for number in range(4)]
    out = np.full((9, 16, 16, 3), 77, np.uint8)
    addresses = np.array([image.ctypes.data for image in images], np.uint64)
    addresses[2] = 0
    shapes = np.array([image.shape[:2] for image in images], np.int32)
    boxes = np.array([(0, 0, 50, image.shape[0]) for image in images], np.float64)
    crop_resize(addresses, shapes, boxes, np.ones(4, bool), True, FILTERS["bilinear"], out[3:7])
    assert (out[[0, 1, 2, 5, 7, 8]] == 77).all()
    assert all((out[place] != 77).any() for place in (3, 4, 6))


def test_threads_do_not_disturb_each_other(photo: np.ndarray) -> None:
    boxes = [(float(place), 3.0, 400.0 + place, 300.0) for place in range(32)]
    one_by_one = np.concatenate([resized([photo], [box], 48) for box in boxes])
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda box: resized([photo], [box], 48), boxes * 4))
    assert (np.concatenate(parts) == np.concatenate([one_by_one] * 4)).all()


numbers = st.one_of(st.integers(-3, 12), st.floats(-1e9, 1e9))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.lists(numbers, min_size=4, max_size=4), st.booleans()
)
def test_no_box_leads_outside_the_image(width: int, height: int, side: int, box: list[float], inside: bool) -> None:
    around = np.zeros((height * width * 3 + 6000), np.uint8)
    image = around[3000:-3000].reshape(height, width, 3)
    image[:] = 9
    for name in ("nearest", "box", "bilinear"):
        assert (resized([image], [tuple(box)], side, name, inside) == 9).all()


GUARDED = """
import ctypes, mmap, sys
import numpy as np
from trainers.data.kernel import FILTERS, crop_resize
page = mmap.PAGESIZE
pages = mmap.mmap(-1, 64 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
libc = ctypes.CDLL(None)
for guard in (start, start + 63 * page):
    assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
for height, width in ((1, 1), (1, 200), (200, 1), (7, 5), (61, 83), (120, 400), (240, 250)):
    size = height * width * 3
    for address in (start + 63 * page - size, start + page):
        ctypes.memset(address, 50, size)
        boxes = [(0, 0, width, height), (width // 2, height // 2, width, height)]
        boxes += [(width - 1, height - 1, width, height), (0.3, 0.3, width - 0.1, height - 0.1)]
        boxes += [(-5, -5, width + 5, height + 5)]
        for inside in (True, False):
            for kind in FILTERS.values():
                for side in (1, 3, 64):
                    out = np.empty((len(boxes), side, side, 3), np.uint8)
                    crop_resize(
                        np.full(len(boxes), address, np.uint64), np.full((len(boxes), 2), (height, width), np.int32),
                        np.array(boxes, np.float64), np.arange(len(boxes)) % 2 == 0, inside, kind, out,
                    )
                    assert (out == 50).all(), (height, width, inside, kind, side)
print("nothing read but the image")
"""


def test_no_byte_is_read_outside_the_image() -> None:
    # Pages that may not be read lie right before and right after the images: a stray read is a segmentation fault.
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "nothing read but the image\n"


ONE = """
from numba import types
from trainers.data.kernel import compiled

@compiled(types.int64(types.int64))
def twice(x: int) -> int:
    return 2 * x

print(twice(21), twice.stats.cache_path)
"""


def test_where_nothing_can_be_written_it_is_compiled_all_the_same(tmp_path: Path) -> None:
    # numba tries to make its folders; a file in their place says no, to root as well.
    (tmp_path / "__pycache__").write_text("")
    (tmp_path / "one.py").write_text(ONE)
    for home, kept in ((tmp_path / "home", True), (tmp_path / "one.py", False)):
        environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": f"{home}/.cache", "PYTHONPATH": str(ROOT)}
        environment.pop("NUMBA_CACHE_DIR", None)
        done = subprocess.run(
            [sys.executable, "one.py"], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("42 ")
        assert (str(home) in done.stdout) is kept
