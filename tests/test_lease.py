"""One driver drives a run: others wait or are refused, and one that was replaced stops, and seals nothing more."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from launcher import runs
from launcher.errors import Exit, FencedError, UserError
from launcher.runs import Owner, Run, checkpoint_steps
from launcher.s3 import forget_s3_client
from tests.tiny import new_run
from trainers import checkpoint, lease
from trainers.checkpoint import Saver, Snapshot
from trainers.lease import Lease, wait_for_others

ELSEWHERE = Owner("gpu-pool-a1", "another-boot", 1, 0.0)
DRIVER = """
import sys, time
from launcher.runs import Run
from trainers import lease
lease.EVERY_SECONDS = 0.1
with lease.Lease(Run.at(sys.argv[1]), 1, {"began": 1.0}):
    print("holds", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return new_run(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that end after a second, and are confirmed ten times in it."""
    for module in (runs, lease):
        monkeypatch.setattr(module, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "EVERY_SECONDS", 0.1)


def held_by(run: Run, owner: Owner, age: float) -> None:
    run.write_json("lease.json", {"owner": asdict(owner), "confirmed": time.time() - age})


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def seconds(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, "fingerprint", {"weights": {"w": torch.zeros(2)}}, {"epoch": 1})


# -- waiting for others


def test_a_driver_that_is_alone_does_not_wait(run: Run) -> None:
    assert seconds(lambda: wait_for_others(run)) < 0.9
    run.hold(Owner.me())
    assert seconds(lambda: wait_for_others(run)) < 0.9


def test_a_driver_that_died_on_this_machine_is_not_waited_for(run: Run) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    held_by(run, replace(Owner.me(), pid=process.pid), age=0)
    assert seconds(lambda: wait_for_others(run)) < 0.9


@pytest.mark.usefixtures("quick")
def test_the_lease_of_a_lost_node_is_waited_for_until_it_ends(run: Run) -> None:
    held_by(run, ELSEWHERE, age=0.2)
    assert 0.5 < seconds(lambda: wait_for_others(run)) < 2.5
    held_by(run, ELSEWHERE, age=3600)
    assert seconds(lambda: wait_for_others(run)) < 0.9


@pytest.mark.usefixtures("quick")
def test_a_run_that_others_drive_is_refused(run: Run) -> None:
    # Confirmed over and over, as it were: it does not end while we wait.
    held_by(run, ELSEWHERE, age=-60)
    with pytest.raises(UserError) as raised:
        wait_for_others(run)
    assert raised.value.what == "run is driven on gpu-pool-a1 already"
    assert raised.value.hint == "launch status run"


# -- holding it


@pytest.mark.usefixtures("quick")
def test_a_lease_is_confirmed_while_it_is_held_and_given_up_at_the_end(run: Run) -> None:
    record = {"began": time.time(), "host": "here", "from_step": -1}
    number = run.begin_attempt(record)
    with Lease(run, number, record):
        assert run.owner() == Owner.me()
        first = run.read_json("attempts/0001.json")
        assert first == record | {"seen": first["seen"]}
        until(lambda: run.read_json("attempts/0001.json")["seen"] > first["seen"] + 1.2)
        assert run.owner() == Owner.me(), "longer than an unconfirmed one"
        assert run.hours() * 3600 > 1.2, "what a driver cost is known even if it is killed"
    assert run.owner() is None
    assert run.read_json("lease.json") is None


@pytest.mark.usefixtures("quick")
def test_the_end_of_an_attempt_stays_on_record(run: Run) -> None:
    """The driver writes it while the lease is still held and confirmed."""
    number = run.begin_attempt({"began": 1.0})
    with Lease(run, number, {"began": 1.0}):
        run.write_json("attempts/0001.json", {"began": 1.0, "ended": 5.0, "outcome": "SUCCEEDED"})
        until(lambda: "seen" in run.read_json("attempts/0001.json"))
    found = run.read_json("attempts/0001.json")
    assert (found["ended"], found["outcome"]) == (5.0, "SUCCEEDED")


def test_a_lease_that_was_taken_over_is_not_given_up_for_the_other(run: Run) -> None:
    with Lease(run, run.begin_attempt({}), {}):
        held_by(run, ELSEWHERE, age=0)
    assert run.owner() == ELSEWHERE


@pytest.mark.usefixtures("quick")
def test_a_storage_that_is_away_costs_no_driver_its_life(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run(f"{bucket}/runs")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_s3_client()
    with monkeypatch.context() as away, Lease(run, run.begin_attempt({}), {}):
        away.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        forget_s3_client()
        until(lambda: "the lease was not confirmed" in caplog.text)
        away.undo()
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        forget_s3_client()
        back = time.time()
        until(lambda: run.read_json("attempts/0001.json")["seen"] > back)
        away.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        forget_s3_client()
    assert "the lease was not given up" in caplog.text
    forget_s3_client()


# -- losing it


def test_a_driver_that_was_replaced_ends_at_once(run: Run) -> None:
    run.begin_attempt({})
    with subprocess.Popen([sys.executable, "-c", DRIVER, run.uri], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        assert process.poll() is None
        run.begin_attempt({"host": "gpu-pool-b7"})
        assert process.wait(timeout=20) == Exit.NOT_FINISHED
    # It takes nothing with it that may be the other's by now.
    assert run.read_json("lease.json") is not None
    assert run.read_json("attempts/0002.json")["host"] == "gpu-pool-b7"


def test_a_checkpoint_of_a_replaced_attempt_is_never_sealed(run: Run) -> None:
    number = run.begin_attempt({})
    checkpoint.save(run.store, snapshot(10), lambda: run.check_attempt(number))
    assert checkpoint_steps(run.store) == [10]
    run.begin_attempt({})
    with pytest.raises(FencedError, match="attempt 2 has taken over from attempt 1"):
        checkpoint.save(run.store, snapshot(20), lambda: run.check_attempt(number))
    assert checkpoint_steps(run.store) == [10]
    checkpoint.save(run.store, snapshot(20), lambda: run.check_attempt(number + 1))
    assert checkpoint_steps(run.store) == [10, 20]


def test_the_training_learns_that_its_attempt_was_replaced(run: Run) -> None:
    """Checkpoints are written in the background; the next call to the saver raises what kept one from being sealed."""
    number = run.begin_attempt({})
    saved: list[int] = []
    saver = Saver(run.store, 2, lambda step, _: saved.append(step), lambda: run.check_attempt(number))
    saver.save(snapshot(10), None)
    saver.finish()
    run.begin_attempt({})
    saver.save(snapshot(20), None)
    with pytest.raises(FencedError):
        saver.finish()
    assert saved == checkpoint_steps(run.store) == [10]
