"""The order of samples: each exactly once an epoch, whatever the workers, and the same for ever."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainers.data.order import Draws, permutation, sample_rng, share, step_samples, steps_per_epoch

sizes = st.integers(1, 300)


@given(n=sizes, batch=st.integers(1, 64), world=st.integers(1, 9), parts=st.integers(1, 4), epoch=st.integers(0, 50))
def test_an_epoch_uses_each_sample_once_over_steps_ranks_and_parts(
    n: int, batch: int, world: int, parts: int, epoch: int
) -> None:
    order, steps = permutation(7, epoch, n), steps_per_epoch(n, batch)
    seen: list[int] = []
    for step in range(steps):
        whole = step_samples(order, step, steps)
        shares = [part for rank in range(world) for part in share(whole, rank, world, parts)]
        assert np.concatenate(shares).tolist() == whole.tolist()
        seen += whole.tolist()
    assert sorted(seen) == list(range(n))


@given(n=sizes, batch=st.integers(1, 64))
def test_batches_differ_by_one_sample_and_keep_to_the_size(n: int, batch: int) -> None:
    steps = steps_per_epoch(n, batch)
    lengths = [len(step_samples(permutation(0, 0, n), step, steps)) for step in range(steps)]
    assert max(lengths) <= batch
    assert max(lengths) - min(lengths) <= 1


def test_the_order_is_frozen() -> None:
    # A run that was started with one version of the code or of numpy must go on with the next.
    assert permutation(0, 0, 10).tolist() == [6, 7, 1, 2, 9, 0, 5, 8, 3, 4]
    assert permutation(1, 0, 10).tolist() != permutation(0, 1, 10).tolist() != permutation(0, 0, 10).tolist()
    rng = sample_rng(0, 0, 3)
    assert (rng.random(), rng.integer(1000)) == (0.030676695617568583, 23)
    assert rng.noise((2, 3)).tolist() == [[159, 172, 223], [124, 77, 170]]
    assert rng.integer(1000) == 942


def test_seeds_and_epochs_shuffle_independently() -> None:
    orders = [permutation(seed, epoch, 1000) for seed in range(5) for epoch in range(5)]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert (one == other).sum() < 12
    mean_displacement = np.abs(orders[0] - np.arange(1000)).mean()
    assert 300 < mean_displacement < 370


def test_draws_are_uniform_and_independent_between_neighbours() -> None:
    first = np.array([sample_rng(0, epoch, row).random() for epoch in range(20) for row in range(500)])
    assert abs(first.mean() - 0.5) < 0.01
    assert np.histogram(first, 10, (0, 1))[0].min() > 900
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.03


def test_draws_keep_to_their_range() -> None:
    rng = Draws(5)
    assert {rng.integer(3) for _ in range(200)} == {0, 1, 2}
    assert all(2 <= rng.uniform(2, 3) < 3 for _ in range(200))
    noise = rng.noise((100, 101, 3))
    assert noise.shape == (100, 101, 3)
    assert noise.dtype == np.uint8
    assert abs(noise.mean() - 127.5) < 2
