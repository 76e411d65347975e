"""Sends what a rank logs to `logs/rank-N.log` of its run, where it outlives the process and the machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from launcher.runs import Run
from launcher.storage import Appender


@contextmanager
def rank_log(run: Run, rank: int) -> Iterator[None]:
    """Log records and warnings of this process go to the run while the block runs."""
    handler = _Handler(run.store.append(f"logs/rank-{rank}.log"), every=5.0 if run.uri.startswith("s3://") else 0.0)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
        handler.close()


class _Handler(logging.Handler):
    """Writes each record; makes it readable at once if it is a warning, else every `every` seconds."""

    def __init__(self, out: Appender, every: float) -> None:
        super().__init__()
        self._out = out
        self._every = every
        self._flushed = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        self._out.write(self.format(record).encode() + b"\n")
        if record.levelno >= logging.WARNING or time.monotonic() - self._flushed >= self._every:
            self._out.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._out.close()
        super().close()
