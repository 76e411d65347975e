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
from trainers.data.crops import draw_crops
from trainers.data.images import Reduction
from trainers.data.kernel import FILTERS, Bytes, Doubles, Ints, Words, crop_resize
from trainers.data.order import Draws

Pixels = npt.NDArray[np.uint8]
Operation = Callable[[Image.Image, float], Image.Image]


class TrainRecipe:
    """Random resized crops, half of them mirrored where the spec says so.

    Args:
        augment: with `crop_scale` and `flip` resolved.
        side: of the result, in pixels.
        filter: Pillow's name of the filter, any case; resizing is always antialiased.
    """

    def __init__(self, augment: Augment, side: int, filter: str = "bilinear") -> None:
        assert augment.crop_scale is not None, "the plan resolves it"
        assert augment.flip is not None, "the plan resolves it"
        self.side, self.scale, self.ratio = side, augment.crop_scale, augment.crop_ratio
        self._flip, self._filter = augment.flip, FILTERS[filter.lower()]

    def fill(self, addresses: Words, shapes: Ints, states: Words, out: Bytes) -> None:
        """Crops a batch; a pure function of the images and the states. Without the GIL but for some microseconds.

        Args:
            addresses: of uint8 pixels [height, width, 3], uint64 [b]; where it is 0, `out` is left as it is.
            shapes: height and width of each, int32 [b, 2].
            states: as `crops.sample_states` gives them, uint64 [b].
            out: uint8 [b, side, side, 3], contiguous.
        """
        boxes, flips = draw_crops(np.maximum(shapes, np.int32(1)), states, self.scale, self.ratio, self._flip)
        crop_resize(addresses, shapes, boxes, flips, True, self._filter, out)


class EvalRecipe:
    """The middle of each image: the short side resized to `side / crop_pct`, then a centred square.

    The pixels are those of torchvision's `Resize` and `CenterCrop`.
    """

    def __init__(self, side: int, crop_pct: float = 0.875, filter: str = "bilinear") -> None:
        self.side, self.resized = side, max(round(side / crop_pct), side)
        self._filter = FILTERS[filter.lower()]

    def fill(self, addresses: Words, shapes: Ints, out: Bytes) -> None:
        """As `TrainRecipe.fill`, without chance."""
        crop_resize(addresses, shapes, self.boxes(shapes), np.zeros(len(shapes), np.bool_), False, self._filter, out)

    def one(self, image: Pixels) -> Pixels:
        """The square of an image uint8 [height, width, 3]: uint8 [side, side, 3]."""
        image = np.ascontiguousarray(image)
        out: Bytes = np.empty((1, self.side, self.side, 3), np.uint8)
        self.fill(np.array([image.ctypes.data], np.uint64), np.array([image.shape[:2]], np.int32), out)
        return out.reshape(out.shape[1:])

    def boxes(self, shapes: Ints) -> Doubles:
        """Left, top, right and bottom of what becomes the square, in pixels of each image: float64 [b, 4]."""
        # Only what the crop keeps is resized: the same pixels, and images of any shape are borne.
        lengths = np.maximum(shapes, 1)[:, ::-1].astype(np.float64)
        resized = np.trunc(self.resized * lengths / lengths.min(1, keepdims=True))
        start, unit = np.rint((resized - self.side) / 2), lengths / resized
        return np.concatenate([start * unit, np.minimum((start + self.side) * unit, lengths)], axis=1)


def reduction(train: TrainRecipe, evaluation: EvalRecipe) -> Reduction:
    """How far the images of a run may shrink: as far as neither recipe then enlarges what it had not enlarged.

    A crop of the least share s of an image of area A, with width / height r, has sides sqrt(s A r) and sqrt(s A / r).
    The shorter is least at the most extreme ratio, sqrt(s A min(r_least, 1 / r_most)); it must still have `side`
    pixels. An evaluation's short side must still have the pixels that it is resized to. The share is rounded down to a
    power of two, so that the recipes of a sweep share what is decoded.

    An image whose sides are no multiple of the factor ends in pixels that are partly beyond its edge; the middle that
    evaluation takes then lies off by less than two pixels of the result.
    """
    return Reduction(2.0 ** math.floor(math.log2(train.scale[0])), train.ratio, train.side, evaluation.resized)


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
