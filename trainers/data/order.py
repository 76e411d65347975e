"""How many samples are held out, and which each step, rank and micro-batch sees: pure functions of seed and step.

It holds whatever the number of workers, and on every version of numpy, so a resumed run goes on exactly where it
stopped: all chance comes from splitmix64 (Steele et al. 2014). There is no state here but the counter of a `Draws`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def val_count(images: int, fraction: float) -> int:
    """How many of a class's images are held out: at least one, and never all."""
    return min(max(round(fraction * images), 1), images - 1)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Steps in which each of the samples is used once."""
    return -(-samples // batch_size)


def permutation(seed: int, epoch: int, n: int) -> Ints:
    """The order of an epoch: 0..n-1 shuffled, int64 [n]."""
    return np.argsort(_words(_mixed(seed, epoch), n), kind="stable").astype(np.int64)


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


def sample_rng(seed: int, epoch: int, row: int) -> Draws:
    """The generator that augments one sample in one epoch."""
    return Draws(_mixed(_mixed(seed, epoch), row))


def _words(state: int, n: int) -> npt.NDArray[np.uint64]:
    """The next n outputs of the generator in `state`."""
    x = np.uint64(state) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _finalise(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mixed(a: int, b: int) -> int:
    return _finalise((_finalise((a + _GOLDEN) & _MASK) + b * 0xD1342543DE82EF95) & _MASK)
