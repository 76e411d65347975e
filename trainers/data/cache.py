"""A node's cache: bytes by a 16-byte name, written once and then mapped into the memory of every process that asks.

A log of segments (`segments.py`) that all processes of a node add to and read (`views.py`), without a server and
without a wait for one another. It loses records (no room, a full disk, damage, another user's folder), and never hands
out a wrong byte: each is checked before its use. What a cache holds is thus a matter of speed alone, and none of its
troubles is an error. It knows nothing of images, S3 and indexes.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from launcher.storage import standing
from trainers.data import segments
from trainers.data.segments import Entries, Ids, Locks, Segment, Writer

WRITERS = 4
"""Segments at most that a process writes to at once: the kernel lets only one thread at a time write to a file."""

PAUSE_S = 30.0
"""How long nothing is kept after there was no room."""

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

    def append(
        self, ids: Ids, data: Sequence[memoryview], shapes: npt.NDArray[np.int32]
    ) -> Iterator[tuple[slice, str, Entries, int]]:
        """Adds records; which of them went into one segment, its name, their entries and how many are before these.

        Those that are not kept are in none of them.
        """
        if self._process != os.getpid():
            self._begin()  # a forked child: the parent goes on with its segments
        at = 0
        while at < len(data) and self.keeping:
            if len(data[at]) > self._segment_size:
                at += 1
                continue
            added = self._add(ids[at:], data[at:], shapes[at:])
            if added is None:
                return
            stop = at + len(added[1])
            yield slice(at, stop), *added
            at = stop

    def _add(
        self, ids: Ids, data: Sequence[memoryview], shapes: npt.NDArray[np.int32]
    ) -> tuple[str, Entries, int] | None:
        """Adds as many of the records as one segment takes, in order."""
        writer = None
        try:
            with self._writing:
                with self._lock:
                    writer, count = self._writer([len(each) for each in data])
                    if writer is None:
                        self._pause(None)
                        return None
                # Outside the lock: copying into the page cache takes longer than all the rest.
                before = writer.count
                entries = writer.add(ids[:count], data[:count], shapes[:count])
                with self._lock:
                    self._written[writer.name] = writer.count
                    self._idle.append(writer)
                return writer.name, entries, before
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

    def _writer(self, lengths: list[int]) -> tuple[Writer | None, int]:
        """A segment of ours for one thread alone, and how many of the records it has room for: one at least.

        None if the cache has no room.
        """
        # Others write too: what all of them hold is looked up from time to time.
        wanted = min(sum(lengths), self._segment_size)
        if self._held + wanted > self.budget or self._since > self._segment_size // 16:
            if any(writer.gone for writer in self._idle):
                self._idle, self._written, self._locks = [], {}, Locks(self.folder / "locks")
            self._held, self._since = self._survey(wanted), 0
        count = int(np.searchsorted(np.cumsum(lengths), self.budget - self._held, "right"))
        if not count:
            return None, 0
        while True:
            # The one that was used last, so that there are no more than are needed.
            writer = self._idle.pop() if self._idle else self._next_writer()
            fits = min(count, writer.room(lengths))
            if fits:
                taken = sum(lengths[:fits])
                self._held += taken
                self._since += taken
                return writer, fits
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
