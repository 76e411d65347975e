"""Memory that is lent: nobody else has it as long as any part of it is in use, and then the next one gets it."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.data.spaces import GRAIN, Bytes, Spaces


def test_what_came_back_is_lent_again_to_one_of_about_the_same_size() -> None:
    spaces = Spaces(4 * GRAIN)
    first = spaces.lend(100, 100, 3)
    place = first.ctypes.data
    other = spaces.lend(100, 100, 3)
    assert other.ctypes.data != place
    del first
    assert spaces.lend(2 * GRAIN).ctypes.data != place
    assert spaces.lend(99, 100, 3).ctypes.data == place


def test_a_part_or_a_tensor_keeps_the_whole() -> None:
    spaces = Spaces(4 * GRAIN)
    for part in (
        lambda array: array[5, 7:9],
        lambda array: torch.from_numpy(array).permute(2, 0, 1)[1],
        lambda array: array.data,
    ):
        array = spaces.lend(10, 20, 3)
        array[:] = 7
        held = part(array)
        del array
        others = [spaces.lend(10, 20, 3) for _ in range(3)]
        for other in others:
            other[:] = 1
        assert (np.asarray(held) == 7).all()


def test_no_more_is_kept_than_was_said() -> None:
    spaces = Spaces(2 * GRAIN)
    many = [spaces.lend(GRAIN) for _ in range(5)]
    many[0][:] = 9
    places = {array.ctypes.data for array in many}
    many.clear()
    assert spaces._kept == 2 * GRAIN
    again = [spaces.lend(GRAIN) for _ in range(2)]
    assert {array.ctypes.data for array in again} <= places
    assert spaces._kept == 0


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(0, 3 * GRAIN), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_threads_never_get_the_memory_of_one_another(sizes: list[int], seed: int) -> None:
    spaces = Spaces(8 * GRAIN)

    def work(mark: int) -> bool:
        chance = random.Random(seed + mark)
        held: list[Bytes] = []
        for _ in range(10):
            array = spaces.lend(chance.choice(sizes))
            array[:] = mark
            held = [*held, array][-chance.randint(1, 3) :]
        return all((array == mark).all() for array in held)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
