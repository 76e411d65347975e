"""Where runs are carried out: one Protocol, whose implementations are loaded only when they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from launcher.errors import InfrastructureError
from launcher.journal import Lines
from launcher.pools import Pool
from launcher.runs import Run, State, all_runs


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
        """The runs in a storage that are carried out here, with their states."""

    def delete(self, run: Run) -> None:
        """Removes a run that is over, with all its files."""


def backend(pool: Pool) -> Backend:
    """The backend of a pool."""
    if pool.site is None:
        from launcher.backends.local import LocalBackend

        return LocalBackend()
    from launcher.backends.kuberay import KubeRayBackend

    return KubeRayBackend(pool, pool.cluster())


def runs_of(pool: str, storage: str) -> Iterator[Run]:
    """The runs in a storage that a pool carries out."""
    return (run for run in all_runs(storage) if run.pool() == pool)


def stored_logs(run: Run, over: Callable[[], bool], only: str = "") -> Iterator[tuple[str, str]]:
    """The log lines in a run directory, as `Backend.logs` gives them; `over` says whether more can come.

    A storage or a cluster that is away raises at the first look; later looks wait for it.
    """
    readers: dict[str, Lines] = {}
    started = False
    while True:
        added: list[tuple[str, str]] = []
        last = False
        try:
            last = over()
        except InfrastructureError:
            if not started:
                raise
        try:
            for entry in run.store.list("logs/"):
                source = entry.key.removeprefix("logs/").partition(".log")[0]
                if not only or source == only:
                    readers.setdefault(source, Lines(run.store, f"logs/{source}.log"))
            added = [(source, line) for source, lines in readers.items() for line in lines.new()]
        except InfrastructureError:
            if not started:
                raise
            last = False
        started = True
        yield from added
        if last:
            return
        yield "", ""
