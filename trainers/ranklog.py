"""Sends what a rank logs, and all that a process prints, to `logs/` of its run, where it outlives both."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from launcher.journal import open_journal
from launcher.runs import Run
from launcher.storage import Appender


class UtcFormatter(logging.Formatter):
    """Lines that begin with the time in UTC, alike on every machine: `launch logs --since` reads it."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")


@contextmanager
def process_log(run: Run, name: str) -> Iterator[None]:
    """What this process and its children print, to either stream, goes to `logs/NAME.log` too while the block runs."""
    out = open_journal(run.store, f"logs/{name}.log")
    reading, writing = os.pipe()
    screens = {number: os.dup(number) for number in (1, 2)}
    for number in screens:
        os.dup2(writing, number)
    os.close(writing)

    def copy() -> None:
        while data := os.read(reading, 65536):
            os.write(screens[1], data)
            out.write(data)
            out.flush()

    copier = threading.Thread(target=copy, name=f"log {name}", daemon=True)
    copier.start()
    try:
        yield
    finally:
        for number, screen in screens.items():
            os.dup2(screen, number)
        # A child that lives on may hold the pipe open; its words are no longer awaited.
        copier.join(timeout=5.0)
        out.close()


@contextmanager
def rank_log(run: Run, rank: int) -> Iterator[None]:
    """Log records and warnings of this process go to the run while the block runs."""
    handler = _Handler(open_journal(run.store, f"logs/rank-{rank}.log"))
    handler.setFormatter(UtcFormatter())
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
