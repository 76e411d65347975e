"""Lives of a submitter against a head's dashboard, with a clock and a plot: what happens in which of its pauses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from launcher.errors import LaunchError, from_record
from launcher.journal import Lines
from launcher.runs import Run, Status
from tests.ray_jobs import Dashboard
from trainers.submitter import Submitter, connect

TOKEN = "token-of-this-cluster"
Scene = Callable[[], object]


class Lost(Exception):
    """The pod of the submitter is gone."""


class Time:
    """The clock of a submitter. In each of its pauses the next scene is played; after the last one nothing happens."""

    def __init__(self, *scenes: Scene) -> None:
        self.now = 0.0
        self.scenes = list(scenes)
        self.pauses = 0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses += 1
        assert self.pauses < 3_000, "it goes on for ever"
        if self.scenes:
            self.scenes.pop(0)()


@contextmanager
def new_head() -> Iterator[Dashboard]:
    """A head's dashboard, and an environment as KubeRay makes it for a submitter."""
    from ray._private.authentication_test_utils import reset_auth_token_state

    with Dashboard(TOKEN) as dashboard, pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_DASHBOARD_ADDRESS", f"127.0.0.1:{dashboard.port}")
        patch.setenv("RAY_JOB_SUBMISSION_ID", "flowers")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        reset_auth_token_state()
        yield dashboard
    reset_auth_token_state()


def supervise(run: Run, time: Time, submission: str = "a", idle_seconds: float = 1800) -> list[str]:
    """One life of a submitter; what it said."""
    said: list[str] = []
    Submitter(
        run, connect, said.append, submission=submission, start_seconds=600, idle_seconds=idle_seconds,
        sleep=time.sleep, clock=lambda: time.now,
    ).supervise()  # fmt: skip
    return said


def finish(run: Run, head: Dashboard, status: Status = Status.SUCCEEDED) -> Scene:
    """The driver records an end, and ends."""

    def scene() -> None:
        run.update(status=status)
        head.end("SUCCEEDED" if status is Status.SUCCEEDED else "FAILED", int(status.exit_code))

    return scene


def seal(run: Run, step: int) -> None:
    run.store.write(f"checkpoints/step-{step:08d}/manifest.json", b"{}")


def together(*scenes: Scene) -> Scene:
    """Several things in one pause."""

    def scene() -> None:
        for each in scenes:
            each()

    return scene


def retries(run: Run) -> list[dict[str, Any]]:
    return [event for event in Lines(run.store, "events.jsonl").events() if event["event"] == "retry"]


def failure(run: Run) -> LaunchError:
    record = run.state().error
    assert record is not None
    return from_record(record)


def nothing(*_: object) -> None:
    """A pause in which all stays as it is."""
