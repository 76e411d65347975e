"""What the data engine has done so far, in numbers that threads add to. It measures nothing itself."""

from __future__ import annotations

import threading
from collections.abc import Iterable

FIELDS = {
    "images": "images put into batches",
    "pixels_held": "of these, found decoded",
    "decoded": "images decoded",
    "decode_seconds": "CPU time of decoding",
    "crop_seconds": "CPU time of cropping, resizing and mirroring",
    "files_held": "files found in the node's cache",
    "requests": "requests to S3 for images",
    "repeated": "of these, answered only when they were sent again in a slower way",
    "bytes": "bytes of images that came from S3",
    "fetch_seconds": "time that these requests took, many of them at once",
}
"""What is counted."""


class Counts:
    """Sums of `FIELDS`. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = dict.fromkeys(FIELDS, 0)

    def add(self, **amounts: float) -> None:
        """Adds to some of the sums."""
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount

    def so_far(self) -> dict[str, float]:
        """The sums since the beginning, or the last `take`."""
        with self._lock:
            return dict(self._sums)

    def take(self) -> dict[str, float]:
        """The sums, which begin anew."""
        with self._lock:
            sums, self._sums = self._sums, dict.fromkeys(FIELDS, 0)
            return sums


def total(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The sums of several ranks together."""
    sums: dict[str, float] = dict.fromkeys(FIELDS, 0)  # what is counted in whole numbers stays so
    for part in parts:
        for name, amount in part.items():
            sums[name] += amount
    return sums
