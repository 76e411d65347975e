"""A run on a cluster is submitted once, goes on after every loss, and is left only when its end is on record."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from launcher.runs import STRIKES, Run, Status, driver_command
from tests.ray_jobs import Dashboard
from tests.submitting import Lost, Scene, Time, failure, finish, new_head, nothing, retries, seal, supervise, together
from tests.tiny import new_run
from trainers.submitter import connect


@pytest.fixture
def head() -> Iterator[Dashboard]:
    with new_head() as dashboard:
        yield dashboard


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return new_run(tmp_path, "flowers")


# -- once


@pytest.mark.parametrize("status", [Status.SUCCEEDED, Status.FAILED, Status.CANCELLED])
def test_it_submits_the_driver_and_leaves_when_the_end_is_on_record(run: Run, head: Dashboard, status: Status) -> None:
    said = supervise(run, Time(nothing, nothing, finish(run, head, status)))
    assert head.submissions == 1
    assert head.jobs["flowers"]["entrypoint"] == driver_command(run.uri)
    assert said[-1] == f"the run is over: {status.lower()}"
    assert run.state().status is status
    assert retries(run) == []


def test_it_submits_once_however_often_it_is_restarted(run: Run, head: Dashboard) -> None:
    def lose() -> None:
        raise Lost

    for life in range(5):
        with pytest.raises(Lost):
            supervise(run, Time(*[nothing] * life, lose))
    supervise(run, Time(finish(run, head)))
    assert head.submissions == 1
    assert run.read_json("submission.json")["times"] == 1


def test_it_submits_once_if_the_answer_is_lost(run: Run, head: Dashboard) -> None:
    """Ray has the job, and nobody here knows; neither this submitter nor its next life may make another."""
    head.after = lambda line: not line.startswith("POST")
    supervise(run, Time(nothing, finish(run, head)))
    assert head.submissions == 1
    assert run.read_json("submission.json")["times"] == 1
    assert retries(run) == []


def test_a_submission_that_nobody_noted_counts_as_one(run: Run, head: Dashboard) -> None:
    """The submitter was lost between Ray's answer and its note; then the driver is killed."""
    connect().submit_job(entrypoint=driver_command(run.uri), submission_id="flowers")
    supervise(run, Time(lambda: head.end("FAILED", -9), nothing, finish(run, head)))
    assert head.submissions == 2
    assert run.read_json("submission.json")["times"] == 2
    assert [event["error"]["what"] for event in retries(run)] == ["the driver was killed (exit code -9)"]


def test_two_submitters_at_once_make_one_job(run: Run, head: Dashboard) -> None:
    """Of a pod on a lost node nobody knows whether it still runs."""
    first = iter([True])

    def race(line: str) -> None:
        if line.startswith("POST") and next(first, False):
            connect().submit_job(entrypoint=driver_command(run.uri), submission_id="flowers")

    head.before = race
    supervise(run, Time(nothing, finish(run, head)))
    assert len(head.jobs) == 1
    assert retries(run) == []


def test_a_resumed_run_is_a_new_submission(run: Run, head: Dashboard) -> None:
    supervise(run, Time(finish(run, head)), "a")
    first = run.read_json("submission.json")
    run.update(status=Status.PENDING)
    head.replace()
    supervise(run, Time(finish(run, head)), "b")
    assert head.submissions == 2
    second = run.read_json("submission.json")
    assert second["began"] > first["began"]
    assert second == {"id": "b", "began": second["began"], "times": 1, "strikes": 0, "step": -1}
    assert retries(run) == []


def test_a_run_that_is_over_is_not_submitted(run: Run, head: Dashboard) -> None:
    """`kubectl apply` of a manifest that has done its work already."""
    run.update(status=Status.SUCCEEDED)
    supervise(run, Time())
    assert head.submissions == 0


def test_a_run_that_was_cancelled_before_is_not_submitted(run: Run, head: Dashboard) -> None:
    run.request_cancel()
    supervise(run, Time())
    assert head.submissions == 0
    assert (run.state().status, run.state().reason) == (Status.CANCELLED, "it was cancelled before it began")
    assert not run.cancel_requested()


# -- the end of the driver


def test_the_cluster_stays_until_the_driver_has_left(run: Run, head: Dashboard) -> None:
    """It records the end before its last words are stored."""
    time = Time(lambda: run.update(status=Status.SUCCEEDED), *[nothing] * 5, lambda: head.end("SUCCEEDED", 0))
    supervise(run, time)
    assert time.pauses == 7


def test_a_driver_that_does_not_leave_is_not_waited_for(run: Run, head: Dashboard) -> None:
    time = Time(lambda: run.update(status=Status.SUCCEEDED))
    supervise(run, time)
    assert head.jobs["flowers"]["status"] == "RUNNING"
    assert 60 <= time.now < 70


@pytest.mark.parametrize("code", [0, 1, 2, 100])
def test_a_driver_that_ended_without_a_word_is_a_bug_and_not_tried_again(run: Run, head: Dashboard, code: int) -> None:
    said = "Job entrypoint command failed\nTraceback (most recent call last):\nImportError: no module named x\n\n  \n"
    supervise(run, Time(nothing, lambda: head.end("FAILED", code, said)))
    assert head.submissions == 1
    assert run.state().status is Status.FAILED
    assert type(failure(run)).__name__ == "BugError"
    assert failure(run).what == (
        f"the driver ended with exit code {code} before it could say why: ImportError: no module named x"
    )
    assert failure(run).hint == "launch logs flowers"


def test_an_end_that_is_recorded_at_the_last_moment_counts(run: Run, head: Dashboard) -> None:
    """The driver's record appears between the two looks, at the run and at the job."""

    def late(line: str) -> None:
        if line == "GET /api/jobs/flowers" and head.submissions:
            finish(run, head, Status.FAILED)()

    head.before = late
    supervise(run, Time())
    assert run.state().error is None
    assert run.state().status is Status.FAILED


@pytest.mark.parametrize("code", [None, 137, -9, 143])
def test_a_driver_that_was_killed_is_submitted_again(run: Run, head: Dashboard, code: int | None) -> None:
    def kill() -> None:
        seal(run, 40)
        head.end("FAILED", code, "the process is gone")

    supervise(run, Time(nothing, kill, nothing, finish(run, head)))
    assert head.submissions == 2
    assert head.count("DELETE", "/api/jobs/flowers") == 1
    (event,) = retries(run)
    assert event["step"] == 40
    assert event["error"]["what"].startswith("the driver was killed")


# -- the loss of the head


def test_a_head_that_was_replaced_gets_the_driver_again(run: Run, head: Dashboard) -> None:
    states = []

    def lose() -> None:
        seal(run, 120)
        head.replace()

    said = supervise(run, Time(nothing, lose, lambda: states.append(run.state()), finish(run, head)))
    assert head.submissions == 2
    assert [(event["step"], event["error"]["what"]) for event in retries(run)] == [(120, "the head was replaced")]
    assert [(state.status, state.reason) for state in states] == [(Status.RECOVERING, "the head was replaced")]
    assert "the head was replaced; going on from step 120" in said
    assert run.state().status is Status.SUCCEEDED


def test_losses_in_a_row_without_a_checkpoint_end_the_run(run: Run, head: Dashboard) -> None:
    supervise(run, Time(*[head.replace] * (STRIKES + 5)))
    assert head.submissions == STRIKES
    assert run.state().status is Status.FAILED
    assert type(failure(run)).__name__ == "InfrastructureError"
    assert failure(run).what == f"the head was replaced; {STRIKES} times in a row without a new checkpoint"
    assert "launch resume flowers" in failure(run).hint


def test_strikes_outlive_the_submitter(run: Run, head: Dashboard) -> None:
    def lose() -> None:
        head.replace()
        raise Lost

    for _ in range(STRIKES):
        with pytest.raises(Lost):
            supervise(run, Time(lose))
    supervise(run, Time())
    assert head.submissions == STRIKES
    assert run.state().status is Status.FAILED


def test_a_new_checkpoint_clears_the_strikes(run: Run, head: Dashboard) -> None:
    losses: list[Scene] = []
    for step in range(5):
        losses += [head.replace, together(partial(seal, run, 10 * step), head.replace)]
    supervise(run, Time(*losses, finish(run, head)))
    assert head.submissions == 1 + len(losses)
    assert run.state().status is Status.SUCCEEDED


def test_a_cancelled_run_is_not_submitted_to_a_new_head(run: Run, head: Dashboard) -> None:
    def lose() -> None:
        run.request_cancel()
        head.replace()

    supervise(run, Time(nothing, lose))
    assert head.submissions == 1
    assert (run.state().status, run.state().reason) == (Status.CANCELLED, "the head was replaced")
