"""Batches of pixels for one rank: threads fetch, decode and augment some steps ahead of the training loop.

What a step holds is a pure function of the data, the seed, the epoch and the step, whatever the number of threads
and restarts. Nothing is moved to a device or normalised here.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image

from launcher.errors import BadImagesError, DataError
from trainers.data.augment import EvalTransform, Pixels, TrainTransform
from trainers.data.images import BadImage, decode
from trainers.data.index import Index
from trainers.data.listing import few
from trainers.data.order import Ints, permutation, sample_rng, share, step_samples, steps_per_epoch
from trainers.data.source import Source

CHUNK = 8
"""Images per task of a thread: few, so that all threads share a step; not one, for a task costs some 20 us."""
STEPS_AHEAD = 3

Reader = Callable[[int], tuple[int, Pixels] | None]


@dataclass
class Batch:
    """Images and labels of some samples, in host memory.

    Attributes:
        images: uint8 [b, 3, H, W], channels_last.
        targets: class ids, int64 [b].
        rows: rows of the index, int64 [b]; where an image was bad, the row of its replacement.
    """

    images: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor


@dataclass
class Step:
    """One step of training, as one rank sees it.

    Attributes:
        number: step in the epoch, from 0.
        size: samples of the global batch, over all ranks.
        parts: this rank's micro-batches, none of them empty.
    """

    number: int
    size: int
    parts: list[Batch]


class Loader:
    """Reads an index for one rank.

    Args:
        max_bad_fraction: share of the index's images that may be unreadable.

    Attributes:
        steps: steps of an epoch.
        bad: key and reason of each unreadable image met so far.
    """

    def __init__(
        self,
        index: Index,
        *,
        source: Source,
        train_transform: TrainTransform,
        eval_transform: EvalTransform,
        seed: int,
        batch_size: int,
        accumulate: int,
        rank: int,
        world: int,
        threads: int,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self._index = index
        self._source = source
        self._train_transform = train_transform
        self._eval_transform = eval_transform
        self._seed = seed
        self._accumulate = accumulate
        self._rank = rank
        self._world = world
        self._threads = threads
        self._max_bad = max_bad_fraction * index.table.num_rows
        self._train_rows = index.rows("train")
        self.steps = steps_per_epoch(len(self._train_rows), batch_size)
        self.bad: dict[str, str] = {}

    def train(self, epoch: int, first: int = 0) -> Iterator[Step]:
        """The steps of an epoch, from step `first` on.

        An unreadable image is replaced by the next readable one of the training split, in the order of the rows.

        Raises:
            DataError: too many images are unreadable, or an image changed or is gone.
        """

        def read(row: int) -> tuple[int, Pixels]:
            return self._train_image(epoch, row)

        order = permutation(self._seed, epoch, len(self._train_rows))
        batches = [step_samples(order, number, self.steps) for number in range(first, self.steps)]
        shares = (
            [self._train_rows[part] for part in share(batch, self._rank, self._world, self._accumulate) if len(part)]
            for batch in batches
        )
        with contextlib.closing(self._ahead(shares, self._train_transform.image_size, read)) as steps:
            for number, batch, parts in zip(range(first, self.steps), batches, steps, strict=True):
                yield Step(number, len(batch), parts)

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """This rank's images of a split, each once and in order; unreadable ones are left out. Raises as `train`."""
        rows = self._index.rows(split)[self._rank :: self._world]
        groups = ([rows[start : start + batch_size]] for start in range(0, len(rows), batch_size))
        with contextlib.closing(self._ahead(groups, self._eval_transform.image_size, self._eval_image)) as batches:
            for parts in batches:
                yield from parts

    def _ahead(self, groups: Iterator[list[Ints]], side: int, read: Reader) -> Generator[list[Batch], None, None]:
        """One list of batches for each list of rows, some lists ahead of the consumer."""
        pending: deque[list[_Filling]] = deque()
        tasks = 0
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="loader")
        try:
            for parts in groups:
                pending.append([_Filling(rows, side, read, pool) for rows in parts])
                tasks += sum(len(filling.tasks) for filling in pending[-1])
                # Small steps are too few tasks for many threads, so more of them are kept in flight.
                if len(pending) > STEPS_AHEAD and tasks > 2 * self._threads:
                    tasks -= sum(len(filling.tasks) for filling in pending[0])
                    yield self._batches(pending.popleft())
            while pending:
                yield self._batches(pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _batches(self, fillings: list[_Filling]) -> list[Batch]:
        full = [filling.result() for filling in fillings]
        return [
            Batch(
                torch.from_numpy(pixels).permute(0, 3, 1, 2),
                torch.from_numpy(self._index.targets[rows]),
                torch.from_numpy(rows),
            )
            for pixels, rows in full
            if len(rows)
        ]

    def _train_image(self, epoch: int, row: int) -> tuple[int, Pixels]:
        for candidate in self._candidates(row):
            # The generator is the first row's, so a replacement is not the twin of the image it repeats.
            rng = sample_rng(self._seed, epoch, row)
            pixels = self._pixels(candidate, partial(self._train_transform, rng=rng))
            if pixels is not None:
                return candidate, pixels
        raise DataError("no training image can be read", where=self._index.uri, hint="check one of them in a viewer")

    def _candidates(self, row: int) -> Iterator[int]:
        """The row, and after it the other rows of the training split, round in a circle."""
        yield row
        after = np.searchsorted(self._train_rows, row) + 1
        yield from np.roll(self._train_rows, -after)[:-1].tolist()

    def _eval_image(self, row: int) -> tuple[int, Pixels] | None:
        pixels = self._pixels(row, self._eval_transform)
        return None if pixels is None else (row, pixels)

    def _pixels(self, row: int, transform: Callable[[Image.Image], Pixels]) -> Pixels | None:
        if self.bad and self._index.key(row) in self.bad:
            return None
        try:
            image = decode(self._source.read(row))
        except BadImage as error:
            self.bad[self._index.key(row)] = str(error)
            if len(self.bad) > self._max_bad:
                raise too_many_bad(self._index, dict(self.bad)) from error
            return None
        return transform(image)


class _Filling:
    """The pixels of a batch that threads are filling, a few images each."""

    def __init__(self, rows: Ints, side: int, read: Reader, pool: ThreadPoolExecutor) -> None:
        self._rows = rows.copy()
        self._pixels = np.empty((len(rows), side, side, 3), np.uint8)
        self._kept = np.ones(len(rows), bool)
        self._read = read
        self.tasks: list[Future[None]] = [pool.submit(self._fill, start) for start in range(0, len(rows), CHUNK)]

    def _fill(self, start: int) -> None:
        for place in range(start, min(start + CHUNK, len(self._rows))):
            found = self._read(int(self._rows[place]))
            if found is None:
                self._kept[place] = False
            else:
                self._rows[place], self._pixels[place] = found

    def result(self) -> tuple[Pixels, Ints]:
        """Pixels [b, H, W, 3] and rows [b] of the readable images, once all are in. Raises what a thread raised."""
        for task in self.tasks:
            task.result()
        if self._kept.all():
            return self._pixels, self._rows
        return self._pixels[self._kept], self._rows[self._kept]


def too_many_bad(index: Index, bad: dict[str, str]) -> BadImagesError:
    """The error that ends a run with more unreadable images than it allows."""
    named = [f"{key} ({reason})" for key, reason in bad.items()]
    return BadImagesError(
        f"too many images cannot be read, {len(bad)} so far: {few(named, 3)}", where=index.uri,
        hint="data_report.json in the run directory names all; mend them, or raise data.max_bad_fraction",
    )  # fmt: skip


def scan(index: Index, source: Source, threads: int) -> dict[str, str]:
    """Decodes every image of the index: key and reason of each that cannot be read, in the order of the rows."""

    def check(start: int) -> dict[str, str]:
        found = {}
        for row in range(start, min(start + 64, index.table.num_rows)):
            try:
                decode(source.read(row))
            except BadImage as error:
                found[index.key(row)] = str(error)
        return found

    bad: dict[str, str] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="scan") as pool:
        for found in pool.map(check, range(0, index.table.num_rows, 64)):
            bad.update(found)
    return bad
