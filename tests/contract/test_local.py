"""What only runs on this machine do: a supervisor that can be killed or terminated, and a driver under it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.backends import Backend
from launcher.journal import Lines
from launcher.runs import Run, Status
from tests.contract.grounds import LONG, Here, ended, planned, processes_of, training, until


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


@pytest.fixture
def local(here: Here) -> Backend:
    return here.backend()


@pytest.fixture
def started(here: Here, local: Backend) -> Iterator[Callable[..., Run]]:
    """Starts runs, and leaves none of them behind."""
    runs: list[Run] = []

    def start(name: str = "run", **settings: object) -> Run:
        run = planned(here, name, **settings)
        runs.append(run)
        local.submit(run)
        return run

    yield start
    for run in runs:
        local.cancel(run, force=True)
    until(lambda: all(run.owner() is None for run in runs))


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


@pytest.mark.slow
def test_a_terminated_supervisor_says_so(local: Backend, started: Callable[..., Run]) -> None:
    run = started(**LONG)
    until(training(run))
    owner = run.owner()
    assert owner is not None
    os.kill(owner.pid, signal.SIGTERM)
    state = ended(local, run)
    assert state.status is Status.INTERRUPTED
    until(lambda: not processes_of(run))
