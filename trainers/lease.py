"""Says in the run directory that this process drives the run, and ends it when another has taken over.

On a laptop the supervisor does this; in a cluster, where a head may be replaced while the old one still trains behind
a broken network, the driver itself. Of two drivers the one with the higher attempt goes on.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from types import TracebackType
from typing import Any

from launcher.errors import Exit, FencedError, LaunchError, UserError
from launcher.runs import LEASE_SECONDS, Owner, Run

log = logging.getLogger(__name__)

EVERY_SECONDS = 15.0
NOT_BEGUN = 75
"""Exit code of a driver that could not take an attempt and recorded nothing: storage away, or another drives (sysexits'
EX_TEMPFAIL)."""


def wait_for_others(run: Run) -> None:
    """Returns once nobody else drives the run: a lost driver's lease ends by itself."""
    me, deadline = Owner.me(), time.monotonic() + 2 * LEASE_SECONDS
    while (other := run.owner()) is not None and other != me:
        if time.monotonic() > deadline:
            raise UserError(f"{run.name} is driven on {other.host} already", where=run.uri,
                            hint=f"launch status {run.name}")  # fmt: skip
        time.sleep(1.0)


class Lease:
    """Held while the block runs. `record` is the attempt's, to which the time of the last sign of life is added."""

    def __init__(self, run: Run, attempt: int, record: dict[str, Any]) -> None:
        self._run, self._attempt, self._record = run, attempt, record
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._confirm, daemon=True, name="lease")

    def __enter__(self) -> Lease:
        try:
            self._hold()
        except LaunchError as error:  # the attempt's number is taken, which is what keeps others out
            log.warning("the lease was not confirmed: %s", error)
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        try:
            if self._run.owner() == Owner.me():
                self._run.release()
        except LaunchError as error:  # it ends by itself
            log.warning("the lease was not given up: %s", error)

    def _confirm(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            try:
                self._run.check_attempt(self._attempt)
                self._hold()
            except FencedError:
                log.exception("ending at once")
                os._exit(Exit.NOT_FINISHED)
            except LaunchError as error:
                log.warning("the lease was not confirmed: %s", error)

    def _hold(self) -> None:
        self._run.hold(Owner.me())
        key = f"attempts/{self._attempt:04d}.json"
        # By now the driver may have added how the attempt ended.
        record = {**self._record, **(self._run.read_json(key) or {}), "seen": time.time()}
        self._run.write_json(key, record)
