"""Random changes to training images after the crop: RandAugment, TrivialAugment, erasing, mixup and cutmix.

What happens to an image is drawn on the host, a pure function of seed, epoch and row, and done on the device to the
whole batch; Pillow's results are the reference. Cropping and mirroring come before and are not done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from launcher.spec import Augment
from trainers.data import operations
from trainers.data.crops import sample_states
from trainers.data.order import Floats, Ints, Words, outputs, uniform

NAMES = ("identity", "shear_x", "shear_y", "shift_x", "shift_y", "rotate", "brightness", "colour", "contrast",
         "sharpness", "posterize", "solarize", "autocontrast", "equalize")  # fmt: skip
"""The operations of both policies, in torchvision's order; `Changes.operations` holds their places here."""

SIGNED = np.array([name in NAMES[1:10] for name in NAMES])
"""Whether the sign of an operation's value is drawn too."""

_FIRST_COLOUR = NAMES.index("brightness")
"""The operations before it, but for the identity, are geometric."""
_STREAM = 0x706F6C696379
"""Added to the seed by exclusive or: these draws tell nothing of `sample_rng`'s for the same sample."""
_TRIES = 10
_IN_CACHE = 100_000
"""Pixels that a CPU changes at a time (measured at 224 x 224); a GPU is faster the more there are."""


def randaugment_table(side: int) -> Floats:
    """Values of RandAugment (Cubuk et al. 2019) for images of `side` pixels: [operation, magnitude 0..30]."""
    return _table(shear=0.3, shift=150 / 331 * side, angle=30, colour=0.9, bits=4)


def trivialaugment_table() -> Floats:
    """Values of TrivialAugment, the wide space (Müller and Hutter 2021): [operation, magnitude 0..30]."""
    return _table(shear=0.99, shift=32, angle=135, colour=0.99, bits=6)


def _table(shear: float, shift: float, angle: float, colour: float, bits: int) -> Floats:
    """torchvision's tables for 31 bins; degrees, pixels, and for colours what is added to a factor of 1."""
    part = np.arange(31) / 30
    most = np.array([0, shear, shear, shift, shift, angle, colour, colour, colour, colour, 0, 0, 0, 0])
    table = most[:, None] * part
    table[NAMES.index("posterize")] = 8 - np.rint(bits * part)
    table[NAMES.index("solarize")] = 255 - 255 * part
    return table


@lru_cache(maxsize=8)
def _values(policy: str, side: int) -> Floats:
    return randaugment_table(side) if policy == "randaugment" else trivialaugment_table()


@dataclass(frozen=True)
class Changes:
    """What is to be done to each image of a batch: small arrays on the host.

    Attributes:
        operations: int8 [b, k]: places in `NAMES`, in the order in which they are done.
        values: float32 [b, k]: the strength of each, with its sign, in the units of the tables.
        boxes: int32 [b, 4]: top, left, height and width of the rectangle to erase; all 0 for none.
        keys: int64 [b]: states of splitmix64 from which the noise in the rectangles comes.
        side: height and width of the images.
    """

    operations: npt.NDArray[np.int8]
    values: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.int32]
    keys: Ints
    side: int

    @classmethod
    def draw(cls, augment: Augment, side: int, seed: int, epoch: int, rows: Ints) -> Changes | None:
        """What the spec says for these rows (int64 [b]) in this epoch; None if it never changes an image.

        The numbers are those of `sample_rng(seed ^ constant, epoch, row)`, in this order: operation, magnitude and
        sign of each round; whether to erase, and the key of the noise; area, aspect ratio, top and left of each try.
        """
        rounds = {"none": 0, "randaugment": augment.operations, "trivialaugment": 1}[augment.policy]
        if not rounds and not augment.erasing:
            return None
        states = sample_states(seed ^ _STREAM, epoch, rows)
        chances = _uniform(states, 0, 3 * rounds + 2)
        kinds, levels, signs = chances[:, :-2].reshape(len(rows), rounds, 3).transpose(2, 0, 1)
        kind = (kinds * len(NAMES)).astype(np.int8)
        level = (levels * 31).astype(np.int8) if augment.policy == "trivialaugment" else augment.magnitude
        value = _values(augment.policy, side)[kind, level]
        erased = np.flatnonzero(chances[:, -2] < augment.erasing)
        boxes = np.zeros((len(rows), 4), np.int32)
        if len(erased):
            boxes[erased] = _boxes(_uniform(states[erased], 3 * rounds + 2, 4 * _TRIES), side)
        return cls(
            operations=kind,
            values=np.where(SIGNED[kind] & (signs < 0.5), -value, value).astype(np.float32),
            boxes=boxes,
            keys=(chances[:, -1] * 2.0**53).astype(np.int64),
            side=side,
        )

    def to(self, device: torch.device) -> DeviceChanges:
        """The same, on a device and sorted by operation. The host does not wait for the copy."""
        most = max(_IN_CACHE // self.side**2 if device.type == "cpu" else len(self.operations), 1)
        drawn = zip(self.operations.T, self.values.T, strict=True)
        groups = [group for kinds, values in drawn for group in _groups(kinds, values, self.side)]
        which = np.flatnonzero(self.boxes[:, 2])
        boxes = self.boxes[which].astype(np.int64)
        parts = [index for _, index, _ in groups]
        numbers = [arguments.ravel() for _, _, arguments in groups]
        # Two copies to the device, however many operations there are.
        indices = _moved(np.concatenate([*parts, which, boxes.T.ravel(), self.keys[which]]), device)
        flat = _moved(np.concatenate([np.empty(0), *numbers]), device)
        steps: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        i = j = 0
        for name, index, arguments in groups:
            own, given = indices[i : i + len(index)], flat[j : j + arguments.size].view(arguments.shape)
            i, j = i + len(index), j + arguments.size
            steps += ((name, own[k : k + most], given[k : k + most]) for k in range(0, len(index), most))
        m = len(which)
        rest = indices[i:].view(6, m)
        return DeviceChanges(steps, rest[0], rest[1:5].T, rest[5], int((boxes[:, 2] * boxes[:, 3]).sum()))


@dataclass(frozen=True)
class DeviceChanges:
    """`Changes` on the device of the images.

    Attributes:
        steps: operation, its images (int64 [n]) and its arguments (float64 [n] or [n, 6]), in the order of doing.
        erased: images with a rectangle, int64 [m].
        boxes: int64 [m, 4].
        keys: int64 [m].
        area: pixels of all rectangles.
    """

    steps: list[tuple[str, torch.Tensor, torch.Tensor]]
    erased: torch.Tensor
    boxes: torch.Tensor
    keys: torch.Tensor
    area: int

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """The changed images: a copy, of the same dtype and layout.

        Each operation gives what Pillow gives, and every image what it would give alone. The host does not wait.

        Args:
            images: uint8 or float [b, 3, H, W] of whole numbers 0 to 255, contiguous or channels_last.
        """
        pixels = torch.empty(images.shape, dtype=torch.uint8, device=images.device).copy_(images)
        for name, index, arguments in self.steps:
            pixels.index_copy_(0, index, _OPERATIONS[name](pixels.index_select(0, index), arguments))
        if self.area:
            operations.erase(pixels, self.erased, self.boxes, self.keys, self.area)
        if not images.is_contiguous(memory_format=torch.channels_last):
            return pixels.to(images.dtype)
        # Several times faster on CPUs than `contiguous(memory_format=...)`.
        return torch.stack(pixels.unbind(1), -1).permute(0, 3, 1, 2).to(images.dtype)


_OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "transform": operations.transform,
    "brightness": operations.brightness,
    "colour": operations.colour,
    "contrast": operations.contrast,
    "sharpness": operations.sharpness,
    "posterize": operations.posterize,
    "solarize": operations.solarize,
    "autocontrast": lambda images, _: operations.autocontrast(images),
    "equalize": lambda images, _: operations.equalize(images),
}


def batch_mixer(augment: Augment, classes: int) -> Any:
    """Mixup and cutmix as `mixer(images, targets)`, on whole batches on the device; None if both are off."""
    from torchvision.transforms import v2

    mixers: list[Any] = []
    if augment.mixup:
        mixers.append(v2.MixUp(alpha=augment.mixup, num_classes=classes))
    if augment.cutmix:
        mixers.append(v2.CutMix(alpha=augment.cutmix, num_classes=classes))
    return v2.RandomChoice(mixers) if mixers else None


def _groups(
    kinds: npt.NDArray[np.int8], values: npt.NDArray[np.float32], side: int
) -> Iterator[tuple[str, Ints, Floats]]:
    """One round sorted by operation, the identity left out: name, images and arguments."""
    order = np.argsort(kinds, kind="stable")
    bounds = np.searchsorted(kinds[order], [1, *range(_FIRST_COLOUR, len(NAMES) + 1)]).tolist()
    for kind, first, last in zip(range(_FIRST_COLOUR - 1, len(NAMES)), bounds[:-1], bounds[1:], strict=True):
        if first == last:
            continue
        index = order[first:last]
        given = values[index].astype(np.float64)
        if kind < _FIRST_COLOUR:
            yield "transform", index, _matrices(kinds[index], given, side)
        elif NAMES[kind] == "posterize":
            yield "posterize", index, 256 - 2 ** (8 - given)
        elif NAMES[kind] == "solarize":
            yield "solarize", index, np.ceil(given)
        else:
            yield NAMES[kind], index, 1 + given


def _matrices(kinds: npt.NDArray[np.int8], values: Floats, side: int) -> Floats:
    """The matrices [n, 6] that `operations.transform` takes, as Pillow's `transform` and `rotate` have them."""
    matrices = np.tile(np.array([1.0, 0, 0, 0, 1, 0]), (len(kinds), 1))
    for name, column in (("shear_x", 1), ("shear_y", 3), ("shift_x", 2), ("shift_y", 5)):
        chosen = kinds == NAMES.index(name)
        matrices[chosen, column] = np.trunc(values[chosen]) if name.startswith("shift") else values[chosen]
    turned = kinds == NAMES.index("rotate")
    # Rounded as in Pillow: a quarter turn is one exactly.
    angles = -np.radians(values[turned])
    cosine, sine = np.cos(angles).round(15), np.sin(angles).round(15)
    middle = side / 2
    matrices[turned] = np.stack([cosine, sine, middle - (cosine + sine) * middle,
                                 -sine, cosine, middle - (cosine - sine) * middle], 1)  # fmt: skip
    return matrices


def _moved(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _boxes(chances: Floats, side: int) -> Ints:
    """Rectangles to erase, [n, 4], after torchvision's `RandomErasing` (Zhong et al. 2017) and its ranges.

    Args:
        chances: [n, 4 * tries], uniform in [0, 1); the first try that fits counts, and if none does, all is 0.
    """
    area, aspect, top, left = chances.reshape(len(chances), -1, 4).transpose(2, 0, 1)
    target = side * side * (0.02 + (0.33 - 0.02) * area)
    low, high = np.log(0.3), np.log(3.3)
    ratio = np.exp(low + (high - low) * aspect)
    h, w = np.rint(np.sqrt(target * ratio)), np.rint(np.sqrt(target / ratio))
    fits = (h > 0) & (h < side) & (w > 0) & (w < side)
    boxes = np.stack([np.trunc(top * (side - h + 1)), np.trunc(left * (side - w + 1)), h, w], 2) * fits[..., None]
    found: Ints = boxes[np.arange(len(boxes)), fits.argmax(1)].astype(np.int64)
    return found


def _uniform(states: Words, first: int, count: int) -> Floats:
    """Numbers `first` to `first + count - 1` that `Draws.random` gives in each state: [b, count]."""
    return uniform(outputs(states[:, None], np.arange(first + 1, first + count + 1, dtype=np.uint64)))
