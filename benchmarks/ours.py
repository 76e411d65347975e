"""The data engine as it is measured: a process that takes turns, see `turns.py`.

    python benchmarks/ours.py WHAT FOLDER [URI]

WHAT is `pixels` (epochs from the store of pixels), `jpeg` (there is no room for pixels), `crops` (the crop-resize
kernel alone, on pixels in memory), `decoding` (simplejpeg alone, on files in memory), or `RANK/WORLD`: one epoch of
that rank with an evaluation, as in a run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import simplejpeg

from benchmarks.turns import BATCH, SIDE, WORKERS, take_turns
from launcher.spec import Augment, Data
from trainers.data.crops import sample_states
from trainers.data.decoded import Decoded
from trainers.data.images import pixels
from trainers.data.index import build_index
from trainers.data.loader import Loader
from trainers.data.recipes import EvalRecipe, TrainRecipe, reduction
from trainers.data.source import Source

AUGMENT = Augment(crop_scale=(0.08, 1.0), flip=True)
ROOM = 8 << 30
HELD_OUT = 0.001
"""Of each class at least one image: as few as can be."""


def loader(folder: Path, uri: str, rank: int = 0, world: int = 1, room: int = ROOM) -> Loader:
    """What a worker of a run reads with, its caches in `folder`."""
    training, evaluation = TrainRecipe(AUGMENT, SIDE), EvalRecipe(SIDE)
    source = Source(build_index(Data(uri=uri, val_fraction=HELD_OUT)), folder, ROOM)
    return Loader(
        Decoded(source, reduction(training, evaluation), folder, room),
        training=training, evaluation=evaluation, augment=AUGMENT, seed=0, batch_size=BATCH * world, accumulate=1,
        rank=rank, world=world, threads=WORKERS,
    )  # fmt: skip


def epochs(found: Loader, evaluate: bool = False) -> Callable[[], int]:
    """Another epoch of training each time; the number of its images."""
    numbers = count()

    def epoch() -> int:
        images = sum(len(part.rows) for step in found.train(next(numbers)) for part in step.parts)
        if evaluate:
            images += sum(len(batch.rows) for batch in found.evaluate("val", BATCH))
        return images

    return epoch


def crops(uri: str) -> Callable[[], int]:
    """The kernel on pixels in memory, the crops of an epoch, in batches, by as many threads."""
    images = [pixels(path.read_bytes()) for path in sorted(Path(uri).glob("*/*.jpg"))]
    addresses = np.array([image.ctypes.data for image in images], np.uint64)
    shapes = np.array([image.shape[:2] for image in images], np.int32)
    recipe, numbers = TrainRecipe(AUGMENT, SIDE), count()
    spaces = [np.empty((BATCH, SIDE, SIDE, 3), np.uint8) for _ in range(WORKERS)]

    def epoch() -> int:
        states = sample_states(0, next(numbers), np.arange(len(images)))
        order = np.random.default_rng(0).permutation(len(images))
        batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]

        def work(first: int) -> int:
            for rows in batches[first::WORKERS]:
                recipe.fill(addresses[rows], shapes[rows], states[rows], spaces[first][: len(rows)])
            return sum(map(len, batches[first::WORKERS]))

        with ThreadPoolExecutor(WORKERS) as pool:
            return sum(pool.map(work, range(WORKERS)))

    return epoch


def decoding(uri: str) -> Callable[[], int]:
    """simplejpeg alone on files in memory, by as many threads."""
    files = [path.read_bytes() for path in sorted(Path(uri).glob("*/*.jpg"))]

    def work(first: int) -> int:
        for data in files[first::WORKERS]:
            simplejpeg.decode_jpeg(data, "RGB")
        return len(files[first::WORKERS])

    def epoch() -> int:
        with ThreadPoolExecutor(WORKERS) as pool:
            return sum(pool.map(work, range(WORKERS)))

    return epoch


def main(what: str, folder: Path, uri: str) -> None:
    """Takes turns until its input ends."""
    if what == "crops":
        take_turns(crops(uri))
    elif what == "decoding":
        take_turns(decoding(uri))
    elif "/" in what:
        rank, world = map(int, what.split("/"))
        take_turns(epochs(loader(folder, uri, rank, world), evaluate=True))
    else:
        take_turns(epochs(loader(folder, uri, room=0 if what == "jpeg" else ROOM)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
