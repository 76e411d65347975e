"""Kill -9 of anything, at any moment: the run goes on and ends with the same weights, bit for bit."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.backends import Backend, backend
from launcher.journal import Lines
from launcher.pools import find_pool
from launcher.runs import Run, Status
from tests.contract.grounds import until
from tests.tiny import new_run, weights

SETTINGS: dict[str, Any] = {"train__epochs": 2, "train__batch_size": 16, "checkpoint__every_minutes": 0.02}


def finish(local: Backend, run: Run) -> Run:
    """Brings a run to its end, as a user would who sees it fail for want of luck."""
    while True:
        until(lambda: local.status(run).status.final, 600)
        if local.status(run).status is Status.SUCCEEDED:
            until(lambda: run.owner() is None)
            return run
        assert local.status(run).status in (Status.FAILED, Status.INTERRUPTED)
        error = local.status(run).error
        assert error is None or error["family"] == "infrastructure", error
        until(lambda: run.owner() is None)
        local.submit(run)


def driver_of(run: Run) -> psutil.Process | None:
    for process in psutil.process_iter(["cmdline"]):
        if {"trainers.driver", run.uri} <= set(process.info["cmdline"] or []):
            return process
    return None


def worker_of(run: Run, chance: random.Random) -> psutil.Process | None:
    """One of the processes that Ray Train started for the ranks of a run."""
    driver = driver_of(run)
    if driver is None:
        return None
    workers = [child for child in children(driver) if "RayTrainWorker" in " ".join(words(child))]
    return chance.choice(workers) if workers else None


def children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(process.children(recursive=True))
    return []


def words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(process.cmdline())
    return []


def kill(run: Run, times: int, victim: Callable[[int], psutil.Process | None], chance: random.Random) -> int:
    """Kills a process of the run at random moments of its training; how often it came to that before the end."""
    events, starts, killed = Lines(run.store, "progress.jsonl"), 0, 0
    local = backend(find_pool("local"))
    pause = threading.Event()
    while killed < times:
        began = starts
        while starts == began:
            if local.status(run).status is Status.SUCCEEDED:
                return killed
            if local.status(run).status.final:
                until(lambda: run.owner() is None)
                local.submit(run)
            starts += sum(event["event"] == "start" for event in events.events())
            pause.wait(0.05)
        pause.wait(chance.uniform(0.0, 2.0))
        process = victim(killed)
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                killed += 1
    return killed


def test_a_run_whose_process_is_killed_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    local, chance = backend(find_pool("local")), random.Random(1)
    whole = new_run(tmp_path, "whole", **SETTINGS)
    local.submit(whole)
    finish(local, whole)
    broken = new_run(tmp_path, "broken", **SETTINGS)
    local.submit(broken)
    killed = kill(broken, 1, lambda _: driver_of(broken), chance)
    finish(local, broken)
    assert killed == 1
    assert weights(broken) == weights(whole)
    assert broken.metrics()["final"] == whole.metrics()["final"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("workers", [1, 2])
def test_twenty_kills_in_a_row_change_nothing(tmp_path: Path, workers: int) -> None:
    local, chance = backend(find_pool("local")), random.Random(20 + workers)
    settings = SETTINGS | {"train__epochs": 30}
    whole = new_run(tmp_path, "whole", **settings, resources__workers=workers)
    local.submit(whole)
    finish(local, whole)
    broken = new_run(tmp_path, "broken", **settings, resources__workers=workers)
    local.submit(broken)

    def victim(number: int) -> psutil.Process | None:
        return worker_of(broken, chance) if workers > 1 and number % 2 else driver_of(broken)

    killed = kill(broken, 20, victim, chance)
    finish(local, broken)
    assert killed == 20
    assert weights(broken) == weights(whole)
