"""Kill -9 of a sweep's driver and of its trials: nothing that ended is trained again, nothing is lost or left."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import pytest

from launcher.backends import backend
from launcher.journal import Lines
from launcher.pools import find_pool
from launcher.runs import Run, Status
from launcher.sweeps import Ledger, Outcome
from tests.contract.grounds import processes_of, until
from tests.faults.test_kill import children, driver_of, words
from tests.sweeping import new_sweep, run_to_end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def rungs(sweep: Run) -> set[tuple[int, int]]:
    """The trials that are known to have come to a rung, and its epoch."""
    return {(trial.number, epoch["epoch"]) for trial in Ledger.load(sweep).trials
            for epoch in trial.epochs if epoch["epoch"] in (1, 3)}  # fmt: skip


def begun(sweep: Run) -> list[int]:
    events = Lines(sweep.store, "progress.jsonl").events()
    return [event["number"] for event in events if event["event"] == "trial"]


def test_a_driver_killed_after_every_rung_in_turn_runs_no_finished_trial_again(tmp_path: Path) -> None:
    whole = new_sweep(tmp_path, "whole", sweep__search="random", train__epochs=4)
    assert run_to_end(whole).status is Status.SUCCEEDED

    sweep = new_sweep(tmp_path, "broken", sweep__search="random", train__epochs=4)
    local, known, kills = backend(find_pool("local")), rungs(sweep), 0
    local.submit(sweep)
    done: dict[int, list[int]] = {}
    while not local.status(sweep).status.final:
        if rungs(sweep) > known and (driver := driver_of(sweep)) is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                driver.kill()
                driver.wait(30)
                kills += 1
            known = rungs(sweep)
            ended = [trial for trial in Ledger.load(sweep).trials if trial.outcome.final]
            done |= {trial.number: begun(sweep) for trial in ended if trial.number not in done}
    assert local.status(sweep).status is Status.SUCCEEDED
    assert kills >= 3

    ledger, expected = Ledger.load(sweep), Ledger.load(whole)
    assert {trial.number: trial.settings for trial in ledger.trials} == {
        trial.number: trial.settings for trial in expected.trials
    }
    for number, then in done.items():
        assert begun(sweep)[len(then) :].count(number) == 0, f"trial {number} had ended and was begun again"
    best, reference = ledger.ranked()[0], expected.ranked()[0]
    assert best.values(ledger.objectives) == reference.values(expected.objectives)
    until(lambda: processes_of(sweep) == [])


def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path, sweep__trials=2, sweep__scheduler="none", train__epochs=6, train__batch_size=16)
    local = backend(find_pool("local"))
    local.submit(sweep)
    until(lambda: any(len(trial.epochs) >= 2 for trial in Ledger.load(sweep).trials), 240)
    driver = driver_of(sweep)
    assert driver is not None
    next(child for child in children(driver) if "Trainable" in " ".join(words(child))).kill()
    until(lambda: local.status(sweep).status.final, 300)
    assert local.status(sweep).status is Status.SUCCEEDED
    ledger = Ledger.load(sweep)
    assert [trial.outcome for trial in ledger.trials] == [Outcome.FINISHED] * 2
    assert sum(trial.retries for trial in ledger.trials) == 1
    assert all([epoch["epoch"] for epoch in trial.epochs] == [1, 2, 3, 4, 5, 6] for trial in ledger.trials)
    lost = next(trial for trial in ledger.trials if trial.retries)
    starts = [event["step"] for event in Lines(sweep.trial(lost.number).store, "progress.jsonl").events()
              if event["event"] == "start"]  # fmt: skip
    assert starts[-1] > 0, "it went on where it was"
