"""Batches of pixels for one rank: threads fetch, decode and crop some steps ahead of the training loop.

What a step holds is a pure function of the data, the seed, the epoch and the step, whatever the number of threads
and restarts. Nothing is moved to a device, changed in colour or normalised here.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from launcher.errors import BadImagesError, DataError
from launcher.spec import Augment
from trainers.data.bulk import read_each, why_unreadable
from trainers.data.crops import sample_states
from trainers.data.decoded import Decoded, Taken
from trainers.data.images import Pixels
from trainers.data.index import Index
from trainers.data.listing import few
from trainers.data.order import Ints, epoch_draws, share, step_samples, steps_per_epoch
from trainers.data.policy import Changes
from trainers.data.recipes import EvalRecipe, TrainRecipe
from trainers.data.source import Source
from trainers.data.spaces import Spaces

SLOW, QUICK = 8, 32
"""Images per task of a thread that decodes and of one that finds them decoded: few, so that all threads share a step;
not one, for a task costs some 50 us."""
STEPS_AHEAD = 3
BATCHES_KEPT = 1 << 29
"""Bytes of memory for batches that are kept for later ones."""

Fill = Callable[[Ints, Ints, Pixels], None]


@dataclass
class Batch:
    """Images and labels of some samples, in host memory.

    Attributes:
        images: uint8 [b, 3, H, W], channels_last.
        targets: class ids, int64 [b].
        rows: rows of the index, int64 [b]; where an image was bad, the row of its replacement.
        changes: what is still to be done to the images, on the device.
    """

    images: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    changes: Changes | None = None


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
        decoded: the index's images.
        augment: the changes after the crop, of which the loader only draws what is to be done.
        sampling: how often training images are drawn: `uniform`, `balanced` or `weighted`; see `Index.weights`.
        pinned: whether images lie in memory that a GPU copies from without help of the host.
        max_bad_fraction: share of the index's images that may be unreadable.

    Attributes:
        steps: steps of an epoch.
        counts: what was read, decoded and cropped so far.
    """

    def __init__(
        self,
        decoded: Decoded,
        *,
        training: TrainRecipe,
        evaluation: EvalRecipe,
        augment: Augment,
        seed: int,
        batch_size: int,
        accumulate: int,
        rank: int,
        world: int,
        threads: int,
        sampling: str = "uniform",
        pinned: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self._decoded = decoded
        self._index = index = decoded.source.index
        self._training, self._evaluation, self._augment = training, evaluation, augment
        self._seed = seed
        self._accumulate = accumulate
        self._rank = rank
        self._world = world
        self._threads = threads
        self._pinned = pinned
        self._spaces = Spaces(BATCHES_KEPT)
        self._max_bad = max_bad_fraction * index.table.num_rows
        self._train_rows = index.rows("train")
        self._weights = index.weights(sampling, self._train_rows)
        self.counts = decoded.counts
        self.steps = steps_per_epoch(len(self._train_rows), batch_size)

    @property
    def bad(self) -> dict[str, str]:
        """Key and reason of each unreadable image met so far."""
        return {self._index.key(row): reason for row, reason in list(self._decoded.bad.items())}

    def train(self, epoch: int, first: int = 0) -> Iterator[Step]:
        """The steps of an epoch, from step `first` on.

        The first epoch reads objects that hold many images one after the other; later ones are shuffled as a whole. An
        unreadable image is replaced by the next readable one of the training split, in the order of the rows.

        Raises:
            DataError: too many images are unreadable, or an image changed or is gone.
        """
        trained, n = self._train_rows, len(self._train_rows)
        chunks = self._decoded.source.chunks if epoch == 0 else None
        draws = epoch_draws(self._seed, epoch, n, self._weights, None if chunks is None else chunks[trained])
        batches = [step_samples(draws, number, self.steps) for number in range(first, self.steps)]
        # A sample's chance hangs on its row, and on which of its copies it is.
        shares = (
            [
                (trained[part % n], trained[part % n] + part // n * self._index.table.num_rows)
                for part in share(batch, self._rank, self._world, self._accumulate)
                if len(part)
            ]
            for batch in batches
        )

        def fill(rows: Ints, numbers: Ints, out: Pixels) -> None:
            taken = self._take(rows)
            for place in np.flatnonzero(taken.addresses == 0).tolist():
                self._replace(taken, place, rows)
            states = sample_states(self._seed, epoch, numbers)
            self._crop(lambda: self._training.fill(taken.addresses, taken.shapes, states, out), len(rows))

        def change(numbers: Ints) -> Changes | None:
            return Changes.draw(self._augment, self._training.side, self._seed, epoch, numbers)

        with contextlib.closing(self._ahead(shares, self._training.side, fill, change)) as steps:
            for number, batch, parts in zip(range(first, self.steps), batches, steps, strict=True):
                yield Step(number, len(batch), parts)

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """This rank's images of a split, each once and in order; unreadable ones are left out. Raises as `train`."""

        def fill(rows: Ints, _numbers: Ints, out: Pixels) -> None:
            taken = self._take(rows)
            self._crop(lambda: self._evaluation.fill(taken.addresses, taken.shapes, out), len(rows))
            rows[taken.addresses == 0] = -1

        rows = self._index.rows(split)[self._rank :: self._world]
        parts = (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
        groups = ([(part, part)] for part in parts)
        with contextlib.closing(self._ahead(groups, self._evaluation.side, fill, lambda _: None)) as batches:
            for group in batches:
                yield from group

    def _ahead(
        self,
        groups: Iterable[list[tuple[Ints, Ints]]],
        side: int,
        fill: Fill,
        change: Callable[[Ints], Changes | None],
    ) -> Generator[list[Batch], None, None]:
        """One list of batches for each list of rows and their numbers, some lists ahead of the consumer."""
        pending: deque[list[_Filling]] = deque()
        tasks = 0
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="loader")
        sent = self._decoded.source.ahead(groups, self._absent)
        try:
            for parts in sent:
                pending.append([self._filling(rows, numbers, side, fill, change, pool) for rows, numbers in parts])
                tasks += sum(len(filling.tasks) for filling in pending[-1])
                # Small steps are too few tasks for many threads, so more of them are kept in flight.
                if len(pending) > STEPS_AHEAD and tasks > 2 * self._threads:
                    tasks -= sum(len(filling.tasks) for filling in pending[0])
                    yield self._batches(pending.popleft())
            while pending:
                yield self._batches(pending.popleft())
        finally:
            sent.close()  # first, for threads wait for what it has sent for
            pool.shutdown(wait=True, cancel_futures=True)

    def _absent(self, parts: list[tuple[Ints, Ints]]) -> Ints:
        self._decoded.refresh()
        return np.concatenate([np.empty(0, np.int64), *(self._decoded.absent(rows) for rows, _ in parts)])

    def _filling(
        self, rows: Ints, numbers: Ints, side: int, fill: Fill, change: Callable[[Ints], Changes | None],
        pool: ThreadPoolExecutor,
    ) -> _Filling:  # fmt: skip
        size = SLOW if len(self._decoded.absent(rows)) else QUICK
        images = self._space(len(rows), side)
        rows, out = rows.copy(), images.numpy()
        tasks = [
            pool.submit(fill, rows[at : at + size], numbers[at : at + size], out[at : at + size])
            for at in range(0, len(rows), size)
        ]
        return _Filling(rows, images, tasks, pool.submit(change, numbers))

    def _space(self, count: int, side: int) -> torch.Tensor:
        """Memory for some images, uint8 [count, side, side, 3]."""
        if self._pinned:
            return torch.empty((count, side, side, 3), dtype=torch.uint8, pin_memory=True)  # torch keeps it for others
        return torch.from_numpy(self._spaces.lend(count, side, side, 3))

    def _batches(self, fillings: list[_Filling]) -> list[Batch]:
        batches = []
        for filling in fillings:
            for task in filling.tasks:
                task.result()
            rows, images = filling.rows, filling.images
            if (rows < 0).any():
                images, rows = images[torch.from_numpy(rows >= 0)], rows[rows >= 0]
            if len(rows):
                targets = torch.from_numpy(self._index.targets[rows])
                batches.append(
                    Batch(images.permute(0, 3, 1, 2), targets, torch.from_numpy(rows), filling.changes.result())
                )
        return batches

    def _take(self, rows: Ints) -> Taken:
        taken = self._decoded.take(rows)
        if len(self._decoded.bad) > self._max_bad:
            raise too_many_bad(self._index, self.bad)
        return taken

    def _replace(self, taken: Taken, place: int, rows: Ints) -> None:
        """Puts the next readable training image, round in a circle, where one cannot be read.

        Its chance stays that of the image it stands for, so it is not the twin of the image it repeats.
        """
        after = np.searchsorted(self._train_rows, rows[place]) + 1
        for candidate in np.roll(self._train_rows, -after)[:-1]:
            other = self._take(np.array([candidate]))
            if other.addresses[0]:
                taken.addresses[place], taken.shapes[place] = other.addresses[0], other.shapes[0]
                taken.decoded += other.decoded
                rows[place] = candidate
                return
        raise DataError("no training image can be read", where=self._index.uri, hint="check one of them in a viewer")

    def _crop(self, crop: Callable[[], None], images: int) -> None:
        began = time.thread_time()
        crop()
        self.counts.add(images=images, crop_seconds=time.thread_time() - began)


@dataclass
class _Filling:
    """A batch that threads are filling: row -1 is left for an image that cannot be read and has no replacement."""

    rows: Ints
    images: torch.Tensor
    tasks: list[Future[None]]
    changes: Future[Changes | None]


def too_many_bad(index: Index, bad: dict[str, str]) -> BadImagesError:
    """The error that ends a run with more unreadable images than it allows."""
    named = [f"{key} ({reason})" for key, reason in bad.items()]
    return BadImagesError(
        f"too many images cannot be read, {len(bad)} so far: {few(named, 3)}", where=index.uri,
        hint="data_report.json in the run directory names all; mend them, or raise data.max_bad_fraction",
    )  # fmt: skip


def scan(source: Source) -> dict[str, str]:
    """Decodes every image of the index: key and reason of each that cannot be read, in the order of the rows."""
    with contextlib.closing(read_each(source, range(source.index.table.num_rows), why_unreadable)) as judged:
        return {source.index.key(row): why for row, why in judged if why}
