"""A process that writes to a node's cache: `python -m tests.cache_writer FOLDER SEED COUNT`, and what is the truth.

Prints the number of each record once it is kept, and may be killed at any moment.
"""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainers.data.cache import Cache
from trainers.data.views import View

SMALL = 32 << 20
"""A budget whose segments have 1 MiB."""


def ids_of(*numbers: int) -> npt.NDArray[np.uint8]:
    names = b"".join(hashlib.blake2b(str(number).encode(), digest_size=16).digest() for number in numbers)
    return np.frombuffer(names, np.uint8).reshape(-1, 16)


def truth(number: int, most: int = 50_000) -> bytes:
    """The one right content of a record."""
    length = int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:4], "big") % most
    return hashlib.shake_128(str(number).encode()).digest(length)


def put(view: View, row: int, data: bytes | npt.NDArray[np.uint8], shape: tuple[int, int] = (0, 0)) -> bool:
    """Adds one record; whether it is kept."""
    return bool(view.put([row], [data], [shape])[0])


def main(folder: Path, seed: int, count: int) -> None:
    view = View(Cache(folder, SMALL), ids_of(*range(count)))
    chance = random.Random(seed)
    left = chance.sample(range(count), count)
    while left:
        rows = [left.pop() for _ in range(min(chance.randint(1, 4), len(left)))]
        view.refresh()
        for row, kept in zip(rows, view.put(rows, [truth(row) for row in rows]), strict=True):
            if kept:
                print(row, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
