"""What the recipes make of images of every shape, against Pillow and torchvision, the references of the field."""

from __future__ import annotations

import io
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from launcher.spec import Augment
from trainers.data.crops import draw_crops, sample_states
from trainers.data.images import pixels
from trainers.data.kernel import FILTERS, crop_resize
from trainers.data.recipes import EvalRecipe, TrainRecipe, reduction

SHAPES = [(1, 1), (1, 3000), (3000, 1), (8, 8), (7, 500), (640, 480), (224, 224)]
"""Width and height."""
PHOTOS = ["china.jpg", "flower.jpg"]


def photo(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (max(height // 8, 1), max(width // 8, 1), 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def recipe(side: int, name: str = "bilinear", **fields: object) -> TrainRecipe:
    return TrainRecipe(Augment(**{"crop_scale": (0.3, 1.0), "flip": True, **fields}), side, name)  # type: ignore[arg-type]


def trained(recipe: TrainRecipe, image: np.ndarray, rows: range) -> np.ndarray:
    """The image as it is cropped in place of each row, uint8 [n, side, side, 3]."""
    out = np.empty((len(rows), recipe.side, recipe.side, 3), np.uint8)
    addresses = np.full(len(rows), image.ctypes.data, np.uint64)
    shapes = np.tile(np.array([image.shape[:2]], np.int32), (len(rows), 1))
    recipe.fill(addresses, shapes, sample_states(0, 0, np.array(rows)), out)
    return out


def in_pillow(image: Image.Image, side: int, crop_pct: float, name: str) -> np.ndarray:
    """The evaluation of one image by Pillow alone."""
    short, resized = min(image.size), max(round(side / crop_pct), side)
    width, height = (int(resized * length / short) for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, min((left + side) * x, image.width), min((top + side) * y, image.height))
    return np.asarray(image.resize((side, side), Image.Resampling[name.upper()], box=box))


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(float(np.mean((a.astype(float) - b.astype(float)) ** 2)), 1e-9)))


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.875), (224, 0.95), (96, 1.0), (33, 0.8)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(640, 480), (480, 641), (200, 150), (300, 300)])
def test_evaluation_is_torchvisions_resize_and_centre_crop(
    size: int, crop_pct: float, interpolation: str, shape: tuple[int, int]
) -> None:
    image = photo(*shape)
    mode = InterpolationMode(interpolation)
    expected = np.asarray(CenterCrop(size)(Resize(round(size / crop_pct), mode)(image)))
    assert difference(EvalRecipe(size, crop_pct, interpolation).one(np.asarray(image)), expected) <= 1


@pytest.mark.parametrize("name", ["box", "bilinear", "hamming", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 2000), (2000, 300)])
def test_evaluation_of_images_of_any_shape_is_pillows(shape: tuple[int, int], name: str) -> None:
    image = photo(*shape)
    for side, crop_pct in ((32, 0.875), (97, 0.95)):
        # A box filter may take a whole pixel more or less where an edge falls between two.
        bound = 1 if name != "box" else 40
        found = EvalRecipe(side, crop_pct, name.upper()).one(np.asarray(image))
        assert difference(found, in_pillow(image, side, crop_pct, name)) <= bound


@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_any_shape_become_the_square(shape: tuple[int, int]) -> None:
    grey = np.full((shape[1], shape[0], 3), 99, np.uint8)
    assert (EvalRecipe(32).one(grey) == 99).all()
    assert (trained(recipe(32), grey, range(50)) == 99).all()


def test_a_full_crop_without_chance_is_a_plain_resize() -> None:
    image = photo(90, 90)
    plain = recipe(40, "bicubic", crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False)
    found = trained(plain, np.asarray(image), range(3))
    assert difference(found, np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC))[None]) <= 1


def test_half_of_the_images_are_mirrored() -> None:
    image = np.asarray(photo(40, 40))
    found = trained(recipe(40, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)), image, range(400))
    plain, mirrored = ((found == other).all((1, 2, 3)) for other in (image, image[:, ::-1]))
    assert (plain ^ mirrored).all()
    assert 160 < mirrored.sum() < 240


def test_a_crop_depends_on_its_row_and_not_on_the_batch_it_is_in() -> None:
    image = np.asarray(photo(100, 80))
    once = trained(recipe(64), image, range(60))
    assert (trained(recipe(64), image, range(20, 40)) == once[20:40]).all()
    assert len({crop.tobytes() for crop in once}) == 60


# -- reduction


scales = st.tuples(st.floats(0.02, 1), st.floats(0.02, 1)).map(sorted)
ratios = st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)).map(sorted)


@settings(max_examples=150, deadline=None)
@given(scales, ratios, st.integers(1, 300), st.floats(0.5, 1), st.integers(1, 9000), st.integers(1, 9000))
def test_a_reduced_image_still_has_the_pixels_that_any_crop_is_made_of(
    scale: list[float], ratio: list[float], side: int, crop_pct: float, width: int, height: int
) -> None:
    train, evaluation = recipe(side, crop_scale=tuple(scale), crop_ratio=tuple(ratio)), EvalRecipe(side, crop_pct)
    factor = reduction(train, evaluation)(width, height)
    assert factor in (1, 2, 4, 8)
    if factor == 1:
        return
    reduced = np.array([[-(-height // factor), -(-width // factor)]] * 100, np.int32)
    boxes, _ = draw_crops(reduced, sample_states(1, 2, np.arange(100)), train.scale, train.ratio, True)
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= side
    assert reduced.min() >= side / crop_pct - 0.5


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.35, 1.0), (1.0, 1.0)])
def test_an_image_shrinks_as_far_as_the_crops_allow(scale: tuple[float, float]) -> None:
    train, evaluation = recipe(224, crop_scale=scale, crop_ratio=(1.0, 1.0)), EvalRecipe(224)
    rule = reduction(train, evaluation)
    share = 2.0 ** math.floor(math.log2(scale[0]))
    for factor in (2, 4, 8):
        least = max(math.ceil(223.5 / math.sqrt(share)), 256) * factor
        assert rule(least + factor, least + factor) == factor
        assert rule(least - factor, least - factor) == factor // 2


def test_recipes_that_differ_a_little_share_what_is_decoded() -> None:
    names = {reduction(recipe(224, crop_scale=(least, 1.0)), EvalRecipe(224)).name for least in (0.3, 0.35, 0.45)}
    assert len(names) == 1
    others = {reduction(recipe(side), EvalRecipe(side, pct)).name for side, pct in product((192, 224), (0.875, 0.95))}
    assert len(others) == 4


@pytest.mark.parametrize(("scale", "factor", "bound"), [((0.08, 1.0), 2, 50), ((0.35, 1.0), 4, 47)])
@pytest.mark.parametrize("name", PHOTOS)
def test_a_reduced_photo_gives_the_crops_of_the_whole(
    name: str, scale: tuple[float, float], factor: int, bound: float
) -> None:
    out = io.BytesIO()
    Image.fromarray(load_sample_image(name)).resize((4000, 2672)).save(out, "JPEG", quality=90)
    train, evaluation = recipe(224, crop_scale=scale), EvalRecipe(224, 0.875, "bicubic")
    rule = reduction(train, evaluation)
    assert rule(4000, 2672) == factor
    whole, reduced = pixels(out.getvalue()), pixels(out.getvalue(), rule)
    shapes = np.tile(np.array([reduced.shape[:2]], np.int32), (24, 1))
    boxes, flips = draw_crops(shapes, sample_states(0, 0, np.arange(24)), train.scale, train.ratio, True)
    expected = np.empty((24, 224, 224, 3), np.uint8)
    addresses = np.full(24, whole.ctypes.data, np.uint64)
    crop_resize(addresses, shapes * factor, boxes * factor, flips, True, FILTERS["bilinear"], expected)
    found = trained(train, reduced, range(24))
    assert min(decibels(a, b) for a, b in zip(found, expected, strict=True)) > bound
    assert decibels(evaluation.one(reduced), evaluation.one(whole)) > bound


@settings(max_examples=500, deadline=None)
@given(st.integers(512, 9000), st.integers(512, 9000))
def test_the_middle_of_a_reduced_image_is_off_by_less_than_two_pixels(width: int, height: int) -> None:
    evaluation = EvalRecipe(224)
    factor = reduction(recipe(224, crop_scale=(0.35, 1.0)), evaluation)(width, height)
    whole = evaluation.boxes(np.array([[height, width]], np.int32))
    reduced = evaluation.boxes(np.array([[-(-height // factor), -(-width // factor)]], np.int32)) * factor
    pixel = (whole[0, 2:] - whole[0, :2]).min() / 224
    off = whole - reduced
    assert np.abs(off).max() <= 2 * pixel
