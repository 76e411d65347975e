"""Files of a run that grow: JSON lines and logs, written while others read them.

A journal never fails the work it tells of: what cannot be stored now is stored later, and what cannot be stored at all
is lost with a warning. On S3, where a line is a request, it is written in the background.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

from launcher.errors import LaunchError
from launcher.storage import Appender, Cursor, Store

log = logging.getLogger(__name__)

REMOTE_SECONDS = 5.0
"""How long a line may wait before it is readable on S3: each flush there is a request."""


def open_journal(store: Store, key: str) -> Appender:
    """A writer to the journal `key` that never raises for the storage, and never waits for a remote one."""
    return _Patient(store, key, REMOTE_SECONDS if store.uri.startswith("s3://") else 0.0)


class _Patient:
    """Keeps what could not be written; with `every` seconds above 0, a thread does the writing."""

    def __init__(self, store: Store, key: str, every: float) -> None:
        self._out = store.append(key)
        self._key = key
        self._buffer = bytearray()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._failing = False
        self._thread: threading.Thread | None = None
        if every:
            self._thread = threading.Thread(target=self._run, args=(every,), daemon=True, name=f"journal {key}")
            self._thread.start()

    def write(self, data: bytes, /) -> None:
        with self._lock:
            self._buffer += data

    def flush(self) -> None:
        if self._thread is None:
            self._store()

    def close(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._store()
        try:
            self._out.close()
        except (LaunchError, OSError):
            log.warning("the end of %s is lost", self._key)

    def _run(self, every: float) -> None:
        while not self._over.wait(every):
            self._store()

    def _store(self) -> None:
        with self._lock:
            data, self._buffer = bytes(self._buffer), bytearray()
        try:
            if data:
                self._out.write(data)
            self._out.flush()
            self._failing = False
        except (LaunchError, OSError) as error:
            # Said once: the handler of this warning may write to a journal that fails too.
            if not self._failing:
                self._failing = True
                log.warning("%s cannot be written now: %s", self._key, error)


class Journal:
    """Appends JSON lines, readable by others at most `every` seconds later (on S3, `REMOTE_SECONDS`)."""

    def __init__(self, store: Store, key: str, every: float = 0.0) -> None:
        self._out = open_journal(store, key)
        self._every = every
        self._flushed = 0.0

    def write(self, event: str, *, now: bool = False, **values: Any) -> None:
        """One line; `now` makes it readable at once where that costs nothing."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values}, separators=(",", ":"))
        self._out.write(line.encode() + b"\n")
        if now or time.monotonic() - self._flushed >= self._every:
            self._out.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._out.close()


class Lines:
    """Reads what was added to a journal since the last call, in whole lines."""

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key
        self._cursor = Cursor()
        self._rest = b""

    def new(self) -> Iterator[str]:
        """The lines that were added."""
        data, self._cursor = self._store.read_from(self._key, self._cursor)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace")

    def events(self) -> Iterator[dict[str, Any]]:
        """The new lines as JSON; a line cut short by a kill is skipped."""
        for line in self.new():
            try:
                yield json.loads(line)
            except ValueError:
                continue
