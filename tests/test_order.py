"""The order of samples: each exactly once an epoch, whatever the workers, and the same for ever."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainers.data.order import Draws, epoch_draws, permutation, sample_rng, share, step_samples, steps_per_epoch

sizes = st.integers(1, 300)
FROZEN_WEIGHTED = [5, 7, 2, 12, 9, 1, 14, 8, 22, 4]
FROZEN_CHUNKED = [9, 0, 1, 8, 2, 3, 7, 6, 5, 4]


@given(n=sizes, batch=st.integers(1, 64), world=st.integers(1, 9), parts=st.integers(1, 4), epoch=st.integers(0, 50))
def test_an_epoch_uses_each_sample_once_over_steps_ranks_and_parts(
    n: int, batch: int, world: int, parts: int, epoch: int
) -> None:
    order, steps = epoch_draws(7, epoch, n), steps_per_epoch(n, batch)
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


def test_weighted_and_chunked_orders_are_frozen() -> None:
    weights = np.array([1, 1, 5, 1, 2, 1, 1, 1, 1, 1.0])
    assert epoch_draws(0, 0, 10).tolist() == permutation(0, 0, 10).tolist()
    assert epoch_draws(0, 0, 10, weights).tolist() == FROZEN_WEIGHTED
    assert epoch_draws(0, 0, 10, chunks=np.arange(10) // 3).tolist() == FROZEN_CHUNKED


# -- weights


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=200), epoch=st.integers(0, 20))
def test_each_sample_is_drawn_by_its_weight_rounded_up_or_down(weights: list[float], epoch: int) -> None:
    n, given_weights = len(weights), np.array(weights)
    draws = epoch_draws(3, epoch, n, given_weights)
    counts = np.bincount(draws % n, minlength=n)
    assert counts.sum() == n
    assert len(set(draws.tolist())) == n  # so each copy is augmented in its own way
    fair = given_weights / given_weights.sum() * n
    assert (np.abs(counts - fair) < 1 + 1e-4).all()


def test_over_epochs_weights_are_kept_and_the_chosen_change() -> None:
    targets = np.repeat([0, 1, 2], [900, 90, 10])
    weights = 1 / np.bincount(targets)[targets]
    drawn = np.zeros((30, 1000), int)
    for epoch in range(30):
        drawn[epoch] = np.bincount(epoch_draws(0, epoch, 1000, weights) % 1000, minlength=1000)
    by_class = np.array([np.bincount(targets, epoch) for epoch in drawn])
    assert np.abs(by_class - 1000 / 3).max() < 12
    assert np.abs(by_class.mean(0) - 1000 / 3).max() < 3
    # Of the 900 a third is drawn in each epoch: after many epochs nearly all were, and about as often.
    assert (drawn[:, :900].sum(0) > 0).mean() > 0.99
    assert np.corrcoef(drawn[0, :900], drawn[1, :900])[0, 1] < 0.15


# -- parts


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), epoch=st.integers(0, 5))
def test_a_chunked_epoch_draws_each_sample_once(sizes: list[int], epoch: int) -> None:
    chunks = np.repeat(np.arange(len(sizes)), sizes)
    assert sorted(epoch_draws(1, epoch, len(chunks), chunks=chunks).tolist()) == list(range(len(chunks)))


def test_a_chunked_epoch_reads_few_parts_at_a_time_and_mixes_what_is_near() -> None:
    parts, each = 400, 50
    chunks = np.repeat(np.arange(parts), each)
    classes = np.repeat(np.arange(10), parts * each // 10)  # the worst that data can be: sorted by class
    draws = epoch_draws(0, 0, len(chunks), chunks=chunks)
    spans = [np.ptp(np.flatnonzero(chunks[draws] == part)) for part in range(parts)]
    assert max(spans) <= 33 * each + each
    # The parts that the first batch needs, and how many classes are in a batch, of the 10 that a full shuffle gives.
    assert len(set(chunks[draws[:64]].tolist())) <= 12
    found = np.mean([len(set(classes[draws[at : at + 64]].tolist())) for at in range(0, len(draws) - 64, 64)])
    assert found > 9
    assert not np.array_equal(draws, epoch_draws(0, 1, len(chunks), chunks=chunks))


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
