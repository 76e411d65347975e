"""Image files by row of the index. What lies on S3 is fetched once per node, ahead of its use, and kept in its cache.

So is what lies in Parquet files, wherever they are, for of these only row groups can be read.

All workers, trials and restarts on a node share the cache, in which a file is named by its address and ETag: nothing
stale is ever served. Where it cannot be kept, for want of room or a disk, it is fetched again when it is needed again.
Nothing is decoded here.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from launcher.errors import DataError
from launcher.storage import Store, cache_folder, open_store
from trainers.data.cache import Cache, room
from trainers.data.counts import Counts
from trainers.data.fetch import Bucket
from trainers.data.index import Index, Place
from trainers.data.parquet import Groups, group_of
from trainers.data.views import Rows, View

REQUESTS = 48
"""Requests to S3 at once: at 50 ms each, a thousand small images a second."""
LOOKAHEAD = 64 << 20
"""Bytes of files that are on their way, or have come and wait for their use without having been kept."""
IN_FLIGHT = 48 << 20
"""Bytes that are asked for and not yet there: of large parts fewer are on their way at once."""
CHUNK = 4 << 20
"""Of an object that holds many images, about so many bytes are fetched at once."""
MOST_AHEAD = 1024
"""Groups that wait in `Source.ahead`."""

Data = bytes | memoryview
Flags = npt.NDArray[np.bool_]
Group = TypeVar("Group")


class Source:
    """The files of an index's images. Thread safe, and safe beside other processes with the same cache.

    Args:
        index: what to read.
        folder: of the cache; `default_cache()` if None.
        budget: bytes that the cache may take on the disk, for all who use it; half of the disk if None.

    Attributes:
        counts: where what was fetched, and what was at hand, is counted.
    """

    def __init__(self, index: Index, folder: Path | None = None, budget: int | None = None) -> None:
        self.index = index
        self.counts = Counts()
        self._parquet = _parquet(index)
        # In a Parquet file, wherever it is, an image costs the reading of its whole row group.
        self._cached = index.remote | self._parquet
        self._view: View | None = None
        if self._cached.any():
            folder = (folder or default_cache()) / "files"
            self._cache = Cache(folder, room(folder) // 2 if budget is None else budget)
            self._view = View(self._cache, index.ids)
        self._stores: dict[str, Store] = {}
        self._buckets: dict[str, Bucket] = {}
        self._groups: dict[str, Groups] = {}
        self._flights: dict[int, Future[dict[int, Data]]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._gate = _Gate(IN_FLIGHT)

    def read(self, row: int) -> Data:
        """The file of a row, as it was when the index was built.

        Raises:
            DataError: it changed, or it is gone.
            SiteError: credentials or permissions do not suffice.
            InfrastructureError: S3 does not answer.
        """
        if self._view is None or not self._cached[row]:
            return self._local(row)
        flight = self._flights.pop(row, None)
        came = {} if flight is None else flight.result()
        if row in came:
            return came[row]
        held: Data | None = self._view.get(row)
        if held is not None:
            self.counts.add(files_held=flight is None)
            return held
        for piece in self._pieces([row]):
            came |= self._fetch(piece)
        held = came[row] if row in came else self._view.get(row)
        # What was kept and is damaged already is fetched without the cache.
        return self._get(np.array([row]))[row] if held is None else held

    def ahead(self, groups: Iterable[Group], rows: Callable[[Group], Rows]) -> Generator[Group, None, None]:
        """The groups, in order, each once the files of those after it are on their way. For one caller at a time.

        What is on its way when the last group is drawn comes for those who read it. Closed before that, it ends.

        Args:
            groups: whatever the caller reads together.
            rows: the rows whose files a group needs, int64 [n]; called when the group is drawn.
        """
        self._forget()
        waiting: deque[tuple[Group, int]] = deque()
        total = 0
        try:
            for group in groups:
                size = self._start(rows(group))
                waiting.append((group, size))
                total += size
                while waiting and (total >= LOOKAHEAD or not total or len(waiting) > MOST_AHEAD):
                    group, size = waiting.popleft()
                    total -= size
                    yield group
            while waiting:
                yield waiting.popleft()[0]
        except BaseException:
            self._forget()
            raise

    def close(self) -> None:
        """Ends what is on its way."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    @cached_property
    def chunks(self) -> Rows | None:
        """As `chunks_of(index)`."""
        return chunks_of(self.index)

    # -- what is on its way

    def _forget(self) -> None:
        """Ends what nobody has asked for yet."""
        for flight in list(self._flights.values()):
            flight.cancel()
        self._flights.clear()

    def _start(self, rows: Rows) -> int:
        """Sends for the files of these rows that are not at hand; returns their bytes."""
        if self._view is None:
            return 0
        rows = rows[self._cached[rows]]
        if len(rows):
            self._view.refresh()
            rows = rows[~self._view.held(rows)]
        missing = [row for row in rows.tolist() if row not in self._flights]
        if not missing:
            return 0
        if self._pool is None:
            self._pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="fetch")
        sizes = self._sizes
        total = 0
        for piece in self._pieces(missing):
            flight = self._pool.submit(self._fetch, piece)
            for row in piece.tolist():
                self._flights.setdefault(row, flight)
            total += int(sizes[piece].sum())
        return total

    def _pieces(self, missing: list[int]) -> Iterator[Rows]:
        """The rows to fetch by one request each, so that all that are missing come.

        Images that share an object come with their neighbours, as long as these can be kept and most are missing; in a
        Parquet file they always do.
        """
        assert self._view is not None
        wanted = np.unique(np.array(missing))
        alone = wanted if self.chunks is None else wanted[~self._parquet[wanted] & (not self._cache.keeping)]
        yield from alone[:, None]
        if self.chunks is None:
            return
        wanted = np.setdiff1d(wanted, alone)
        for number in np.unique(self.chunks[wanted]).tolist():
            first, last = np.searchsorted(self._by_chunk[1], [number, number + 1])
            rows = self._by_chunk[0][first:last]
            absent = rows[~self._view.held(rows)]
            if len(absent) and (self._parquet[rows[0]] or 2 * len(absent) > len(rows)):
                yield absent
            else:
                yield from absent[np.isin(absent, wanted)][:, None]

    @cached_property
    def _by_chunk(self) -> tuple[Rows, Rows]:
        """The rows in the order of their chunks, and these chunks."""
        assert self.chunks is not None
        order = np.argsort(self.chunks, kind="stable")
        return order, self.chunks[order]

    @cached_property
    def _sizes(self) -> Rows:
        sizes: Rows = self.index.table["size"].to_numpy()
        return sizes

    def _fetch(self, rows: Rows) -> dict[int, Data]:
        """Gets the files of some rows of one chunk, unless they are here; returns at least those that are not kept."""
        assert self._view is not None
        if not self._cache.keeping:
            return self._get(rows)
        first = rows[0]
        if len(rows) > 1 and self.chunks is not None:
            first = self._by_chunk[0][np.searchsorted(self._by_chunk[1], self.chunks[first])]
        with self._view.claim(int(first)):
            self._view.refresh()
            rows = rows[~self._view.held(rows)]
            if not len(rows):
                return {}
            came = self._get(rows)
            kept = self._view.put(list(came), list(came.values()))
        # What is kept would only take memory until it is used.
        return {row: came[row] for row, held in zip(list(came), kept.tolist(), strict=True) if not held}

    def _get(self, rows: Rows) -> dict[int, Data]:
        """The files of some rows of one chunk, by one request."""
        places = {row: self.index.place(row) for row in rows.tolist()}
        place = min(places.values(), key=lambda place: place.offset)
        if self._parquet[rows[0]]:
            groups, number = self._file(place), group_of(place.offset)[0]
            files = groups.images(number, self._span(place, *groups.span(number)))
            return {row: files[group_of(place.offset)[1]] for row, place in places.items()}
        start = place.offset
        data = self._span(place, start, max(place.offset + place.size for place in places.values()))
        return {row: data[place.offset - start : place.offset - start + place.size] for row, place in places.items()}

    def _file(self, place: Place) -> Groups:
        where = f"{place.uri}/{place.key}"
        return self._groups.get(where) or self._groups.setdefault(
            where, Groups(self._store(place.uri), place.key, place.etag)
        )

    def _span(self, place: Place, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of an object."""
        where = f"{place.uri}/{place.key}"
        try:
            if not place.uri.startswith("s3://"):
                return memoryview(self._store(place.uri).read(place.key, place.etag or None, (start, stop)))
            name, _, prefix = place.uri.removeprefix("s3://").partition("/")
            bucket = self._buckets.get(name) or self._buckets.setdefault(name, Bucket(name, self.counts))
            with self._gate.of(stop - start):
                return bucket.get(f"{prefix}/{place.key}" if prefix else place.key, place.etag, stop - start, start)
        except FileNotFoundError as error:
            raise _gone(where) from error

    # -- what is here

    def _local(self, row: int) -> bytes:
        uri, key, etag, offset, size, shared = self.index.place(row)
        try:
            return self._store(uri).read(key, etag or None, (offset, offset + size) if shared else None)
        except FileNotFoundError as error:
            raise _gone(f"{uri}/{key}") from error

    def _store(self, uri: str) -> Store:
        known = self._stores.get(uri)
        if known is not None:
            return known
        folder: str | Path = uri
        if uri.startswith("sample://"):
            from trainers.data.sample import materialise

            folder = materialise(uri.removeprefix("sample://"))
        return self._stores.setdefault(uri, open_store(folder))


def chunks_of(index: Index) -> Rows | None:
    """Number of the part of the data that each row is best read with, int64 [n]; None if no object is shared.

    A part is what is fetched by one request: an image that is an object by itself, about `CHUNK` bytes of one that
    holds many, or a row group of a Parquet file. It depends on the index alone.
    """
    import pyarrow.compute as pc

    holder = index.table["object"].combine_chunks()
    if holder.null_count == len(holder):
        return None
    shared = np.asarray(pc.is_valid(holder).to_numpy(zero_copy_only=False))
    part = -1 - np.arange(len(holder))
    number = pc.fill_null(holder.dictionary_encode().indices, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    offset = index.table["offset"].to_numpy()
    within = np.where(_parquet(index), group_of(offset)[0], offset // CHUNK)
    part[shared] = number[shared] << 40 | within[shared]
    return np.unique(part, return_inverse=True)[1].astype(np.int64)


class _Gate:
    """Lets so much through at once that it is no more than `most`, or one alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def of(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._inside or self._inside + amount <= self._most)
            self._inside += amount
        try:
            yield
        finally:
            with self._changed:
                self._inside -= amount
                self._changed.notify_all()


def default_cache() -> Path:
    """The folder of this node's caches: `$RAYLAUNCH_CACHE`, else one in the user's cache."""
    return Path(os.environ.get("RAYLAUNCH_CACHE") or cache_folder() / "images")


def _parquet(index: Index) -> Flags:
    """Which rows lie in Parquet files, bool [n]."""
    import pyarrow.compute as pc

    return np.asarray(pc.fill_null(pc.ends_with(index.table["object"], ".parquet"), False).to_numpy())


def _gone(where: str) -> DataError:
    return DataError("the image is gone", where=where,
                     hint="restore it, or launch a new run, which indexes the data anew")  # fmt: skip
