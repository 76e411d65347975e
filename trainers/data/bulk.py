"""Many reads at once whose results come in order, within a bound of memory: for work that touches every image once."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from trainers.data.images import BadImage, pixels
from trainers.data.source import Source

THREADS = 48
"""Reads at once: small objects of S3 come one in tens of milliseconds."""
AHEAD = 64 << 20
"""Bytes that are read and not yet handed out, of more than one read."""
DECODERS = threading.Semaphore(min(os.cpu_count() or 1, 8))
"""To be held while decoding: decoded images are large, and more at once than cores gain nothing."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    items: Iterable[Item], size: Callable[[Item], int], work: Callable[[Item], Result]
) -> Generator[tuple[Item, Result], None, None]:
    """Each item with what `work` makes of it, in threads; sizes are in bytes. Close it. Raises what `work` does."""
    waiting: deque[tuple[Item, int, Future[Result]]] = deque()
    inside = 0
    with ThreadPoolExecutor(THREADS, thread_name_prefix="bulk") as pool:
        try:
            for item in items:
                more = size(item)
                while waiting and (inside + more > AHEAD or len(waiting) >= 4 * THREADS):
                    first, freed, result = waiting.popleft()
                    inside -= freed
                    yield first, result.result()
                waiting.append((item, more, pool.submit(work, item)))
                inside += more
            while waiting:
                first, _, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, _, result in waiting:
                result.cancel()


def why_unreadable(data: bytes | memoryview) -> str:
    """Why an image cannot be read; nothing if it can."""
    try:
        with DECODERS:
            pixels(data)
    except BadImage as error:
        return str(error)
    return ""


def read_each(
    source: Source, rows: Iterable[int], use: Callable[[bytes | memoryview], Result]
) -> Generator[tuple[int, Result], None, None]:
    """Each row of the source's index with what `use` makes of its file, as `in_order` does."""
    sizes = source.index.table["size"].to_numpy()
    return in_order(rows, lambda row: int(sizes[row]), lambda row: use(source.read(row)))
