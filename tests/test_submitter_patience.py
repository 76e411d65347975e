"""A submitter outlasts what is away for a while, ends what will never go on, and needs the manifest only."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import SiteError
from launcher.journal import Journal
from launcher.runs import Run, Status
from launcher.s3 import forget_s3_client
from tests.ray_jobs import Dashboard
from tests.submitting import TOKEN, Scene, Time, failure, finish, new_head, nothing, retries, seal, supervise, together
from tests.tiny import new_run
from trainers import submitter
from trainers.submitter import make_directory


@pytest.fixture
def head() -> Iterator[Dashboard]:
    with new_head() as dashboard:
        yield dashboard


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return new_run(tmp_path, "flowers")


# -- answers that do not come


def test_a_head_that_is_away_for_a_while_changes_nothing(run: Run, head: Dashboard) -> None:
    said = supervise(run, Time(nothing, head.stop, *[nothing] * 400, head.start, nothing, finish(run, head)))
    assert head.submissions == 1
    assert retries(run) == []
    assert sum("does not answer" in line for line in said) == 1, "said once, not at every look"
    assert run.state().status is Status.SUCCEEDED


def test_a_head_that_refuses_for_a_while_is_asked_again_and_the_loss_told_once(run: Run, head: Dashboard) -> None:
    """A new head's dashboard answers before it can take a job."""

    def break_down() -> None:
        head.replace()
        head.before = lambda line: setattr(head, "broken", "not ready yet" if line.startswith("POST") else "")

    def mend() -> None:
        head.before, head.broken = nothing, ""

    supervise(run, Time(nothing, break_down, *[nothing] * 20, mend, nothing, finish(run, head)))
    assert head.submissions > 10
    assert len(retries(run)) == 1
    assert run.read_json("submission.json")["times"] == 2


def test_an_answer_that_never_comes_is_given_up(run: Run, head: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other end of a connection to a lost node says nothing, for ever."""
    monkeypatch.setattr(submitter, "ANSWER_SECONDS", 0.3)
    silent, released = iter([True]), threading.Event()
    head.before = lambda line: released.wait() if line == "GET /api/jobs/flowers" and next(silent, False) else None
    try:
        said = supervise(run, Time(nothing, nothing, finish(run, head)))
    finally:
        released.set()
    assert "the head does not answer (ReadTimeout)" in said
    assert head.submissions == 1


@pytest.mark.parametrize(("token", "reason"), [(TOKEN, "does not answer"), ("another", "Authentication failed")])
def test_a_head_that_never_answered_ends_the_run_in_time(run: Run, head: Dashboard, token: str, reason: str) -> None:
    head.token = token
    if token == TOKEN:
        head.stop()
    moments = Time()
    supervise(run, moments)
    assert 600 < moments.now < 610
    assert run.state().status is Status.FAILED
    assert type(failure(run)).__name__ == "NeverStartedError"
    assert failure(run).what.startswith("Ray's head did not answer for 10 minutes (")
    assert reason in failure(run).what
    assert head.submissions == 0


def test_a_wrong_token_is_not_taken_for_a_head_without_a_job(run: Run, head: Dashboard) -> None:
    def change(token: str) -> Scene:
        return lambda: setattr(head, "token", token)

    supervise(run, Time(nothing, change("another"), *[nothing] * 400, change(TOKEN), nothing, finish(run, head)))
    assert head.refused > 0
    assert head.submissions == 1
    assert retries(run) == []
    assert run.state().status is Status.SUCCEEDED


@pytest.mark.parametrize("within", [False, True], ids=["between looks", "within a look"])
def test_a_storage_that_is_away_for_a_while_ends_nothing(
    bucket: str, head: Dashboard, monkeypatch: pytest.MonkeyPatch, within: bool
) -> None:
    """Away when the head is lost, between two looks or in the midst of one, and longer than a start may take."""
    run = new_run(f"{bucket}/runs", "flowers")
    there = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    def lead_to(address: str) -> Scene:
        return together(lambda: monkeypatch.setenv("AWS_ENDPOINT_URL", address), forget_s3_client)

    away, back = lead_to("http://127.0.0.1:9"), lead_to(there)

    def lose() -> None:
        head.replace()
        head.before = lambda _: away()

    def mend() -> None:
        head.before = nothing
        back()

    losing = lose if within else together(away, head.replace)
    said = supervise(run, Time(nothing, losing, *[nothing] * 350, mend, nothing, finish(run, head)))
    assert any("Could not connect to the endpoint" in line or "http://127.0.0.1:9" in line for line in said)
    assert run.state().status is Status.SUCCEEDED
    assert head.submissions == 2
    assert len(retries(run)) == 1


def test_a_storage_that_refuses_is_waited_for_once_the_run_has_begun_and_not_before(run: Run, head: Dashboard) -> None:
    """What credentials that expire look like; those that were never any good must not hold GPUs for hours."""
    good = run.store.read("state.json")

    def refuse() -> None:
        run.store.write("state.json", b"{")

    def relent() -> None:
        run.store.write("state.json", good)

    supervise(run, Time(nothing, refuse, *[nothing] * 100, relent, nothing, finish(run, head)))
    assert run.state().status is Status.SUCCEEDED
    assert head.submissions == 1
    run.store.delete("submission.json")
    refuse()
    with pytest.raises(SiteError):
        supervise(run, Time(), submission="b")


# -- signs of progress


def test_a_run_without_a_sign_of_progress_gives_its_gpus_back(run: Run, head: Dashboard) -> None:
    moments = Time()
    supervise(run, moments)
    assert 1800 <= moments.now < 1900
    assert head.count("POST", "/api/jobs/flowers/stop") == 1
    assert type(failure(run)).__name__ == "InfrastructureError"
    assert failure(run).what.startswith("no sign of progress for 30 minutes")
    assert failure(run).where == "limits.idle_minutes"


def test_a_run_that_is_slow_is_not_idle(run: Run, head: Dashboard) -> None:
    """A step an hour, a checkpoint, an index that takes its time, a step of one trial: any sign will do."""
    journal = Journal(run.store, "progress.jsonl")
    quiet = [nothing] * 120
    scenes = [
        *quiet, lambda: journal.write("step", step=1), *quiet, lambda: seal(run, 5), *quiet,
        lambda: run.store.write("index.parquet", b"x"), *quiet,
        lambda: run.trial(7).store.write("progress.jsonl", b"x"), *quiet, finish(run, head),
    ]  # fmt: skip
    moments = Time(*scenes)
    supervise(run, moments, idle_seconds=300)
    journal.close()
    assert moments.now > 4 * 300
    assert run.state().status is Status.SUCCEEDED
    assert head.count("POST", "/api/jobs/flowers/stop") == 0


# -- the run directory


def config_folder(run: Run, folder: Path) -> Path:
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps(run.spec().model_dump(mode="json")))
    (folder / "plan.json").write_text(json.dumps(run.plan()))
    return folder


def test_the_run_directory_is_made_from_the_manifest_where_there_is_none(run: Run, tmp_path: Path) -> None:
    config = config_folder(run, tmp_path / "config")
    new = Run(str(tmp_path / "elsewhere"), "flowers")
    make_directory(new, config)
    assert (new.spec(), new.plan()) == (run.spec(), run.plan())
    assert new.state().status is Status.PENDING


def test_a_run_directory_that_is_there_is_left_alone(run: Run, tmp_path: Path) -> None:
    config = config_folder(run, tmp_path / "config")
    (config / "spec.json").write_text("not even JSON")
    run.update(status=Status.RUNNING, attempt=3)
    before = {entry.key: run.store.read(entry.key) for entry in run.store.list()}
    make_directory(run, config)
    assert {entry.key: run.store.read(entry.key) for entry in run.store.list()} == before


def test_the_program_starts_from_nothing_but_a_manifest_and_keeps_its_log(head: Dashboard, tmp_path: Path) -> None:
    """As the pod runs it: a process of its own, and an address instead of a run directory."""
    config = config_folder(new_run(tmp_path / "here", "flowers"), tmp_path / "config")
    run = Run(str(tmp_path / "there"), "flowers")
    command = [sys.executable, "-m", "trainers.submitter", run.uri, "--config", str(config), "--submission", "a",
               "--start-seconds", "60", "--idle-seconds", "60"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not head.submissions:
            assert process.poll() is None
            time.sleep(0.05)
        finish(run, head)()
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == run.store.read("logs/submitter.log").decode()
    stamps, lines = zip(*(line.split(" ", 1) for line in said.splitlines()), strict=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", stamp) for stamp in stamps)
    assert lines[0] == f"submitted python -m trainers.driver {run.uri}"
    assert lines[-1] == "the run is over: succeeded"
