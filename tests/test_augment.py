"""What is done to pixels, against torchvision, the reference of the field, and on images of every shape."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms.autoaugment import RandAugment, TrivialAugmentWide, _apply_op

from launcher.spec import Augment
from trainers.data.augment import TRIVIAL_TABLE, EvalTransform, Table, TrainTransform, randaugment_table, random_crop
from trainers.data.order import Draws, sample_rng

NAMES = ["Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
         "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"]  # fmt: skip
SHAPES = [(1, 1), (1, 3000), (3000, 1), (8, 8), (7, 500), (640, 480), (224, 224)]


def photo(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (max(height // 8, 1), max(width // 8, 1), 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def recipe(**fields: object) -> Augment:
    return Augment(**{"crop_scale": (0.3, 1.0), "flip": True, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.875), (224, 0.95), (96, 1.0), (33, 0.8)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(640, 480), (480, 641), (200, 150), (300, 300)])
def test_evaluation_is_torchvisions_resize_and_centre_crop(
    size: int, crop_pct: float, interpolation: str, shape: tuple[int, int]
) -> None:
    image = photo(*shape)
    mode = InterpolationMode(interpolation)
    expected = np.asarray(CenterCrop(size)(Resize(round(size / crop_pct), mode)(image))).astype(int)
    found = EvalTransform(size, crop_pct, interpolation)(image).astype(int)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_any_shape_become_the_square(shape: tuple[int, int]) -> None:
    image = photo(*shape)
    for pixels in (EvalTransform(32)(image), TrainTransform(recipe(), 32)(image, Draws(1))):
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous


@pytest.mark.parametrize("shape", SHAPES)
def test_crops_lie_in_the_image_and_keep_to_area_and_ratio(shape: tuple[int, int]) -> None:
    width, height = shape
    for row in range(200):
        left, top, w, h = random_crop(width, height, (0.08, 0.5), (3 / 4, 4 / 3), sample_rng(0, 0, row))
        assert 0 <= left <= left + w <= width
        assert 0 <= top <= top + h <= height
        assert w > 0
        assert h > 0
        if min(shape) > 100:
            assert 0.07 < w * h / (width * height) < 0.51
            assert 0.74 < w / h < 1.35


def test_crops_are_distributed_as_the_formula_says() -> None:
    crops = np.array([random_crop(1000, 1000, (0.2, 0.6), (0.5, 2.0), sample_rng(0, 0, row)) for row in range(4000)])
    areas, ratios = crops[:, 2] * crops[:, 3] / 1e6, crops[:, 2] / crops[:, 3]
    assert abs(areas.mean() - 0.4) < 0.01
    assert abs(np.log(ratios).mean()) < 0.02
    assert abs(np.log(ratios).std() - math.log(4) / math.sqrt(12)) < 0.02


def test_a_full_crop_without_chance_is_a_plain_resize() -> None:
    image = photo(90, 90)
    transform = TrainTransform(recipe(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False), 40, "bicubic")
    assert (transform(image, Draws(0)) == np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC))).all()


def test_half_of_the_images_are_mirrored() -> None:
    image = photo(40, 40)
    transform = TrainTransform(recipe(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)), 40)
    plain = np.asarray(image)
    mirrored = 0
    for row in range(400):
        found = transform(image, sample_rng(0, 0, row))
        assert (found == plain).all() or (found == plain[:, ::-1]).all()
        mirrored += bool((found != plain).any())
    assert 160 < mirrored < 240


@pytest.mark.parametrize("policy", ["none", "randaugment", "trivialaugment"])
def test_the_result_depends_on_the_generator_and_on_nothing_global(policy: str) -> None:
    transform, image = TrainTransform(recipe(policy=policy, erasing=0.9), 64), photo(100, 80)
    before = (
        random.getstate(),
        torch.random.get_rng_state().clone(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),
    )
    once = [transform(image, sample_rng(3, 1, row)) for row in range(60)]
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before[2]
    again = [transform(image, sample_rng(3, 1, row)) for row in reversed(range(60))]
    assert all((a == b).all() for a, b in zip(once, reversed(again), strict=True))
    assert len({pixels.tobytes() for pixels in once}) == 60


@pytest.mark.parametrize(
    ("table", "reference"), [(randaugment_table(64), RandAugment()), (TRIVIAL_TABLE, TrivialAugmentWide())]
)
@pytest.mark.parametrize("magnitude", [0, 9, 17, 30])
def test_operations_are_torchvisions(table: Table, reference: RandAugment | TrivialAugmentWide, magnitude: int) -> None:
    image = photo(64, 64)
    space = (
        reference._augmentation_space(31, (64, 64))
        if isinstance(reference, RandAugment)
        else reference._augmentation_space(31)
    )
    assert list(space) == NAMES
    for (name, (values, signed)), (operation, value, ours_signed) in zip(space.items(), table, strict=True):
        assert signed == ours_signed
        strength = float(values[magnitude].item()) if values.ndim else 0.0
        expected = np.asarray(_apply_op(image, name, strength, InterpolationMode.BILINEAR, None)).astype(int)
        found = np.asarray(operation(image, value(magnitude))).astype(int)
        if name.startswith(("Shear", "Translate")):
            # torchvision's sign is the other way round; the sign is drawn, so the set of results is the same.
            other = np.asarray(operation(image, -value(magnitude))).astype(int)
            assert min(np.abs(found - expected).mean(), np.abs(other - expected).mean()) < 2, name
        else:
            assert np.abs(found - expected).max() <= 1, name


def test_erasing_fills_one_rectangle_with_noise() -> None:
    image = Image.new("RGB", (64, 64), "black")
    transform = TrainTransform(recipe(erasing=0.999), 64)
    areas = []
    for row in range(100):
        changed = np.any(transform(image, sample_rng(0, 0, row)) > 0, axis=-1)
        if not changed.any():
            continue
        rows, columns = np.flatnonzero(np.any(changed, axis=1)), np.flatnonzero(np.any(changed, axis=0))
        area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert changed.sum() > 0.98 * area
        areas.append(area / 64**2)
    assert len(areas) > 95
    assert min(areas) > 0.015
    assert max(areas) < 0.36
