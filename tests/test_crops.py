"""The compiled draws are those of the Python generator, bit for bit, and the crops are what the formulas say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainers.data.crops import draw_crops, sample_states
from trainers.data.order import Draws, sample_rng

SHAPES = [(1, 1), (1, 3000), (3000, 1), (8, 8), (7, 500), (640, 480), (224, 224)]
"""Width and height."""

Pair = tuple[float, float]


def in_python(width: int, height: int, scale: Pair, ratio: Pair, rng: Draws) -> tuple[int, int, int, int]:
    """Left, top, right and bottom as torchvision's `RandomResizedCrop.get_params` makes them."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target, aspect = width * height * rng.uniform(*scale), math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integer(width - w + 1), rng.integer(height - h + 1)
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = min(max(round(width / ratio[0]), 1), height)
    elif width / height > ratio[1]:
        w = min(max(round(height * ratio[1]), 1), width)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crops(
    width: int, height: int, scale: Pair, ratio: Pair, states: np.ndarray, flip: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    return draw_crops(np.full((len(states), 2), (height, width), np.int32), states, scale, ratio, flip)


words = st.integers(0, 2**64 - 1)
lengths = st.integers(1, 60_000)
shares = st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted)
ratios = st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted)


@settings(max_examples=600, deadline=None)
@given(lengths, lengths, shares, ratios, words, st.booleans())
@example(100, 100, [0.015625, 0.015625], [1.0, 1.0], 1, True)  # sides of 12.5, rounded to even
@example(100, 100, [0.018225, 0.018225], [1.0, 1.0], 1, True)  # and of 13.5
@example(3, 60_000, [0.9, 1.0], [0.75, 1.333], 5, False)
@example(60_000, 3, [0.9, 1.0], [0.75, 1.333], 5, False)
def test_crops_and_flips_are_those_of_the_python_generator(
    width: int, height: int, scale: list[float], ratio: list[float], state: int, flip: bool
) -> None:
    scale_pair, ratio_pair = (scale[0], scale[1]), (ratio[0], ratio[1])
    boxes, flips = crops(width, height, scale_pair, ratio_pair, np.array([state], np.uint64), flip)
    rng = Draws(state)
    assert tuple(boxes[0]) == in_python(width, height, scale_pair, ratio_pair, rng)
    assert bool(flips[0]) == (flip and rng.random() < 0.5)


@settings(max_examples=200, deadline=None)
@given(st.integers(-5, 2**70), st.integers(0, 2**40), st.lists(st.integers(0, 2**62), min_size=1, max_size=5))
def test_states_are_those_of_the_python_generator(seed: int, epoch: int, rows: list[int]) -> None:
    states = sample_states(seed, epoch, np.array(rows, np.int64))
    assert states.dtype == np.uint64
    for row, state in zip(rows, states.tolist(), strict=True):
        assert Draws(state).random() == sample_rng(seed, epoch, row).random()


@pytest.mark.parametrize("shape", SHAPES)
def test_crops_lie_in_the_image_and_keep_to_area_and_ratio(shape: tuple[int, int]) -> None:
    width, height = shape
    boxes, _ = crops(width, height, (0.08, 0.5), (3 / 4, 4 / 3), sample_states(0, 0, np.arange(200)))
    for left, top, right, bottom in boxes.tolist():
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        w, h = right - left, bottom - top
        if min(shape) > 100:
            assert 0.07 < w * h / (width * height) < 0.51
            assert 0.74 < w / h < 1.35


def test_crops_and_flips_are_distributed_as_the_formulas_say() -> None:
    boxes, flips = crops(1000, 1000, (0.2, 0.6), (0.5, 2.0), sample_states(0, 0, np.arange(4000)))
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    assert abs((w * h).mean() / 1e6 - 0.4) < 0.01
    assert abs(np.log(w / h).mean()) < 0.02
    assert abs(np.log(w / h).std() - math.log(4) / math.sqrt(12)) < 0.02
    assert abs(flips.mean() - 0.5) < 0.03
    assert not crops(1000, 1000, (0.2, 0.6), (0.5, 2.0), sample_states(0, 0, np.arange(50)), flip=False)[1].any()
