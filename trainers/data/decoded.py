"""Decoded images by row of the index: from the node's store of pixels, or decoded on the spot and put there.

The store is a cache beside that of the files, shared in the same way; an image is named in it by its file's name and
the rule by which it was reduced, so nothing stale is ever served. What does not fit is decoded each time. Nothing is
cropped here.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from trainers.data.cache import Cache, room
from trainers.data.images import BadImage, Pixels, Reduction, pixels
from trainers.data.kernel import Ints, Words
from trainers.data.source import Source, default_cache
from trainers.data.views import Rows, View

FORMAT = "rgb8-1"
"""How pixels are made and laid out; another name where the result of the same file and rule changes."""

STORE = "pixels"
"""Its place in the folder of the node's caches."""


@dataclass
class Taken:
    """Some decoded images, in this process's memory as long as this is.

    Attributes:
        addresses: of uint8 pixels [height, width, 3], uint64 [b]; 0 where the image cannot be read.
        shapes: height and width, int32 [b, 2].
        decoded: what lies nowhere else.
    """

    addresses: Words
    shapes: Ints
    decoded: list[Pixels]


class Decoded:
    """The images of an index. Thread safe, and safe beside other processes with the same store.

    Args:
        source: of the files.
        reduction: how far images may shrink when they are decoded.
        folder: of the node's caches; `default_cache()` if None.
        budget: bytes that the store may take on the disk; 0 keeps no pixels; `default_budget(folder)` if None.

    Attributes:
        bad: row and reason of each unreadable image met so far.
    """

    def __init__(
        self, source: Source, reduction: Reduction, folder: Path | None = None, budget: int | None = None
    ) -> None:
        self.source = source
        self.counts = source.counts
        self.bad: dict[int, str] = {}
        self._reduction = reduction
        folder = folder or default_cache()
        self._cache = Cache(folder / STORE, default_budget(folder) if budget is None else budget)
        rule = hashlib.blake2b(f"{FORMAT} {reduction.name}".encode(), digest_size=16).digest()
        self._view = View(self._cache, source.index.ids ^ np.frombuffer(rule, np.uint8))

    def absent(self, rows: Rows) -> Rows:
        """Those of the rows whose pixels are not in the store, as far as is known without looking."""
        return rows[~self._view.held(rows)]

    def bytes_held(self) -> int:
        """Bytes on the disk that the store has now, for all who use it."""
        return self._cache.held()

    def refresh(self) -> None:
        """Learns what other processes have put into the store."""
        self._view.refresh()

    def take(self, rows: Rows) -> Taken:
        """The images of some rows. Raises what `Source.read` raises, but notes unreadable ones in `bad`."""
        addresses, shapes = self._view.locate(rows)
        absent = np.flatnonzero(addresses == 0)
        self.counts.add(pixels_held=len(rows) - len(absent))
        taken = Taken(addresses, shapes, [])
        if len(absent):
            self._add(taken, absent, rows)
        return taken

    def _add(self, taken: Taken, absent: Rows, rows: Rows) -> None:
        """The images at these places."""
        files = {place: self.source.read(rows[place]) for place in absent.tolist() if rows[place] not in self.bad}
        if not self._cache.keeping:
            self._decode(taken, files, rows)
            return
        # Whoever else wants these images on this node, in the same order as most do, waits and then finds them decoded.
        with self._view.claim(int(rows[0])):
            self._view.refresh()
            places = np.array(list(files), np.int64)
            taken.addresses[places], taken.shapes[places] = self._view.locate(rows[places])
            missing = {place: files[place] for place in files if not taken.addresses[place]}
            images = self._decode(taken, missing, rows)
            self._view.put([int(rows[place]) for place in images], list(images.values()),
                           taken.shapes[list(images)])  # fmt: skip

    def _decode(self, taken: Taken, files: dict[int, bytes | memoryview], rows: Rows) -> dict[int, Pixels]:
        """Decodes files by place in the rows; the images of those that can be read."""
        found: dict[int, Pixels] = {}
        began = time.thread_time()
        for place, data in files.items():
            try:
                image = found[place] = pixels(data, self._reduction)
            except BadImage as error:
                self.bad[int(rows[place])] = str(error)
                continue
            taken.addresses[place], taken.shapes[place] = image.ctypes.data, image.shape[:2]
            taken.decoded.append(image)
        self.counts.add(decoded=len(found), decode_seconds=time.thread_time() - began)
        return found


def default_budget(folder: Path) -> int:
    """Bytes for the store in a folder of caches: a quarter of its disk, and no more than half of the memory.

    What is read from the disk each time is hardly there faster than it is decoded.
    """
    return min(room(folder / STORE) // 4, _memory() // 2)


def _memory() -> int:
    """Bytes of memory that this process and its kin may use."""
    total: int = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(total, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return total
