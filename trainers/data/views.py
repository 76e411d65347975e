"""What a node's cache holds of some records, by row: found in its log, checked, and added to it.

A record that another process wrote is checked against its xxh3 before its first use, so a wrong byte is never handed
out. It knows nothing of images, S3 and indexes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from trainers.data import segments
from trainers.data.cache import Cache
from trainers.data.segments import Entries

if TYPE_CHECKING:
    from typing_extensions import Buffer

Rows = npt.NDArray[np.int64]

_CLOCK_TICK_NS = 100_000_000
"""A folder that changed so short a time ago may change again without its time telling."""


class View:
    """What a cache holds of some records, by row. Thread safe.

    Args:
        cache: the log.
        ids: their names, uint8 [n, 16]; rows count in it.

    A row costs 44 bytes of memory; a record costs nothing but its pages, which all processes share. What `get` and
    `locate` hand out is valid for as long as the view is.
    """

    def __init__(self, cache: Cache, ids: npt.NDArray[np.uint8]) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        count = len(ids)
        self._ids = np.frombuffer(np.ascontiguousarray(ids).data, "S16", count) if count else np.empty(0, "S16")
        self._order = np.argsort(self._ids, kind="stable")
        in_order = self._ids[self._order]
        self._twins = bool((in_order[1:] == in_order[:-1]).any())
        self._segment = np.full(count, -1, np.int32)
        self._offset = np.zeros(count, np.uint32)
        self._length = np.zeros(count, np.uint32)
        self._shape = np.zeros((count, 2), np.int32)
        self._digest = np.zeros(count, np.uint64)
        self._address = np.zeros(count, np.uint64)
        self._growing: dict[str, int] = {}
        self._seen: set[str] = set()
        self._changed_ns = 0
        self.refresh()

    def held(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Which of the rows the log has a record of, as far as this view knows; unlike `get`, it reads none."""
        found: npt.NDArray[np.bool_] = self._segment[rows] >= 0
        return found

    def get(self, row: int) -> memoryview | None:
        """The record of a row, or None. It is checked before its first use; a damaged one counts as absent."""
        if not self._address[row] and not self._verify(row):
            return None
        segment = self._cache.segment(int(self._segment[row]))
        offset = int(self._offset[row])
        return None if segment is None else segment.data[offset : offset + int(self._length[row])]

    def locate(self, rows: Rows) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
        """Where records lie in this process's memory: addresses, uint64 [b], 0 for those that `get` would not return,
        and their (height, width), int32 [b, 2].
        """
        addresses = self._address[rows]
        if not addresses.all():
            for row in rows[addresses == 0].tolist():
                self._verify(row)
            addresses = self._address[rows]
        return addresses, self._shape[rows]

    def put(
        self, rows: Sequence[int], data: Sequence[Buffer | npt.NDArray[np.uint8]],
        shapes: npt.ArrayLike | None = None,
    ) -> npt.NDArray[np.bool_]:  # fmt: skip
        """Adds the records of rows that have none; which of the rows have one now. That one is not kept is no error."""
        wanted = np.asarray(rows, np.int64)
        kept = self._segment[wanted] >= 0
        new = np.flatnonzero(~kept)
        pieces = [memoryview(cast("Buffer", data[at])).cast("B") for at in new.tolist()]
        sizes = np.zeros((len(rows), 2), np.int32) if shapes is None else np.asarray(shapes, np.int32).reshape(-1, 2)
        for part, name, entries, place in self._cache.append(self._ids[wanted[new]], pieces, sizes[new]):
            kept[new[part]] = True
            with self._lock:
                if name not in self._seen:
                    self._seen.add(name)
                    self._growing[name] = 0
                if self._growing.get(name) == place:
                    self._growing[name] += len(entries)  # `refresh` need not read what is known here
                number = None if self._twins else self._cache.use(name)
                if number is None:
                    self._learn(name, entries)
                    continue
                absent = self._segment[wanted[new[part]]] < 0
                added, entries = wanted[new[part]][absent], entries[absent]
                self._note(added, entries, number)
                segment = self._cache.segment(number)
                if segment is not None:  # what was just written need not be checked
                    self._address[added] = segment.address + entries["offset"].astype(np.uint64)
        return kept

    def claim(self, row: int) -> AbstractContextManager[None]:
        """Only one holder on the node at a time, be it a thread or a process: who has it makes the record of a row, or
        those of several that others want together too.

        The kernel frees it when its holder dies. It guards nothing: where locks cannot be had, work is done twice.
        """
        return self._cache.claim(self._ids[row])

    def refresh(self) -> None:
        """Learns what other processes have added."""
        folder = self._cache.folder
        if not self._cache.budget:
            return
        with self._lock:
            try:
                changed = os.stat(folder).st_mtime_ns
                if changed != self._changed_ns or abs(time.time_ns() - changed) < _CLOCK_TICK_NS:
                    self._changed_ns = changed
                    new = set(segments.names(folder)) - self._seen
                    self._seen |= new
                    self._growing |= dict.fromkeys(new, 0)
            except OSError:
                return
            for name, count in list(self._growing.items()):
                if self._cache.written(name) == count:
                    continue
                try:
                    entries, self._growing[name], whole = segments.read_entries(folder, name, count)
                except OSError:
                    whole = True  # removed
                else:
                    self._learn(name, entries)
                if whole:
                    del self._growing[name]

    def _learn(self, name: str, entries: Entries) -> None:
        """Takes in entries that are of our rows, where there was none before. Called with the lock held."""
        if not len(entries) or not len(self._ids):
            return
        # In order, so that neighbours in the search are neighbours in memory; of twins the later one counts.
        entries = entries[np.argsort(entries["id"], kind="stable")]
        first = np.searchsorted(self._ids, entries["id"], sorter=self._order)
        ours = self._ids[self._order[np.minimum(first, len(self._ids) - 1)]] == entries["id"]
        entries, first = entries[ours], first[ours]
        number = self._cache.use(name) if len(entries) else None
        if number is None:
            return
        rows = self._order[first]
        if self._twins:
            counts = np.searchsorted(self._ids, entries["id"], "right", self._order) - first
            entries = np.repeat(entries, counts)
            rows = self._order[np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())]
        new = self._segment[rows] < 0
        self._note(rows[new], entries[new], number)

    def _note(self, rows: Rows, entries: Entries, number: int) -> None:
        self._offset[rows] = entries["offset"]
        self._length[rows] = entries["length"]
        self._shape[rows, 0] = entries["height"]
        self._shape[rows, 1] = entries["width"]
        self._digest[rows] = entries["digest"]
        # Last: other threads read without the lock, and a row has a record once it has a segment.
        self._segment[rows] = number

    def _verify(self, row: int) -> bool:
        number, offset, length = int(self._segment[row]), int(self._offset[row]), int(self._length[row])
        if number < 0:
            return False
        segment = self._cache.segment(number)
        if segment is not None and xxh3_64_intdigest(segment.data[offset : offset + length]) == self._digest[row]:
            self._address[row] = segment.address + offset
            return True
        with self._lock:
            if self._segment[row] == number and self._offset[row] == offset:
                self._segment[row] = -1
        if segment is not None:
            self._cache.strike(number, self._ids[row], offset)
        return False
