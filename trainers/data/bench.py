"""How fast this node reads a data set: each stage by itself, and what that makes of a run's epochs.

It reads a part of the data through the engine that training uses, with caches of its own that it removes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from launcher.spec import Augment
from trainers.data.decoded import Decoded, default_budget
from trainers.data.index import Index
from trainers.data.loader import Loader
from trainers.data.recipes import EvalRecipe, TrainRecipe, reduction
from trainers.data.source import Source, default_cache

PART_BYTES = 512 << 20
"""Of the data, so much is read at most."""


@dataclass(frozen=True)
class Rates:
    """What this node can do, in images a second, with all the threads that it was given.

    Attributes:
        images: how many were looked at.
        fetch: from where the data lies; its MB/s beside it.
        decode: from a file at hand to pixels.
        crop: from pixels at hand to batches.
        first_epoch, later_epochs: of a run on the whole data set.
        held: share of the data set whose pixels the store can keep.
        pixel_bytes: of an image, on average.
        limit: what holds up the first epoch and later ones.
    """

    images: int
    threads: int
    fetch: float
    megabytes: float
    decode: float
    crop: float
    first_epoch: float
    later_epochs: float
    held: float
    pixel_bytes: float
    unreadable: int
    limit: tuple[str, str]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def measure(
    index: Index, side: int, *, images: int, seconds: float, threads: int, batch_size: int = 64,
    tell: Callable[[str], None] = lambda _: None,
) -> Rates:  # fmt: skip
    """Reads up to `images` images of the index, and crops them for about `seconds`. Raises what `Source.read` raises.

    Args:
        side: of the images that a model sees, in pixels.
        tell: called with the name of each stage.
    """
    part = _part(index, images)
    recipe = Augment(crop_scale=(0.08, 1.0), flip=True)
    training, evaluation = TrainRecipe(recipe, side), EvalRecipe(side)
    rule = reduction(training, evaluation)
    count = part.table.num_rows
    with _folder() as folder:
        source = Source(part, folder)
        decoded = Decoded(source, rule, folder)
        loader = Loader(
            decoded, training=training, evaluation=evaluation, augment=recipe, seed=0, batch_size=batch_size,
            accumulate=1, rank=0, world=1, threads=threads, max_bad_fraction=1.0,
        )  # fmt: skip
        tell("fetching")
        fetched, size = _fetch(source, threads)
        tell("decoding")
        began = time.monotonic()
        for _ in loader.train(0):
            pass
        decoding = time.monotonic() - began
        seen = source.counts.take()
        kept = decoded.bytes_held() / max(seen["decoded"], 1)
        tell("cropping")
        began, cropped, epoch = time.monotonic(), 0, 1
        while time.monotonic() - began < seconds:
            cropped += sum(step.size for step in loader.train(epoch))
            epoch += 1
        cropping = time.monotonic() - began
        unreadable = len(decoded.bad)
        source.close()
        decode, crop = count / decoding, cropped / cropping
    held = min(default_budget(default_cache()) / max(kept * index.table.num_rows, 1), 1.0)
    later = 1 / (held / crop + (1 - held) / decode)
    first = min(fetched, decode)
    return Rates(
        images=count, threads=threads, fetch=fetched, megabytes=fetched * size / 1e6, decode=decode, crop=crop,
        first_epoch=first, later_epochs=later, held=held, pixel_bytes=kept, unreadable=unreadable,
        limit=("fetching" if fetched < decode else "decoding",
               "cropping" if held > 0.9 else "decoding what is not kept"),
    )  # fmt: skip


def training_rate(model_name: str, classes: int, side: int, batch_size: int, seconds: float) -> float:
    """Images a second that a model trains on, on the device that is here, if its data were always there."""
    import torch
    import torch.nn.functional as F

    from launcher.spec import Model
    from trainers.model import build

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build(Model(name=model_name), classes).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images = torch.randn(batch_size, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def step() -> None:
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            loss = F.cross_entropy(model(images).float(), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    wait()
    began, steps = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        step()
        wait()
        steps += 1
    return steps * batch_size / (time.monotonic() - began)


def _part(index: Index, images: int) -> Index:
    """Neighbours in the order of their keys, which is how shards are read, from the middle of the data."""
    table = index.table
    sizes = table["size"].to_numpy()
    count = min(images, len(table), max(int(PART_BYTES // max(sizes.mean(), 1)), 1))
    part = table.slice((len(table) - count) // 2, count)
    column = part.column_names.index("split")
    part = part.set_column(column, "split", pa.array(["train"] * count)).combine_chunks()
    return Index(index.uri, index.classes, part)


def _fetch(source: Source, threads: int) -> tuple[float, float]:
    """Files a second, and bytes of each."""
    groups = np.array_split(np.arange(source.index.table.num_rows), -(-source.index.table.num_rows // 64))
    began, size = time.monotonic(), 0
    pending: deque[Any] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="bench") as pool:
        for group in source.ahead(groups, lambda rows: rows):
            pending.append(pool.map(lambda row: len(source.read(row)), group.tolist()))
            if len(pending) > 2:
                size += sum(pending.popleft())
        size += sum(sum(sizes) for sizes in pending)
    count = source.index.table.num_rows
    return count / (time.monotonic() - began), size / count


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder beside the caches, on the disk that a run's would be on."""
    parent = default_cache()
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
