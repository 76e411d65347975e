"""Where the contract of `Backend` is tried: this machine, and a cluster that is emulated or real."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil

from launcher.backends import Backend, backend
from launcher.cluster import PODS
from launcher.journal import Lines
from launcher.labels import ROLE_LABEL, RUN_LABEL
from launcher.pools import Place, Pool, find_pool
from launcher.runs import Run, State
from tests.kube import patience
from tests.tiny import new_run

LONG = {"train__epochs": 300}
"""More epochs than a test waits for."""


class Ground(Protocol):
    """What a test needs beside the backend itself."""

    pool: Pool
    storage: str

    def backend(self) -> Backend:
        """A backend that knows nothing yet, as another machine has it."""

    def holds(self, run: Run) -> list[str]:
        """Names of the processes or pods that the run still has."""

    def lose_driver(self, run: Run) -> None:
        """The driver goes without a word."""


class Here:
    """This machine: a supervisor, and processes below it."""

    def __init__(self, folder: Path) -> None:
        self.pool = find_pool("local")
        self.storage = str(folder)

    def backend(self) -> Backend:
        return backend(self.pool)

    def holds(self, run: Run) -> list[str]:
        return [str(process.pid) for process in processes_of(run)]

    def lose_driver(self, run: Run) -> None:
        next(process for process in processes_of(run) if "trainers.driver" in process.cmdline()).kill()


class OnCluster:
    """A pool of a cluster. The head, and with it the driver, is lost by deleting its pod."""

    def __init__(self, pool: Pool) -> None:
        assert pool.site is not None
        self.pool = pool
        self.storage = pool.site.storage
        self.cluster = pool.cluster()

    def backend(self) -> Backend:
        return backend(self.pool)

    def holds(self, run: Run) -> list[str]:
        pods = self.cluster.objects(PODS, labels=f"{RUN_LABEL}={run.name}")
        phases = {pod["metadata"]["name"]: (pod.get("status") or {}).get("phase") for pod in pods}
        return [name for name, phase in phases.items() if phase not in ("Succeeded", "Failed")]

    def lose_driver(self, run: Run) -> None:
        for pod in self.cluster.objects(PODS, labels=f"{RUN_LABEL}={run.name},{ROLE_LABEL}=head"):
            self.cluster.delete(PODS, pod["metadata"]["name"])


def real_cluster() -> OnCluster | None:
    """The cluster that `RAYLAUNCH_TEST_CONTEXT` names, with the pool `RAYLAUNCH_TEST_POOL` (by default `cpu-pool`)."""
    context = os.environ.get("RAYLAUNCH_TEST_CONTEXT")
    if not context:
        return None
    place = Place(context, os.environ.get("RAYLAUNCH_TEST_NAMESPACE"))
    return OnCluster(find_pool(os.environ.get("RAYLAUNCH_TEST_POOL") or "cpu-pool", place))


def planned(ground: Ground, name: str, **settings: Any) -> Run:
    """A run on the ground that is recorded and not submitted."""
    return new_run(ground.storage, name, ground.pool, **settings)


def until(true: Callable[[], bool], seconds: float = 120.0, every: float = 0.05) -> None:
    """Waits for a condition that other processes bring about."""
    __tracebackhide__ = True
    patience.until(true, seconds, every=every)


def training(run: Run, attempts: int = 1, step: int = 1) -> Callable[[], bool]:
    """Whether the run has made steps in its attempt of that number."""
    events = Lines(run.store, "progress.jsonl")
    starts = 0
    seen = 0

    def check() -> bool:
        nonlocal starts, seen
        for event in events.events():
            starts += event["event"] == "start"
            seen = max(seen, event.get("step", 0))
        return starts >= attempts and seen >= step

    return check


def ended(engine: Backend, run: Run, seconds: float = 300.0) -> State:
    """The run's last state, once it has one."""
    until(lambda: engine.status(run).status.final, seconds)
    return engine.status(run)


def processes_of(run: Run) -> list[psutil.Process]:
    """The processes of a run on this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if run.uri in (process.info["cmdline"] or []) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found
