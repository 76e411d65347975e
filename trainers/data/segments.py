"""The files of a node's cache: segments of bytes, the entries that say what lies where, the locks between processes.

A segment is a pair of files. `NAME.dat` holds records; it is made at its full size as one hole, so that a mapping of
it never reaches past its end. `NAME.idx` gains an entry for each record, after the record's last byte. Both only ever
grow in what they say, so whoever reads an entry may rely on it; a process that dies leaves a record without an entry,
or part of an entry, and both are skipped. It knows nothing of rows, budgets and images.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

FORMAT = "v1"
"""Name of the folder that holds segments as this version writes them."""

ENTRY = np.dtype(
    [("id", "S16"), ("offset", "<u4"), ("length", "<u4"), ("height", "<i4"), ("width", "<i4"), ("digest", "<u8"),
     ("check", "<u8")]
)  # fmt: skip
"""What `NAME.idx` is a row of: where a record lies in `NAME.dat`, its xxh3-64, and the entry's own check."""

Entries = npt.NDArray[np.void]
Ids = npt.NDArray[np.bytes_]
"""Names of records, S16 [n]."""

SEALED = -1
"""Height of the entry that ends a segment: nothing is added after it."""

LARGEST = 30
"""A segment has at most 2**30 bytes: few enough of them for a process to map a terabyte, and offsets fit 32 bits."""

MOST_AT_ONCE = 1024
"""Pieces that Linux and macOS write by one call."""

_WEIGHTS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93,
                     0xA0761D6478BD642F], np.uint64)  # fmt: skip


def check(entries: Entries) -> npt.NDArray[np.uint64]:
    """What `check` has to be, uint64 [n]: a sum of the entry's words with odd weights, which no one word can leave."""
    words = entries.view("<u8").reshape(len(entries), ENTRY.itemsize // 8)
    total: npt.NDArray[np.uint64] = (words[:, :-1] * _WEIGHTS).sum(axis=1, dtype=np.uint64) + _WEIGHTS[0]
    return total


def new_name(size: int) -> str:
    """A name for a segment that holds `size` bytes, a power of two; no other ever has it."""
    return f"{os.urandom(6).hex()}-{size.bit_length() - 1}"


def size_of(name: str) -> int:
    """Bytes that the segment holds, as its name says; 0 if it is no name of a segment."""
    number, _, bits = name.partition("-")
    known = len(number) == 12 and not set(number) - set("0123456789abcdef") and bits.isdecimal() and len(bits) < 3
    return 1 << int(bits) if known and int(bits) <= LARGEST else 0


def names(folder: Path) -> list[str]:
    """The segments in a folder; none if there is no folder."""
    try:
        found = [name[:-4] for name in os.listdir(folder) if name.endswith(".idx")]
    except FileNotFoundError:
        return []
    return [name for name in found if size_of(name)]


def lock_of(name: str) -> int:
    """The number of the lock that those share who use the segment."""
    return int(name[:12], 16)


def size_on_disk(folder: Path, name: str) -> int:
    """Bytes that the segment takes from the disk."""
    total = 0
    for suffix in ("dat", "idx"):
        with contextlib.suppress(FileNotFoundError):
            total += os.stat(folder / f"{name}.{suffix}").st_blocks * 512
    return total


def last_use(folder: Path, name: str) -> float:
    """When the segment was last written, or first used by a process."""
    try:
        return os.stat(folder / f"{name}.dat").st_mtime
    except OSError:
        return 0.0


def sealed(folder: Path, name: str) -> bool:
    """Whether nothing will be added to the segment any more."""
    with open(folder / f"{name}.idx", "rb", buffering=0) as file:
        count = os.fstat(file.fileno()).st_size // ENTRY.itemsize
        if not count:
            return False
        file.seek((count - 1) * ENTRY.itemsize)
        last = np.frombuffer(file.read(ENTRY.itemsize), ENTRY)
    return bool((last["height"] == SEALED) & (check(last) == last["check"]))


def read_entries(folder: Path, name: str, skip: int) -> tuple[Entries, int, bool]:
    """The sound entries after the first `skip`, how many there are in all, and whether there will be no more.

    Raises:
        OSError: there is no such segment.
    """
    path = folder / f"{name}.idx"
    if os.stat(path).st_size < (skip + 1) * ENTRY.itemsize:
        return np.empty(0, ENTRY), skip, False
    with open(path, "rb", buffering=0) as file:
        file.seek(skip * ENTRY.itemsize)
        data = file.read()
    entries = np.frombuffer(data, ENTRY, len(data) // ENTRY.itemsize)
    sound = entries[(check(entries) == entries["check"])]
    ends = sound["offset"].astype(np.int64) + sound["length"]
    end = sound["height"] == SEALED
    return sound[(ends <= size_of(name)) & ~end], skip + len(entries), bool(end.any())


class Segment:
    """The bytes of a segment, mapped.

    Attributes:
        data: read only, of the segment's full size.
        address: where they begin in this process's memory.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Raises `OSError` if the file is gone or has lost its end."""
        file = os.open(folder / f"{name}.dat", os.O_RDONLY)
        try:
            if os.fstat(file).st_size != size_of(name):
                raise OSError(errno.EIO, "the file was cut short", str(folder / f"{name}.dat"))
            self.data = memoryview(mmap.mmap(file, size_of(name), access=mmap.ACCESS_READ))
        finally:
            os.close(file)
        self.address = int(np.frombuffer(self.data, np.uint8).ctypes.data)


class Writer:
    """A segment that this process alone adds to, until it or the process ends. Not thread safe.

    Attributes:
        count: entries of the segment, the one that ends it among them.
    """

    def __init__(self, folder: Path, name: str, new: bool) -> None:
        """Makes a segment or takes one over.

        Raises:
            OSError: that cannot be; a `BlockingIOError` if it has a writer.
        """
        self.name = name
        self._size = size_of(name)
        self._data = self._entries = -1
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if new else 0)
        try:
            self._data = os.open(folder / f"{name}.dat", flags, 0o644)
            fcntl.flock(self._data, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if new:
                os.ftruncate(self._data, self._size)
            self._entries = os.open(folder / f"{name}.idx", flags, 0o644)
            if self.gone or os.fstat(self._data).st_size != self._size:
                raise OSError(errno.EIO, "the segment is damaged", str(folder / f"{name}.dat"))
            self.count = os.fstat(self._entries).st_size // ENTRY.itemsize
            os.ftruncate(self._entries, self.count * ENTRY.itemsize)
            self._next = 0 if new else _end_of_data(self._data)
        except OSError:
            self.__del__()
            raise

    def __del__(self) -> None:
        for file in (self._data, self._entries):
            if file >= 0:
                os.close(file)
        self._data = self._entries = -1

    @property
    def gone(self) -> bool:
        """Whether somebody removed the files."""
        return not os.fstat(self._data).st_nlink or not os.fstat(self._entries).st_nlink

    def room(self, lengths: Sequence[int]) -> int:
        """How many records of these lengths there is room for, and can be added at once."""
        ends = self._next + np.cumsum(lengths[:MOST_AT_ONCE])
        return int(np.searchsorted(ends, self._size, "right"))

    def add(self, ids: Ids, data: Sequence[memoryview], shapes: npt.ArrayLike) -> Entries:
        """Writes records that there is `room` for, and only then makes them known; returns their entries.

        Raises:
            OSError: and leaves a gap.
        """
        lengths = np.array([len(each) for each in data])
        ends = self._next + np.cumsum(lengths)
        entries = new_entries(ids, ends - lengths, lengths, shapes, [xxh3_64_intdigest(each) for each in data])
        at, self._next = self._next, int(ends[-1])
        left = list(data)
        while left:
            written = os.pwritev(self._data, left, at)
            at += written
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]
        self._append(entries)
        return entries

    def seal(self) -> None:
        """Ends the segment: nobody will add to it again."""
        self._append(new_entries(np.zeros(1, "S16"), [0], [0], [(SEALED, 0)], [0]))

    def _append(self, entries: Entries) -> None:
        os.pwrite(self._entries, entries.tobytes(), self.count * ENTRY.itemsize)
        self.count += len(entries)


def new_entries(
    ids: Ids, offsets: npt.ArrayLike, lengths: npt.ArrayLike, shapes: npt.ArrayLike, digests: Sequence[int]
) -> Entries:
    """Entries with their checks."""
    entries = np.zeros(len(ids), ENTRY)
    entries["id"], entries["offset"], entries["length"] = ids, offsets, lengths
    entries["height"], entries["width"] = np.asarray(shapes, np.int32).T
    entries["digest"] = np.array(digests, np.uint64)
    entries["check"] = check(entries)
    return entries


def strike(folder: Path, name: str, record: bytes, offset: int) -> None:
    """Spoils the entry of a record that was found damaged, so that no other process tries it."""
    with contextlib.suppress(OSError), open(folder / f"{name}.idx", "r+b", buffering=0) as file:
        data = file.read()
        entries = np.frombuffer(data, ENTRY, len(data) // ENTRY.itemsize)
        same = np.flatnonzero((entries["id"] == np.bytes_(record)) & (entries["offset"] == offset))
        for number in same.tolist():
            os.pwrite(file.fileno(), bytes(8), (number + 1) * ENTRY.itemsize - 8)


def _end_of_data(file: int) -> int:
    """Where the last byte that was ever written ends: what lies before may be in use, entry or not."""
    end = 0
    while True:
        try:
            end = os.lseek(file, os.lseek(file, end, os.SEEK_DATA), os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return end
            raise


def remove(folder: Path, name: str, locks: Locks) -> bool:
    """Removes a segment, unless a process writes or uses it; whether it did."""
    writer = None
    try:
        writer = Writer(folder, name, new=False)
    except BlockingIOError:
        return False
    except OSError:
        pass  # damaged: nobody can add to it either
    if not locks.seize(lock_of(name), wait=False):
        return False
    try:
        for path in (folder / f"{name}.dat", folder / f"{name}.idx"):
            path.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        locks.release(lock_of(name))
        del writer
    return True


class Locks:
    """Locks by number, shared by the processes of a node, which the kernel frees with their holder.

    All are byte ranges of one file, so that a million of them leave no trace. Where the file cannot be had, every
    lock is granted: they spare work, and nothing that is served rests on them. Threads share what a process holds,
    but for `alone`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            self._file = -1

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def share(self, number: int) -> bool:
        """Takes the lock beside others that share it; False if one has it alone."""
        return self._set(fcntl.F_RDLCK, number, wait=False)

    def seize(self, number: int, *, wait: bool) -> bool:
        """Takes the lock alone; False if others have it and `wait` is not set."""
        return self._set(fcntl.F_WRLCK, number, wait=wait)

    def release(self, number: int) -> None:
        """Gives the lock back."""
        self._set(fcntl.F_UNLCK, number, wait=False)

    @contextlib.contextmanager
    def alone(self, number: int) -> Iterator[None]:
        """Waits until no other thread of any process has the lock, and holds it."""
        with _turn(f"{self._path}/{number}"):
            self.seize(number, wait=True)
            try:
                yield
            finally:
                self.release(number)

    def _set(self, kind: int, number: int, *, wait: bool) -> bool:
        if self._file < 0:
            return True
        try:
            _set_lock(self._file, kind, number, wait)
        except OSError as error:
            # Anything else (no locks on this file system, a false alarm of a dead-lock) is as if there were no file.
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True


if sys.platform == "linux":

    def _set_lock(file: int, kind: int, number: int, wait: bool) -> None:
        # Bound to the open file and not to the process: two caches in one process keep out of each other's way.
        command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
        fcntl.fcntl(file, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, number, 1, 0))

else:

    def _set_lock(file: int, kind: int, number: int, wait: bool) -> None:
        names = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}
        fcntl.lockf(file, names[kind] | (0 if wait else fcntl.LOCK_NB), 1, number, os.SEEK_SET)


_turns: dict[str, tuple[threading.Lock, int]] = {}
_turns_lock = threading.Lock()


@contextlib.contextmanager
def _turn(name: str) -> Iterator[None]:
    """One thread of this process at a time, for each name."""
    with _turns_lock:
        lock, users = _turns.get(name, (threading.Lock(), 0))
        _turns[name] = (lock, users + 1)
    try:
        with lock:
            yield
    finally:
        with _turns_lock:
            lock, users = _turns.pop(name)
            if users > 1:
                _turns[name] = (lock, users - 1)
