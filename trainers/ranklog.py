"""Sends what a rank logs to `logs/rank-N.log` of its run, where it outlives the process and the machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from launcher.journal import open_journal
from launcher.runs import Run
from launcher.storage import Appender


@contextmanager
def rank_log(run: Run, rank: int) -> Iterator[None]:
    """Log records and warnings of this process go to the run while the block runs."""
    handler = _Handler(open_journal(run.store, f"logs/rank-{rank}.log"))
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
    def __init__(self, out: Appender) -> None:
        super().__init__()
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        self._out.write(self.format(record).encode() + b"\n")
        self._out.flush()

    def close(self) -> None:
        self._out.close()
        super().close()
