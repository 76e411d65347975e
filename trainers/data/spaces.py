"""Memory for arrays that come and go by the hundred a second, kept for the next ones. It knows nothing of images.

What malloc gets back of such arrays it hands on in pieces, or to the kernel: a process then grows by a hundred
megabytes in which nothing is, or waits for each page anew.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections import defaultdict

import numpy as np
import numpy.typing as npt

GRAIN = 1 << 20
"""Arrays share memory with others whose size is the same, rounded up to this many bytes."""

Bytes = npt.NDArray[np.uint8]


class Spaces:
    """Lends memory. Thread safe.

    Args:
        most: bytes that are kept while nobody has them.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.RLock()  # whoever holds it may drop an array, which comes back at once
        self._free: defaultdict[int, list[Bytes]] = defaultdict(list)
        self._kept = 0

    def lend(self, *shape: int) -> Bytes:
        """An array, uint8 of this shape, of whatever content, that comes back when nothing refers to it any more."""
        size = math.prod(shape)
        whole = self._take(max(-(-size // GRAIN), 1) * GRAIN)
        # What is cut from it refers to this array, and not, as numpy has it with arrays of arrays, to `whole`.
        lent = np.frombuffer(whole.data, np.uint8)
        weakref.finalize(lent, self._back, whole).atexit = False
        return lent[:size].reshape(shape)

    def _take(self, size: int) -> Bytes:
        with self._lock:
            if self._free[size]:
                self._kept -= size
                return self._free[size].pop()
        # Not from malloc, which would not give back to the kernel what is too much to be kept here.
        return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)

    def _back(self, whole: Bytes) -> None:
        with self._lock:
            if self._kept + len(whole) <= self._most:
                self._kept += len(whole)
                self._free[len(whole)].append(whole)
