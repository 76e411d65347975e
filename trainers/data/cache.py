"""A node's cache: bytes by a 16-byte name, written once and then mapped into the memory of every process that asks.

A log of segments (`segments.py`) that all processes of a node add to and read, without a server and without a wait
for one another. It loses records (no room, a full disk, damage, another user's folder), and never hands out a wrong
byte: each record is checked against its xxh3 before its first use in a process. What a cache holds is thus a matter
of speed alone, and none of its troubles is an error. It knows nothing of images, S3 and indexes.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from launcher.storage import standing
from trainers.data import segments
from trainers.data.segments import Entries, Locks, Segment, Writer

if TYPE_CHECKING:
    from typing_extensions import Buffer

Rows = npt.NDArray[np.int64]

WRITERS = 4
"""Segments at most that a process writes to at once: the kernel lets only one thread at a time write to a file."""

PAUSE_S = 30.0
"""How long nothing is kept after there was no room."""

_CLOCK_TICK_NS = 100_000_000
"""A folder that changed so short a time ago may change again without its time telling."""

_log = logging.getLogger(__name__)


def room(folder: Path) -> int:
    """Bytes on the disk that a log in this folder has, and those that it could still get; 0 if that cannot be told.

    All caches of a node together are to have no more than `$RAYLAUNCH_CACHE_BYTES`, where that is set.
    """
    try:
        found = Cache(folder, 0).held() + shutil.disk_usage(standing(folder)).free
    except OSError:
        return 0
    most = os.environ.get("RAYLAUNCH_CACHE_BYTES", "")
    return min(found, int(most)) if most.isdecimal() else found


class Cache:
    """The log in a folder. Thread safe; processes of any number and age may have it open at once.

    Segments that a view has found a record in are in use until the cache is dropped: no process removes them. For
    the others, the one used the longest ago goes first when there is no room. So a set of records larger than the
    budget does not chase itself through the cache: what does not fit is not kept.

    Args:
        folder: on a local disk; made when first needed. Removing it while it is in use costs what it held.
        budget: bytes on the disk that the log may have, kept to within a few per cent; 0: nothing is kept or read.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder = folder / segments.FORMAT
        self.budget = budget
        # Small enough that room is made bit by bit, large enough that there are few files to map.
        self._segment_size = 1 << min(max((budget // 32).bit_length() - 1, 20), segments.LARGEST)
        self._lock = threading.RLock()
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._segments: dict[int, Segment] = {}
        self._held = self._since = 0
        self._resume_at = 0.0
        self._said: set[str] = set()
        self._begin()
        if budget:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self._pause(error)
        self._locks = Locks(self.folder / "locks")
        self._held = self.held()

    def view(self, ids: npt.NDArray[np.uint8]) -> View:
        """What the log holds of these records: `ids` is uint8 [n, 16], and rows of the view count in it."""
        return View(self, ids)

    @property
    def keeping(self) -> bool:
        """Whether there was room for the last record."""
        return bool(self.budget) and time.monotonic() >= self._resume_at

    def held(self) -> int:
        """Bytes on the disk that the log has now."""
        try:
            return sum(segments.size_on_disk(self.folder, name) for name in segments.names(self.folder))
        except OSError:
            return 0

    # -- for views

    def append(self, record: bytes, data: memoryview, shape: tuple[int, int]) -> tuple[str, Entries, int] | None:
        """Adds a record: its segment, its entry and how many are before that, or None if it is not kept."""
        if not self.keeping or len(data) > self._segment_size:
            return None
        if self._process != os.getpid():
            self._begin()  # a forked child: the parent goes on with its segments
        writer = None
        try:
            with self._writing:
                with self._lock:
                    writer = self._writer(len(data))
                    if writer is None:
                        self._pause(None)
                        return None
                # Outside the lock: copying into the page cache takes longer than all the rest.
                entry, count = writer.add(record, data, shape), writer.count
                with self._lock:
                    self._written[writer.name] = count
                    self._idle.append(writer)
                return writer.name, entry, count - 1
        except OSError as error:
            with self._lock:
                # What was begun stays a gap, and the segment is left to whoever takes it over.
                if writer is not None:
                    self._written.pop(writer.name, None)
                self._pause(error)
            return None

    def written(self, name: str) -> int | None:
        """How many entries a segment has that only this process adds to; None if others may."""
        return self._written.get(name) if self._process == os.getpid() else None

    def use(self, name: str) -> int | None:
        """The segment's number in this process, which keeps others from removing it; None if it is gone."""
        with self._lock:
            if name not in self._numbers:
                if not self._locks.share(segments.lock_of(name)):
                    return None
                try:
                    os.utime(self.folder / f"{name}.dat")
                except PermissionError:
                    pass  # another user's, who may remove it as not used for long
                except OSError:
                    self._locks.release(segments.lock_of(name))
                    return None
                self._numbers[name] = len(self._names)
                self._names.append(name)
            return self._numbers[name]

    def segment(self, number: int) -> Segment | None:
        """The mapped segment; None if it is gone or cut short."""
        found = self._segments.get(number)
        if found is None:
            with self._lock:
                try:
                    found = self._segments.setdefault(number, Segment(self.folder, self._names[number]))
                except OSError as error:
                    self._say(error)
        return found

    def strike(self, number: int, record: bytes, offset: int) -> None:
        """Tells the other processes that a record is damaged."""
        segments.strike(self.folder, self._names[number], record, offset)

    def claim(self, record: bytes) -> AbstractContextManager[None]:
        """See `View.claim`."""
        return self._locks.alone(1 << 62 | int.from_bytes(record[:8], "little") >> 2)

    # -- room

    def _begin(self) -> None:
        """Without segments of our own."""
        self._process = os.getpid()
        self._writing = threading.BoundedSemaphore(WRITERS)
        self._idle: list[Writer] = []
        self._written: dict[str, int] = {}

    def _writer(self, length: int) -> Writer | None:
        """A segment of ours with room for a record, for one thread alone; None if the cache has no room."""
        # Others write too: what all of them hold is looked up from time to time.
        if self._held + length > self.budget or self._since > self._segment_size // 16:
            if any(writer.gone for writer in self._idle):
                self._idle, self._written, self._locks = [], {}, Locks(self.folder / "locks")
            self._held, self._since = self._survey(length), 0
            if self._held + length > self.budget:
                return None
        self._held += length
        self._since += length
        while True:
            # The one that was used last, so that there are no more than are needed.
            writer = self._idle.pop() if self._idle else self._next_writer()
            if writer.fits(length):
                return writer
            self._written.pop(writer.name, None)
            writer.seal()

    def _next_writer(self) -> Writer:
        """A segment that a dead process left, or a new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in segments.names(self.folder):
            try:
                # Our own lie idle or are in use: to take one over again would fail, but cost the look into each.
                if name in self._written or segments.size_of(name) < self._segment_size:
                    continue
                if not segments.sealed(self.folder, name):
                    writer = Writer(self.folder, name, new=False)
                    if self.use(name) is not None:
                        return writer
            except OSError:
                continue
        writer = Writer(self.folder, segments.new_name(self._segment_size), new=True)
        self.use(writer.name)
        return writer

    def _survey(self, length: int) -> int:
        """Bytes that the log holds, after segments were removed to make room for `length` more."""
        sizes = {name: segments.size_on_disk(self.folder, name) for name in segments.names(self.folder)}
        total = sum(sizes.values())
        if total + length <= self.budget:
            return total
        for name in sorted(sizes.keys() - self._numbers.keys(), key=lambda name: segments.last_use(self.folder, name)):
            if segments.remove(self.folder, name, self._locks):
                total -= sizes[name]
            if total + length + self._segment_size <= self.budget:
                break
        return total

    # -- trouble

    def _pause(self, error: OSError | None) -> None:
        self._resume_at = time.monotonic() + PAUSE_S
        if error is not None:
            self._say(error)
        elif "full" not in self._said:
            self._said.add("full")
            _log.warning("%s holds %.1f GB, all in use: more is not kept there", self.folder, self.budget / 1e9)

    def _say(self, error: OSError) -> None:
        what = error.strerror or str(error)
        if what not in self._said:
            self._said.add(what)
            _log.warning("%s: %s; what cannot be kept there is fetched each time", self.folder, what)


class View:
    """What a cache holds of some records, by row. Thread safe.

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
        """The record of a row, or None. It is checked the first time; a damaged one counts as absent."""
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

    def put(self, row: int, data: Buffer | npt.NDArray[np.uint8], shape: tuple[int, int] = (0, 0)) -> bool:
        """Adds the record of a row, unless there is one. False if it is not kept, which is no error."""
        if self._segment[row] >= 0:
            return True
        found = self._cache.append(self._ids[row], memoryview(cast("Buffer", data)).cast("B"), shape)
        if found is None:
            return False
        name, entry, place = found
        with self._lock:
            if name not in self._seen:
                self._seen.add(name)
                self._growing[name] = 0
            if self._growing.get(name) == place:
                self._growing[name] += 1  # `refresh` need not read what is known here
            number = None if self._twins else self._cache.use(name)
            if number is None:
                self._learn(name, entry)
            elif self._segment[row] < 0:
                self._note(slice(row, row + 1), entry, number)
        return True

    def claim(self, row: int) -> AbstractContextManager[None]:
        """Only one holder on the node at a time, be it a thread or a process: who has it makes the record of a row.

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

    def _note(self, rows: Rows | slice, entries: Entries, number: int) -> None:
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
