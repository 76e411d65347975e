"""From an RGB image to the square of pixels that the model sees, for training and for evaluation.

All chance comes from the generator given with each image, none from a global one: threads cannot disturb each
other, nor the model's dropout. Pixels stay uint8; normalising, mixup and cutmix are done on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from launcher.spec import Augment
from trainers.data.order import Draws

Pixels = npt.NDArray[np.uint8]
Operation = Callable[[Image.Image, float], Image.Image]


class TrainTransform:
    """Random resized crop, mirror, policy and erasing, as the resolved spec says.

    Args:
        augment: with `crop_scale` and `flip` resolved.
        image_size: side of the result in pixels.
        interpolation: Pillow's name of the filter, any case; resizing is always antialiased.
    """

    def __init__(self, augment: Augment, image_size: int, interpolation: str = "bilinear") -> None:
        assert augment.crop_scale is not None, "the plan resolves it"
        assert augment.flip is not None, "the plan resolves it"
        self.image_size = image_size
        self._filter = _filter(interpolation)
        self._scale = augment.crop_scale
        self._ratio = augment.crop_ratio
        self._flip = augment.flip
        self._policy = augment.policy
        self._table = TRIVIAL_TABLE if augment.policy == "trivialaugment" else randaugment_table(image_size)
        self._magnitude = augment.magnitude
        self._operations = augment.operations
        self._erasing = augment.erasing

    def __call__(self, image: Image.Image, rng: Draws) -> Pixels:
        """uint8 [image_size, image_size, 3], contiguous; a pure function of the image and the generator's state."""
        left, top, width, height = random_crop(image.width, image.height, self._scale, self._ratio, rng)
        side = self.image_size
        # The filter may look over the edge of the crop, by a part of a pixel of the result; it saves a copy.
        image = image.resize((side, side), self._filter, box=(left, top, left + width, top + height))
        if self._flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self._policy == "randaugment":
            for _ in range(self._operations):
                image = _operate(image, self._table, self._magnitude, rng)
        elif self._policy == "trivialaugment":
            image = _operate(image, self._table, rng.integer(31), rng)
        if self._erasing and rng.random() < self._erasing:
            return _erase(np.array(image), rng)
        return np.asarray(image)


class EvalTransform:
    """The middle of the image: the short side resized to `image_size / crop_pct`, then a centred square.

    The pixels are those of torchvision's `Resize` and `CenterCrop`.
    """

    def __init__(self, image_size: int, crop_pct: float = 0.875, interpolation: str = "bilinear") -> None:
        self.image_size = image_size
        self._resized = max(round(image_size / crop_pct), image_size)
        self._filter = _filter(interpolation)

    def __call__(self, image: Image.Image) -> Pixels:
        """uint8 [image_size, image_size, 3], contiguous."""
        # Only what the crop keeps is resized: the same pixels, and images of any shape are borne.
        short, side = min(image.width, image.height), self.image_size
        width, height = (int(self._resized * length / short) for length in image.size)
        left, top = round((width - side) / 2), round((height - side) / 2)
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, min((left + side) * x, image.width), min((top + side) * y, image.height))
        return np.asarray(image.resize((side, side), self._filter, box=box))


def _filter(name: str) -> Image.Resampling:
    return Image.Resampling[name.upper()]


def random_crop(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: Draws
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a crop, after torchvision's `RandomResizedCrop.get_params` (Szegedy et al. 2015).

    Ten tries of a random area and aspect ratio; then the largest centred crop whose ratio is allowed.
    """
    area = width * height
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target, aspect = area * rng.uniform(*scale), math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integer(width - w + 1), rng.integer(height - h + 1), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = min(max(round(width / ratio[0]), 1), height)
    elif width / height > ratio[1]:
        w = min(max(round(height * ratio[1]), 1), width)
    return (width - w) // 2, (height - h) // 2, w, h


def _erase(pixels: Pixels, rng: Draws) -> Pixels:
    """A rectangle filled with noise, after torchvision's `RandomErasing` (Zhong et al. 2017) and its ranges."""
    height, width = pixels.shape[:2]
    for _ in range(10):
        target = height * width * rng.uniform(0.02, 0.33)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = rng.integer(height - h + 1), rng.integer(width - w + 1)
            pixels[top : top + h, left : left + w] = rng.noise((h, w, 3))
            break
    return pixels


# -- policies: (operation, its value at magnitude 0..30, whether the sign is drawn), after torchvision's tables


def _shear_x(image: Image.Image, value: float) -> Image.Image:
    return _affine(image, (1, value, 0, 0, 1, 0))


def _shear_y(image: Image.Image, value: float) -> Image.Image:
    return _affine(image, (1, 0, 0, value, 1, 0))


def _shift_x(image: Image.Image, value: float) -> Image.Image:
    return _affine(image, (1, 0, int(value), 0, 1, 0))


def _shift_y(image: Image.Image, value: float) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, int(value)))


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _rotate(image: Image.Image, value: float) -> Image.Image:
    return image.rotate(value, Image.Resampling.BILINEAR)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, value: kind(image).enhance(1 + value)


_BRIGHTNESS, _COLOUR = _enhance(ImageEnhance.Brightness), _enhance(ImageEnhance.Color)
_CONTRAST, _SHARPNESS = _enhance(ImageEnhance.Contrast), _enhance(ImageEnhance.Sharpness)

Table = tuple[tuple[Operation, Callable[[int], float], bool], ...]


def _up_to(most: float) -> Callable[[int], float]:
    return lambda magnitude: most * magnitude / 30


def _table(shear: float, shift: float, angle: float, colour: float, bits: int) -> Table:
    return (
        (lambda image, _: image, _up_to(0), False),
        (_shear_x, _up_to(shear), True),
        (_shear_y, _up_to(shear), True),
        (_shift_x, _up_to(shift), True),
        (_shift_y, _up_to(shift), True),
        (_rotate, _up_to(angle), True),
        (_BRIGHTNESS, _up_to(colour), True),
        (_COLOUR, _up_to(colour), True),
        (_CONTRAST, _up_to(colour), True),
        (_SHARPNESS, _up_to(colour), True),
        (lambda image, value: ImageOps.posterize(image, int(value)), lambda m: 8 - round(m * bits / 30), False),
        (lambda image, value: ImageOps.solarize(image, math.ceil(value)), lambda m: 255 - 255 * m / 30, False),
        (lambda image, _: ImageOps.autocontrast(image), _up_to(0), False),
        (lambda image, _: ImageOps.equalize(image), _up_to(0), False),
    )


def randaugment_table(side: int) -> Table:
    """RandAugment (Cubuk et al. 2019) for images of `side` pixels."""
    return _table(shear=0.3, shift=150 / 331 * side, angle=30, colour=0.9, bits=4)


TRIVIAL_TABLE = _table(shear=0.99, shift=32, angle=135, colour=0.99, bits=6)
"""TrivialAugment, the wide space (Müller and Hutter 2021)."""


def _operate(image: Image.Image, table: Table, magnitude: int, rng: Draws) -> Image.Image:
    """One random operation of the table."""
    operation, value, signed = table[rng.integer(len(table))]
    sign = -1 if signed and rng.random() < 0.5 else 1
    return operation(image, sign * value(magnitude))


def batch_mixer(augment: Augment, classes: int) -> Any:
    """Mixup and cutmix as `mixer(images, targets)`, on whole batches on the device; None if both are off."""
    from torchvision.transforms import v2

    mixers: list[Any] = []
    if augment.mixup:
        mixers.append(v2.MixUp(alpha=augment.mixup, num_classes=classes))
    if augment.cutmix:
        mixers.append(v2.CutMix(alpha=augment.cutmix, num_classes=classes))
    return v2.RandomChoice(mixers) if mixers else None
