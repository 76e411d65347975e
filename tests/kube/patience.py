"""Waiting for what other threads and processes bring about, and saying what was there instead when it does not come.

An emulated cluster puts itself into `WATCHED` while it runs. A wait ends at once when one of its threads has died or
hangs, and names the state of the whole cluster when it ends in vain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

ENOUGH = 600.0
"""Seconds for anything that happens at all. How fast a machine is decides no test; the slowest just waits longer."""


class Watched(Protocol):
    """Something that works in the background while a test waits."""

    def check(self) -> None:
        """Raises if it no longer works."""

    def evidence(self) -> str:
        """What it looks like, for somebody who was not there."""


WATCHED: list[Watched] = []


def until(condition: Callable[[], object], seconds: float = 20, *, every: float = 0.02) -> None:
    """Waits for something to become true; fails the test if it does not."""
    __tracebackhide__ = True
    end = time.monotonic() + seconds
    while not condition():
        for one in WATCHED:
            one.check()
        if time.monotonic() >= end:
            seen = "\n".join(one.evidence() for one in WATCHED)
            raise AssertionError(f"it did not come about within {seconds:.0f} s\n{seen}")
        time.sleep(every)
