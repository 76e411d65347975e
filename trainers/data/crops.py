"""The random crops of a batch in one call: the generator of `order.Draws`, compiled, and what is made of its numbers.

The numbers are the same bit for bit, and depend on the seed, the epoch, the row and the size of the image alone.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from trainers.data.kernel import Doubles, Flags, Ints, Longs, Words, compiled, inner

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_PAIR = types.UniTuple(types.float64, 2)


@inner()
def _finalised(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@inner()
def _mixed(a: np.uint64, b: np.uint64) -> np.uint64:
    return _finalised(_finalised(a + _GOLDEN) + b * np.uint64(0xD1342543DE82EF95))


@inner()
def _uniform(state: np.uint64, low: float, high: float) -> float:
    return low + (high - low) * (float(_finalised(state) >> np.uint64(11)) * 2.0**-53)


@compiled(types.uint64[::1](types.uint64, types.uint64, types.int64[::1]))
def _sample_states(seed: np.uint64, epoch: np.uint64, rows: Longs) -> Words:
    states = np.empty(len(rows), np.uint64)
    for place in range(len(rows)):
        states[place] = _mixed(_mixed(seed, epoch), np.uint64(rows[place]))
    return states


def sample_states(seed: int, epoch: int, rows: Longs) -> Words:
    """The state of `order.sample_rng(seed, epoch, row)` for each row of int64 [n]: uint64 [n]."""
    return _sample_states(np.uint64(seed & _MASK), np.uint64(epoch & _MASK), rows)


@compiled(
    types.Tuple((types.float64[:, ::1], types.boolean[::1]))(
        types.int32[:, ::1], types.uint64[::1], _PAIR, _PAIR, types.boolean
    )
)
def draw_crops(
    sizes: Ints, states: Words, scale: tuple[float, float], ratio: tuple[float, float], flip: bool
) -> tuple[Doubles, Flags]:
    """A crop of each image, after torchvision's `RandomResizedCrop.get_params` (Szegedy et al. 2015), and its flip.

    Ten tries of a random area and aspect ratio; then the largest centred crop whose ratio is allowed. Last the flip.

    Args:
        sizes: height and width of each image, int32 [b, 2].
        states: state of the generator of each image, uint64 [b], as of `sample_states`.
        scale: least and most share of the area.
        ratio: least and most width / height.
        flip: whether half of the images are mirrored; none else.

    Returns:
        left, top, right and bottom of each crop in whole pixels, float64 [b, 4]; which are mirrored, bool [b].
    """
    boxes, flips = np.empty((len(sizes), 4), np.float64), np.empty(len(sizes), np.bool_)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for place in range(len(sizes)):
        height, width, state = np.int64(sizes[place, 0]), np.int64(sizes[place, 1]), states[place]
        left = top = w = h = np.int64(-1)
        for _ in range(10):
            target = width * height * _uniform(state + _GOLDEN, scale[0], scale[1])
            state += np.uint64(2) * _GOLDEN
            aspect = math.exp(_uniform(state, low, high))
            w, h = np.int64(round(math.sqrt(target * aspect))), np.int64(round(math.sqrt(target / aspect)))
            if 0 < w <= width and 0 < h <= height:
                left = np.int64(_uniform(state + _GOLDEN, 0.0, 1.0) * (width - w + 1))
                state += np.uint64(2) * _GOLDEN
                top = np.int64(_uniform(state, 0.0, 1.0) * (height - h + 1))
                break
        if left < 0:
            w, h = width, height
            if width / height < ratio[0]:
                h = min(max(np.int64(round(width / ratio[0])), np.int64(1)), height)
            elif width / height > ratio[1]:
                w = min(max(np.int64(round(height * ratio[1])), np.int64(1)), width)
            left, top = (width - w) // 2, (height - h) // 2
        boxes[place, 0], boxes[place, 1], boxes[place, 2], boxes[place, 3] = left, top, left + w, top + h
        flips[place] = flip and _uniform(state + _GOLDEN, 0.0, 1.0) < 0.5
    return boxes, flips
