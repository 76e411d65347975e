"""Where runs are carried out: one Protocol, and a table that loads an implementation only when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Protocol

from launcher.runs import Run, State

_BACKENDS = {"local": "launcher.backends.local:LocalBackend"}


class Backend(Protocol):
    """What a place that runs things can do. Every verb may be called from any machine and at any time."""

    def submit(self, run: Run) -> None:
        """Starts the run, or goes on with it; returns once it no longer depends on this process."""

    def status(self, run: Run) -> State:
        """Where the run stands, also if whoever drove it is gone."""

    def logs(self, run: Run, only: str = "") -> Iterator[tuple[str, str]]:
        """New log lines since the last yield, as (source, line); ends when there are none and the run is over."""

    def cancel(self, run: Run, *, force: bool = False) -> None:
        """Asks the run to save and stop; with `force` it is killed. Calling it again changes nothing."""

    def list(self, storage: str) -> Iterator[tuple[Run, State]]:
        """All runs in a storage with their states."""

    def delete(self, run: Run) -> None:
        """Removes a run that is over, with all its files."""


def backend(pool: str) -> Backend:
    """The backend of a pool."""
    module, _, name = _BACKENDS[pool].partition(":")
    made: Backend = getattr(import_module(module), name)()
    return made
