"""Timers of the emulated controllers: they run `speed` times as fast as the wall clock."""

from __future__ import annotations

import time


class Clock:
    """Moments by object and purpose, kept in process with more precision than the seconds of the API."""

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed
        self._moments: dict[tuple[str, str], float] = {}
        self._notes: dict[tuple[str, str], str] = {}

    def mark(self, uid: str, what: str) -> None:
        """Starts a timer anew."""
        self._moments[uid, what] = time.monotonic()

    def clear(self, uid: str, what: str) -> None:
        """Forgets a timer."""
        self._moments.pop((uid, what), None)

    def passed(self, uid: str, what: str, seconds: float) -> bool:
        """Whether so many emulated seconds have passed since a timer began; one that did not begin begins now."""
        began = self._moments.setdefault((uid, what), time.monotonic())
        return (time.monotonic() - began) * self.speed >= seconds

    def postpone(self, uid: str, what: str, seconds: float, note: str = "") -> None:
        """Nothing of this kind before so many emulated seconds are over."""
        self._moments[uid, "not before " + what] = time.monotonic() + seconds / self.speed
        self._notes[uid, what] = note

    def ready(self, uid: str, what: str) -> bool:
        """Whether nothing is postponed."""
        return time.monotonic() >= self._moments.get((uid, "not before " + what), 0.0)

    def note(self, uid: str, what: str) -> str:
        """Why it was postponed."""
        return self._notes.get((uid, what), "")
