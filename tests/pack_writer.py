"""A process that packs, and may be killed at any moment: `python -m tests.pack_writer SRC DST`."""

from __future__ import annotations

import sys

from launcher.spec import Data
from trainers.data.index import build_index
from trainers.data.pack import Options, Pack


def main(source: str, destination: str) -> None:
    made = Pack(build_index(Data(uri=source)), destination, Options(shard_mb=1))
    print("begin", flush=True)
    made.make(lambda *_: None)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
