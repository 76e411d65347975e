"""What is done to batches after the crop, against Pillow image by image, and against `Draws` number by number."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image
from torchvision.transforms.autoaugment import RandAugment, TrivialAugmentWide

from launcher.spec import Augment
from trainers.data.operations import transform
from trainers.data.order import Draws, sample_rng
from trainers.data.policy import (
    _STREAM,
    NAMES,
    SIGNED,
    Changes,
    batch_mixer,
    randaugment_table,
    trivialaugment_table,
)

Pixels = npt.NDArray[np.uint8]
CPU = torch.device("cpu")
SIDE = 96
PHOTO = np.asarray(Image.fromarray(load_sample_image("china.jpg")).resize((SIDE, SIDE)))
PICTURES = {
    "photo": PHOTO,
    "dim": (PHOTO // 3 + 20).astype(np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (33, 33, 3), np.uint8),
    "flat": np.full((16, 16, 3), 77, np.uint8),
    "two tones": np.tile(np.array([[[3, 90, 200]], [[5, 90, 40]]], np.uint8), (4, 8, 1)),
    "two pixels wide": np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
    "one pixel": np.array([[[1, 2, 250]]], np.uint8),
}


def _affine(*matrix: float) -> Callable[[Image.Image, float], Image.Image]:
    """The numbers of the matrix that are NaN stand for the value."""
    return lambda image, value: image.transform(
        image.size, Image.Transform.AFFINE, [value if math.isnan(m) else m for m in matrix], Image.Resampling.BILINEAR
    )


def _whole(operation: Callable[[Image.Image, float], Image.Image]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, value: operation(image, int(value))


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, _: image,
    "shear_x": _affine(1, math.nan, 0, 0, 1, 0),
    "shear_y": _affine(1, 0, 0, math.nan, 1, 0),
    "shift_x": _whole(_affine(1, 0, math.nan, 0, 1, 0)),
    "shift_y": _whole(_affine(1, 0, 0, 0, 1, math.nan)),
    "rotate": lambda image, value: image.rotate(value, Image.Resampling.BILINEAR),
    "brightness": lambda image, value: ImageEnhance.Brightness(image).enhance(1 + value),
    "colour": lambda image, value: ImageEnhance.Color(image).enhance(1 + value),
    "contrast": lambda image, value: ImageEnhance.Contrast(image).enhance(1 + value),
    "sharpness": lambda image, value: ImageEnhance.Sharpness(image).enhance(1 + value),
    "posterize": lambda image, value: ImageOps.posterize(image, int(value)),
    "solarize": lambda image, value: ImageOps.solarize(image, math.ceil(value)),
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
}


def tensor(images: Pixels | list[Pixels]) -> torch.Tensor:
    """uint8 [b, 3, H, W], channels_last, as the loader makes them."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def arrays(images: torch.Tensor) -> Pixels:
    return images.permute(0, 2, 3, 1).numpy()


def changes(operations: list[list[int]], values: list[list[float]], side: int) -> Changes:
    b = len(operations)
    kinds, strengths = np.array(operations, np.int8), np.array(values, np.float32)
    return Changes(kinds, strengths, np.zeros((b, 4), np.int32), np.zeros(b, np.int64), side)


def recipe(**fields: object) -> Augment:
    return Augment(**fields)  # type: ignore[arg-type]


def drawn(augment: Augment, rows: npt.ArrayLike, side: int = SIDE, seed: int = 3, epoch: int = 1) -> Changes:
    found = Changes.draw(augment, side, seed, epoch, np.asarray(rows, np.int64))
    assert found is not None
    return found


def apply(what: Changes, images: torch.Tensor) -> torch.Tensor:
    return what.to(images.device).apply(images)


# -- operations


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_at_every_magnitude_is_pillows(name: str, policy: str, picture: str) -> None:
    image, kind = PICTURES[picture], NAMES.index(name)
    side = len(image)
    table = randaugment_table(side) if policy == "randaugment" else trivialaugment_table()
    values = np.concatenate([table[kind], -table[kind]] if SIGNED[kind] else [table[kind]]).astype(np.float32)
    found = arrays(
        apply(changes([[kind]] * len(values), values[:, None].tolist(), side), tensor([image] * len(values)))
    )
    for value, pixels in zip(values.tolist(), found, strict=True):
        expected = np.asarray(PILLOW[name](Image.fromarray(image), value))
        apart = np.abs(pixels.astype(int) - expected)
        assert apart.max() <= (1 if name == "rotate" else 0), value
        assert (apart > 0).mean() < 1e-3 or side < SIDE


@settings(max_examples=60, deadline=None)
@given(
    matrix=st.tuples(*[st.floats(-2, 2), st.floats(-2, 2), st.floats(-30, 30)] * 2),
    width=st.integers(1, 20),
    height=st.integers(1, 20),
)
def test_any_affine_map_is_pillows(matrix: tuple[float, ...], width: int, height: int) -> None:
    image = PHOTO[:height, :width]
    expected = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    found = transform(tensor([image]).contiguous(), torch.tensor([matrix], dtype=torch.float64))
    assert np.abs(arrays(found)[0].astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize(
    ("table", "reference"),
    [(randaugment_table(331), RandAugment()), (trivialaugment_table(), TrivialAugmentWide())],
    ids=["randaugment", "trivialaugment"],
)
def test_tables_are_torchvisions(table: npt.NDArray[np.float64], reference: RandAugment | TrivialAugmentWide) -> None:
    space = (
        reference._augmentation_space(31, (331, 331))
        if isinstance(reference, RandAugment)
        else reference._augmentation_space(31)
    )
    assert [name.lower() for name in space] == [
        name.replace("_", "").replace("shift", "translate").replace("colour", "color") for name in NAMES
    ]
    for ours, signed, (values, theirs_signed) in zip(table, SIGNED, space.values(), strict=True):
        assert signed == theirs_signed
        assert np.allclose(ours, values.numpy() if values.ndim else 0, rtol=1e-6, atol=1e-4)


def test_a_round_follows_the_round_before_it() -> None:
    order = [NAMES.index(name) for name in ("rotate", "equalize", "posterize")]
    image = Image.fromarray(PHOTO)
    for kinds, values in ((order, [30, 0, 4]), (order[::-1], [4, 0, 30])):
        expected = image
        for kind, value in zip(kinds, values, strict=True):
            expected = PILLOW[NAMES[kind]](expected, value)
        assert (arrays(apply(changes([kinds], [list(values)], SIDE), tensor([PHOTO])))[0] == np.asarray(expected)).all()


# -- batches


@pytest.mark.parametrize(
    "augment",
    [recipe(policy="randaugment", operations=3, erasing=0.5), recipe(policy="trivialaugment"), recipe(erasing=0.7)],
    ids=["randaugment", "trivialaugment", "erasing"],
)
def test_an_image_in_a_batch_is_what_it_is_alone_in_any_layout_and_type(augment: Augment) -> None:
    rows = np.random.default_rng(0).integers(0, 10**9, 40)
    images = tensor([np.roll(PHOTO, 3 * i, 1) for i in range(40)])
    given_images = images.clone()
    together = apply(drawn(augment, rows), images)
    assert torch.equal(images, given_images)
    for i in range(40):
        assert torch.equal(apply(drawn(augment, rows[i : i + 1]), images[i : i + 1]), together[i : i + 1])
    mixed = np.random.default_rng(1).permutation(40)
    assert torch.equal(apply(drawn(augment, rows[mixed]), images[mixed]), together[mixed])
    for other in (images.contiguous(), images.float(), images.contiguous().bfloat16()):
        found = apply(drawn(augment, rows), other)
        assert found.dtype == other.dtype
        assert found.stride() == other.stride()
        assert torch.equal(found.to(torch.uint8), together)
    assert together.stride() == images.stride()
    assert len({pixels.tobytes() for pixels in arrays(together)}) == 40


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(0, 2**40), max_size=12),
    side=st.integers(1, 24),
    operations=st.integers(1, 4),
    policy=st.sampled_from(["none", "randaugment", "trivialaugment"]),
)
def test_batches_and_images_of_any_size_are_borne(rows: list[int], side: int, operations: int, policy: str) -> None:
    what = drawn(recipe(policy=policy, operations=operations, erasing=0.5), rows, side)
    images = tensor(np.zeros((len(rows), side, side, 3), np.uint8))
    assert apply(what, images).shape == images.shape
    assert what.operations.shape == what.values.shape
    assert what.boxes.shape == (len(rows), 4)


def test_nothing_is_drawn_where_the_spec_changes_nothing() -> None:
    assert Changes.draw(recipe(), SIDE, 0, 0, np.arange(4)) is None


def test_no_result_is_read_back_from_the_device() -> None:
    # A meta tensor has a shape and no values: whatever asked for one would raise.
    augment = recipe(policy="randaugment", operations=8, erasing=0.9)
    images = torch.empty(64, 3, SIDE, SIDE, dtype=torch.uint8, device="meta")
    what = drawn(augment, range(64))
    assert set(np.unique(what.operations)) == set(range(len(NAMES)))
    assert apply(what, images).shape == images.shape


def test_torchs_deterministic_mode_allows_all_of_it() -> None:
    augment = recipe(policy="randaugment", operations=8, erasing=0.9)
    images = tensor([PHOTO] * 32)
    expected = apply(drawn(augment, range(32)), images)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(apply(drawn(augment, range(32)), images), expected)
    finally:
        torch.use_deterministic_algorithms(False)


# -- draws


def _reference(augment: Augment, side: int, rng: Draws) -> tuple[list[int], list[np.float32], tuple[int, ...], int]:
    """Operations, values, box and key of one image, as `Changes.draw` documents them."""
    trivial = augment.policy == "trivialaugment"
    table = trivialaugment_table() if trivial else randaugment_table(side)
    kinds, values = [], []
    for _ in range({"none": 0, "randaugment": augment.operations, "trivialaugment": 1}[augment.policy]):
        kind, level, sign = rng.integer(14), rng.integer(31), rng.random()
        value = table[kind, level if trivial else augment.magnitude]
        kinds.append(kind)
        values.append(np.float32(-value if SIGNED[kind] and sign < 0.5 else value))
    erased, key = rng.random() < augment.erasing, rng.integer(2**53)
    for _ in range(10 if erased else 0):
        area = side * side * rng.uniform(0.02, 0.33)
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        top, left = rng.random(), rng.random()
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < side and 0 < w < side:
            return kinds, values, (int(top * (side - h + 1)), int(left * (side - w + 1)), h, w), key
    return kinds, values, (0, 0, 0, 0), key


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
    rows=st.lists(st.integers(0, 2**40), min_size=1, max_size=8),
    side=st.sampled_from([1, 2, 32, 224]),
    policy=st.sampled_from(["none", "randaugment", "trivialaugment"]),
)
def test_draws_are_those_of_a_generator_per_image(
    seed: int, epoch: int, rows: list[int], side: int, policy: str
) -> None:
    augment = recipe(policy=policy, operations=3, magnitude=11, erasing=0.6)
    found = drawn(augment, rows, side, seed, epoch)
    for i, row in enumerate(rows):
        kinds, values, box, key = _reference(augment, side, sample_rng(seed ^ _STREAM, epoch, row))
        assert found.operations[i].tolist() == kinds
        assert (found.values[i] == np.array(values, np.float32)).all()
        assert tuple(found.boxes[i]) == box
        assert found.keys[i] == key


def test_operations_magnitudes_and_signs_are_equally_likely() -> None:
    n, table = 60_000, trivialaugment_table()
    found = drawn(recipe(policy="trivialaugment"), range(n))
    kinds, values = found.operations[:, 0], found.values[:, 0]
    counts = np.bincount(kinds, minlength=14)
    assert ((counts - n / 14) ** 2 / (n / 14)).sum() < 40  # chi-square of 13 degrees: once in 7,000 tries
    rotated = values[kinds == NAMES.index("rotate")]
    levels = np.rint(np.abs(rotated) / table[NAMES.index("rotate"), 1]).astype(int)
    expected = len(rotated) / 31
    assert ((np.bincount(levels, minlength=31) - expected) ** 2 / expected).sum() < 65  # of 30 degrees
    turned = rotated[rotated != 0]
    assert abs((turned < 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(len(turned))
    rounds = drawn(recipe(policy="randaugment", operations=2), range(n)).operations.astype(int)
    pairs = np.bincount(rounds[:, 0] * 14 + rounds[:, 1], minlength=196)
    assert ((pairs - n / 196) ** 2 / (n / 196)).sum() < 280  # of 195 degrees


# -- erasing


def test_a_rectangle_is_filled_with_noise_of_its_key_and_nothing_else_changes() -> None:
    what = drawn(recipe(erasing=0.5), range(60), 40)
    found = arrays(apply(what, tensor(np.full((60, 40, 40, 3), 9, np.uint8))))
    assert 15 < np.count_nonzero(what.boxes[:, 2]) < 45
    for pixels, (top, left, height, width), key in zip(found, what.boxes, what.keys.tolist(), strict=True):
        expected = np.full((40, 40, 3), 9, np.uint8)
        noise = Draws(key).noise((40, 40, 8))[..., :3]
        box = slice(top, top + height), slice(left, left + width)
        expected[box] = noise[box]
        assert (pixels == expected).all()


def test_rectangles_have_the_areas_ratios_and_places_of_random_erasing() -> None:
    boxes = drawn(recipe(erasing=0.25), range(40_000), 1000).boxes
    top, left, height, width = boxes[boxes[:, 2] > 0].T.astype(float)
    assert abs(len(top) / 40_000 - 0.25) < 0.01
    areas, ratios = height * width / 1e6, np.log(height / width)
    assert areas.min() > 0.0199
    assert areas.max() < 0.331
    assert abs(areas.mean() - 0.175) < 0.005
    assert ratios.min() > math.log(0.299)
    assert ratios.max() < math.log(3.31)
    assert abs(ratios.std() - math.log(3.3 / 0.3) / math.sqrt(12)) < 0.02
    for start, length in ((top, height), (left, width)):
        assert start.min() >= 0
        assert (start + length).max() <= 1000
        assert abs((start / (1000 - length)).mean() - 0.5) < 0.02


def test_noise_is_uniform_over_the_bytes_and_differs_between_images_and_epochs() -> None:
    black = tensor(np.zeros((8, 300, 300, 3), np.uint8))
    what = drawn(recipe(erasing=0.999), range(8), 300)
    found = arrays(apply(what, black))
    counts = np.zeros(256)
    for pixels, (top, left, height, width) in zip(found, what.boxes, strict=True):
        counts += np.bincount(pixels[top : top + height, left : left + width].ravel(), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 350  # chi-square of 255 degrees
    assert len(set(what.keys)) == 8
    assert not set(what.keys) & set(drawn(recipe(erasing=0.999), range(8), 300, epoch=2).keys)


# -- mixing


@pytest.mark.parametrize("fields", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_mixed_targets_are_shares_of_two_classes(fields: dict[str, float]) -> None:
    torch.manual_seed(0)
    mixer = batch_mixer(recipe(**fields), 10)
    images, targets = mixer(torch.rand(16, 3, 8, 8), torch.arange(16) % 10)
    assert images.shape == (16, 3, 8, 8)
    assert targets.shape == (16, 10)
    assert torch.allclose(targets.sum(1), torch.ones(16))


def test_there_is_no_mixer_without_mixing() -> None:
    assert batch_mixer(recipe(), 10) is None
