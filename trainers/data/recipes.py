"""What a run does to decoded images, batch by batch in compiled code: crops for training, the middle for evaluation.

It also says how far images may be reduced when they are decoded. No image is decoded or read here.
"""

from __future__ import annotations

import math

import numpy as np

from launcher.spec import Augment
from trainers.data.crops import draw_crops
from trainers.data.images import Pixels, Reduction
from trainers.data.kernel import FILTERS, Bytes, Doubles, Ints, Words, crop_resize


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
