"""How many samples are held out, and which each step, rank and micro-batch sees: pure functions of seed and step.

It holds whatever the number of workers, and on every version of numpy, so a resumed run goes on exactly where it
stopped: all chance comes from splitmix64 (Steele et al. 2014). There is no state here but the counter of a `Draws`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]

WINDOW = 32
"""Parts of the data among which an epoch that reads it part by part is shuffled."""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_PARTS, _COPIES = 1 << 40, 1 << 41
"""Added to a seed, which is below 2**32, for draws that are independent of those of the seed itself."""


def val_count(images: int, fraction: float) -> int:
    """How many of a class's images are held out: at least one, and never all."""
    return min(max(round(fraction * images), 1), images - 1)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Steps in which each of the samples is used once."""
    return -(-samples // batch_size)


def permutation(seed: int, epoch: int, n: int) -> Ints:
    """0..n-1 shuffled, int64 [n]."""
    return np.argsort(_words(_mixed(seed, epoch), n), kind="stable").astype(np.int64)


def epoch_draws(seed: int, epoch: int, n: int, weights: Floats | None = None, chunks: Ints | None = None) -> Ints:
    """What an epoch draws, in order: `sample + n * copy`, int64 [n]; without weights each sample once.

    Args:
        weights: how often each sample is to be drawn, in proportion; positive, float64 [n].
        chunks: number of the part of the data that holds each sample, int64 [n]. With them, samples of a part come
            near each other, so that an epoch reads few parts at a time; see `WINDOW`.
    """
    draws = np.arange(n, dtype=np.int64)
    if weights is not None:
        copies = _copies(seed, epoch, weights)
        sample = np.repeat(draws, copies)
        draws = sample + n * (np.arange(n) - (np.cumsum(copies) - copies)[sample])
    if chunks is None:
        return draws[permutation(seed, epoch, n)]
    # Parts in random order, then each sample moved back by a random part of the window.
    part = chunks[draws % n]
    turn = np.argsort(permutation(seed ^ _PARTS, epoch, int(chunks.max()) + 1))
    sequential = draws[np.argsort(turn[part], kind="stable")]
    window = min(WINDOW * n / len(np.unique(part)), n)
    moved = np.arange(n) + window * uniform(_words(_mixed(seed, epoch), n))
    return sequential[np.argsort(moved, kind="stable")]


def _copies(seed: int, epoch: int, weights: Floats) -> Ints:
    """How often each sample is drawn, n in all: the share of its weight, rounded up or down.

    Systematic resampling (Kitagawa 1996), whose counts vary least, over samples in an order that each epoch shuffles.
    """
    n = len(weights)
    order = permutation(seed ^ _COPIES, epoch, n)
    # Whole numbers add up to the same sum on every machine.
    whole = np.cumsum(np.ceil(weights[order] / weights.max() * 2.0**30).astype(np.int64))
    edges = whole / whole[-1] * n
    counts = np.diff(np.floor(edges + Draws(_mixed(seed ^ _COPIES, epoch)).random()), prepend=0)
    copies = np.empty(n, np.int64)
    copies[order] = counts
    return copies


def step_samples(order: Ints, step: int, steps: int) -> Ints:
    """The global batch of a step: the epoch's order cut in `steps` pieces whose sizes differ by one at most.

    There is no small last batch, which would upset batch norm.
    """
    size, longer = divmod(len(order), steps)
    first = step * size + min(step, longer)
    return order[first : first + size + (step < longer)]


def share(batch: Ints, rank: int, world: int, parts: int) -> list[Ints]:
    """A rank's part of a global batch, in `parts` micro-batches; over all ranks they are the batch, in order.

    With fewer samples than `world * parts` some micro-batches are empty.
    """
    return np.array_split(np.array_split(batch, world)[rank], parts)


class Draws:
    """A small random generator that is cheap to make: one is made for each image of each epoch."""

    __slots__ = ("_state",)

    def __init__(self, state: int) -> None:
        self._state = state

    def random(self) -> float:
        """Uniform in [0, 1)."""
        self._state = (self._state + _GOLDEN) & _MASK
        return (_finalise(self._state) >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * self.random()

    def integer(self, n: int) -> int:
        """Uniform in 0..n-1."""
        return int(self.random() * n)

    def noise(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Uniform bytes."""
        count = int(np.prod(shape))
        words = -(-count // 8)
        values = _words(self._state, words).astype("<u8").view(np.uint8)
        self._state = (self._state + words * _GOLDEN) & _MASK
        return values[:count].reshape(shape)


def sample_rng(seed: int, epoch: int, draw: int) -> Draws:
    """The generator that augments one sample in one epoch; a sample that is drawn twice has two."""
    return Draws(_mixed(_mixed(seed, epoch), draw))


def outputs(states: Words, steps: Words) -> Words:
    """What generators in these states give after so many steps, counted from 1; broadcast, uint64."""
    x = states + steps * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = x ^ (x >> np.uint64(31))
    return mixed


def uniform(words: Words) -> Floats:
    """Outputs as numbers in [0, 1), as `Draws.random` gives them."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _words(state: int, n: int) -> Words:
    """The next n outputs of the generator in `state`."""
    return outputs(np.array(state, np.uint64), np.arange(1, n + 1, dtype=np.uint64))


def _finalise(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mixed(a: int, b: int) -> int:
    return _finalise((_finalise((a + _GOLDEN) & _MASK) + b * 0xD1342543DE82EF95) & _MASK)
