"""Runs as processes of their own: seen, logged, stopped and taken up again from any other process.

Each test works through the same Protocol that every backend has, on a real supervisor and a real driver.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launcher.backends import Backend, backend
from launcher.errors import NotFinishedError, UserError
from launcher.journal import Lines
from launcher.runs import Run, State, Status
from tests.tiny import new_run

LONG = {"train__epochs": 300}
"""More epochs than a test waits for."""


@pytest.fixture
def local() -> Backend:
    return backend("local")


@pytest.fixture
def started(local: Backend, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs, and leaves none of them behind."""
    runs: list[Run] = []

    def start(name: str = "run", **settings: object) -> Run:
        run = new_run(tmp_path, name, **settings)
        runs.append(run)
        local.submit(run)
        return run

    yield start
    for run in runs:
        local.cancel(run, force=True)
    until(lambda: all(run.owner() is None for run in runs))


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    """Waits for a condition that other processes bring about."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not true():
        assert time.monotonic() < deadline, "it did not come about in time"
        pause.wait(0.05)


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


def ended(local: Backend, run: Run) -> State:
    until(lambda: local.status(run).status.final)
    return local.status(run)


def processes_of(run: Run) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if run.uri in (process.info["cmdline"] or []) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_a_run_goes_on_by_itself_and_is_seen_to_its_end(local: Backend, started: Callable[..., Run]) -> None:
    run = started(train__epochs=1)
    assert not local.status(run).status.final
    state = ended(local, run)
    assert state.status is Status.SUCCEEDED
    assert state.result["top1"] > 0
    until(lambda: not processes_of(run))
    assert run.owner() is None
    sources = {source for source, _ in local.logs(run)}
    assert {"driver", "rank-0"} <= sources
    assert [pair[0].name for pair in local.list(run.storage)] == ["run"]
    local.delete(run)
    assert not run.exists()


def test_a_cancelled_run_keeps_a_checkpoint_of_the_step_it_stopped_at(
    local: Backend, started: Callable[..., Run]
) -> None:
    run = started(**LONG)
    until(training(run))
    with pytest.raises(NotFinishedError):
        local.delete(run)
    with pytest.raises(UserError, match="running already"):
        local.submit(run)
    local.cancel(run)
    local.cancel(run)
    state = ended(local, run)
    assert state.status is Status.CANCELLED
    step = run.latest_step()
    assert step > 0
    until(lambda: not processes_of(run))
    local.submit(run)
    assert not local.status(run).status.final, "the old end is no longer its state"
    until(training(run, attempts=2))
    assert (
        next(
            event
            for event in Lines(run.store, "progress.jsonl").events()
            if event["event"] == "start" and event["step"]
        )["step"]
        == step
    )


def test_a_killed_driver_is_started_again_and_goes_on(local: Backend, started: Callable[..., Run]) -> None:
    run = started(**LONG, checkpoint__every_minutes=0.01)
    until(training(run, step=20))
    driver = next(process for process in processes_of(run) if "trainers.driver" in process.cmdline())
    driver.kill()
    until(training(run, attempts=2))
    assert local.status(run).status is Status.RUNNING
    assert local.status(run).attempt == 2
    retry = next(event for event in Lines(run.store, "events.jsonl").events() if event["event"] == "retry")
    assert "SIGKILL" in retry["error"]["what"]


def test_a_lost_supervisor_takes_its_driver_along_and_leaves_a_run_to_resume(
    local: Backend, started: Callable[..., Run]
) -> None:
    run = started(**LONG)
    until(training(run))
    owner = run.owner()
    assert owner is not None
    os.kill(owner.pid, signal.SIGKILL)
    until(lambda: not processes_of(run))
    assert local.status(run).status is Status.INTERRUPTED
    local.submit(run)
    until(training(run, attempts=2))


def test_a_terminated_supervisor_says_so(local: Backend, started: Callable[..., Run]) -> None:
    run = started(**LONG)
    until(training(run))
    owner = run.owner()
    assert owner is not None
    os.kill(owner.pid, signal.SIGTERM)
    state = ended(local, run)
    assert state.status is Status.INTERRUPTED
    until(lambda: not processes_of(run))


def test_a_forced_cancel_does_not_wait(local: Backend, started: Callable[..., Run]) -> None:
    run = started(**LONG)
    local.cancel(run, force=True)
    state = ended(local, run)
    assert state.status is Status.CANCELLED
    until(lambda: not processes_of(run))
