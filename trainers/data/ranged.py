"""An object of a store as a file that can be searched, of which only the parts that are looked at are fetched.

It is for headers and footers. Whole objects are read by `Store.read`, and images by the source.
"""

from __future__ import annotations

import io

from launcher.storage import Entry, Store

FLOOR = 16 * 1024
CEILING = 1024 * 1024


class Seekable(io.RawIOBase):
    """A file of a known size that can be searched; where its bytes come from is for its kinds to say."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._place = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class Ranged(Seekable):
    """Reads `entry` of a store by ranges, as long as it does not change.

    Each fetch takes at least FLOOR bytes. While the next part that is wanted begins within so many bytes after the
    last, more is taken at a time, up to CEILING: small things one after the other are read in few requests, and what
    lies between far ones is not read.
    """

    def __init__(self, store: Store, entry: Entry) -> None:
        super().__init__(entry.size)
        self._store = store
        self._entry = entry
        self._start = 0
        self._data = b""
        self._ahead = FLOOR

    def read(self, size: int = -1) -> bytes:
        """The next bytes; fewer at the end only. Raises what `Store.read` raises."""
        rest = max(self._size - self._place, 0)
        size = rest if size is None or size < 0 else min(size, rest)
        inner = self._place - self._start
        if not 0 <= inner <= len(self._data) - size:
            self._fetch(size)
            inner = 0
        self._place += size
        return self._data[inner : inner + size]

    def _fetch(self, size: int) -> None:
        gap = self._place - self._start - len(self._data)
        near = gap <= self._ahead and self._place >= self._start
        self._ahead = min(2 * self._ahead, CEILING) if near else FLOOR
        stop = min(self._place + max(size, self._ahead), self._size)
        self._start = self._place
        self._data = self._store.read(self._entry.key, self._entry.etag, (self._start, stop))
