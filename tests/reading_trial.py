"""A trial as far as its data goes: two ranks read three epochs of an index through a node's cache.

    python -m tests.reading_trial URI CACHE SEED

prints a checksum of each step.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

from launcher.spec import Data
from tests.test_loader import loader
from trainers.data.index import build_index


def main(uri: str, cache: str, seed: str) -> None:
    index = build_index(Data(uri=uri))
    ranks = [loader(index, Path(cache), seed=int(seed), rank=rank, world=2, threads=2) for rank in range(2)]
    for epoch in range(3):
        for steps in zip(*(rank.train(epoch) for rank in ranks), strict=True):
            print(zlib.crc32(b"".join(part.images.numpy().tobytes() for step in steps for part in step.parts)))
        for rank in ranks:
            list(rank.evaluate("val", 8))


if __name__ == "__main__":
    main(*sys.argv[1:])
