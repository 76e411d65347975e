"""The ways a sweep can go: every scheduler, trials of several workers, ended by the user or the clock, refitted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.backends import backend
from launcher.journal import Lines
from launcher.pools import find_pool
from launcher.runs import Run, Status
from launcher.sweeps import Ledger, Outcome
from tests.contract.grounds import processes_of, until
from tests.sweeping import new_sweep, run_to_end

pytestmark = pytest.mark.timeout(600)


def outcomes(sweep: Run) -> list[Outcome]:
    return [trial.outcome for trial in Ledger.load(sweep).trials]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_trials_that_stop_leave_no_placement_group_and_no_core_booked(tmp_path: Path, workers: int) -> None:
    points = [{"optim.lr": 0.003, "augment.policy": "none"}, {"optim.lr": 0.004, "augment.policy": "none"}]
    sweep = new_sweep(
        tmp_path, sweep__trials=4, sweep__points=points, sweep__concurrent=2 // workers, resources__workers=workers
    )
    found = subprocess.run(
        [sys.executable, "-m", "tests.sweep_and_look", sweep.uri], capture_output=True, text=True, check=False
    )
    said = json.loads(found.stdout.splitlines()[-1])
    assert Outcome.STOPPED in outcomes(sweep), "otherwise nothing was tried"
    assert said["code"] == 0, found.stderr[-2000:]
    assert set(said["groups"]) <= {"REMOVED"}
    assert said["held"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_trial_that_waited_at_a_rung_goes_on_from_its_checkpoint_once_worse_ones_have_come(
    tmp_path: Path, workers: int
) -> None:
    space, points = {"optim.lr": {"loguniform": [0.0001, 0.1]}}, [{"optim.lr": 0.05}, {"optim.lr": 0.0001}]
    sweep = new_sweep(tmp_path, optim__lr=0.0001, sweep__trials=3, sweep__space=space, sweep__points=points,
                      sweep__concurrent=1, resources__workers=workers)  # fmt: skip
    assert run_to_end(sweep, 550).status is Status.SUCCEEDED
    ledger = Ledger.load(sweep)
    begun = [event["number"] for event in Lines(sweep.store, "progress.jsonl").events() if event["event"] == "trial"]
    assert begun == [1, 2, 3, 2]
    assert outcomes(sweep) == [Outcome.FINISHED, Outcome.FINISHED, Outcome.STOPPED]
    assert [len(trial.epochs) for trial in ledger.trials] == [3, 3, 1]
    assert [epoch["epoch"] for epoch in ledger.trials[1].epochs] == [1, 2, 3]
    assert (ledger.best, ledger.trials[2].reason) == (2, "not among the best 1 in 3 at epoch 1")
    starts = [event["step"] for event in Lines(sweep.trial(2).store, "progress.jsonl").events()
              if event["event"] == "start"]  # fmt: skip
    assert starts[0] == 0 < starts[1]
    waited, worse = ledger.trials[1:]
    assert waited.seconds + worse.seconds <= (waited.ended or 0.0) - (waited.began or 0.0), "it held nothing meanwhile"


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["hyperband", "median"])
def test_schedulers_that_pause_or_compare_come_to_an_end_with_a_best_trial(tmp_path: Path, scheduler: str) -> None:
    space: dict[str, Any] = {"optim.lr": {"loguniform": [0.0003, 0.3]}, "optim.label_smoothing": {"choice": [0.0, 0.1]}}
    sweep = new_sweep(tmp_path, sweep__scheduler=scheduler, sweep__space=space, sweep__trials=5, train__epochs=4)
    assert run_to_end(sweep, 400).status is Status.SUCCEEDED
    ledger = Ledger.load(sweep)
    assert {trial.outcome for trial in ledger.trials} <= {Outcome.FINISHED, Outcome.STOPPED}
    assert all([epoch["epoch"] for epoch in trial.epochs] == sorted({epoch["epoch"] for epoch in trial.epochs})
               for trial in ledger.trials)  # fmt: skip
    assert any(sweep.store.list("model/weights.safetensors"))


@pytest.mark.slow
def test_pbt_gives_a_bad_trial_the_weights_of_a_good_one_and_other_settings(tmp_path: Path) -> None:
    space = {"optim.lr": {"loguniform": [0.0001, 0.1]}}
    points = [{"optim.lr": 0.0001}, {"optim.lr": 0.00011}]
    sweep = new_sweep(tmp_path, sweep__scheduler="pbt", sweep__space=space, sweep__trials=3, sweep__points=points,
                      sweep__concurrent=2, train__epochs=6, optim__lr=0.05)  # fmt: skip
    assert run_to_end(sweep, 400).status is Status.SUCCEEDED
    changed = [trial for trial in Ledger.load(sweep).trials if trial.changes()]
    assert changed, "a trial with a useless learning rate takes over from one with a good one"
    for trial in changed:
        jump = next(epoch for epoch in trial.epochs if "settings" in epoch)
        before = [epoch["top1"] for epoch in trial.epochs if epoch["epoch"] < jump["epoch"]]
        assert jump["top1"] > max(before)
        assert sweep.trial(trial.number).spec().optim.lr == trial.settings["optim.lr"]


@pytest.mark.slow
def test_a_grid_of_networks_is_tried_whole_and_its_pareto_front_told(tmp_path: Path) -> None:
    space = {"model.name": {"grid": ["test_resnet", "test_efficientnet"]}}
    objectives = {"top1": "max", "parameters": "min"}
    sweep = new_sweep(tmp_path, sweep__search="grid", sweep__scheduler="none", sweep__space=space, sweep__trials=2,
                      train__epochs=2)  # fmt: skip
    spec = sweep.spec()
    assert spec.sweep is not None
    sweep.set_spec(spec.updated({"sweep.search": "random", "sweep.objectives": objectives}), sweep.plan())
    assert run_to_end(sweep).status is Status.SUCCEEDED
    ledger = Ledger.load(sweep)
    assert ledger.objectives == objectives
    assert ledger.front()
    assert {trial.settings["model.name"] for trial in ledger.trials} <= {"test_resnet", "test_efficientnet"}


@pytest.mark.slow
def test_the_refit_sees_the_validation_images_and_says_so(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path, sweep__trials=2, sweep__refit=True, train__epochs=2)
    assert run_to_end(sweep).status is Status.SUCCEEDED
    ledger, again = Ledger.load(sweep), Run(sweep.uri, "refit")
    assert ledger.refit is not None
    assert ledger.refit["seen"] is True
    assert again.metrics()["epochs"][0]["step"] > sweep.trial(1).metrics()["epochs"][0]["step"]
    assert sweep.store.read("model/weights.safetensors") == again.store.read("model/weights.safetensors")
    assert sweep.state().result["top1"] == sweep.trial(ledger.best or 0).metrics()["final"]["top1"]
    assert "not held-out" in again.store.read("report.html").decode()


@pytest.mark.slow
def test_a_cancelled_sweep_keeps_what_is_done_and_goes_on_where_it_was(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path, sweep__trials=3, sweep__scheduler="none", train__epochs=8)
    local = backend(find_pool("local"))
    local.submit(sweep)
    until(lambda: any(trial.epochs for trial in Ledger.load(sweep).trials), 120)
    local.cancel(sweep)
    until(lambda: local.status(sweep).status.final, 120)
    assert local.status(sweep).status is Status.CANCELLED
    until(lambda: processes_of(sweep) == [])
    before = Ledger.load(sweep)
    assert before.epochs() > 0
    assert Outcome.RUNNING not in {trial.outcome for trial in before.trials}

    spec = sweep.spec()
    sweep.set_spec(spec.updated({"sweep.trials": 2}), sweep.plan())
    assert run_to_end(sweep).status is Status.SUCCEEDED
    after = Ledger.load(sweep)
    for old, new in zip(before.trials, after.trials, strict=False):
        assert new.settings == old.settings
        assert new.epochs[: len(old.epochs)] == old.epochs, "no epoch was trained again"
    starts = [event["step"] for event in Lines(sweep.trial(1).store, "progress.jsonl").events()
              if event["event"] == "start"]  # fmt: skip
    assert starts[0] == 0 < starts[1]


@pytest.mark.slow
def test_when_the_time_is_up_the_best_of_what_there_is_counts(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path, sweep__trials=50, sweep__time_limit=60 / 3600, train__epochs=200)
    assert run_to_end(sweep).status is Status.SUCCEEDED
    ledger = Ledger.load(sweep)
    assert {trial.reason for trial in ledger.trials if trial.outcome is Outcome.STOPPED} == {"the time was up"}
    assert any(sweep.store.list("model/weights.safetensors"))


@pytest.mark.slow
def test_a_mistake_that_every_trial_would_make_ends_the_sweep_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(12):
            (folder / label / f"{number}.png").write_bytes(b"this is no image")
    sweep = new_sweep(tmp_path, data__uri=str(folder), train__batch_size=8)
    state = run_to_end(sweep)
    assert state.status is Status.FAILED
    assert state.error is not None
    assert "cannot be read" in state.error["what"]
    assert len(Ledger.load(sweep).trials) <= 3, "it did not try them all"


def test_a_trial_that_rests_leaves_its_state_behind_however_seldom_it_saves(tmp_path: Path) -> None:
    from trainers.driver import Driver
    from trainers.trial import Alone, trial_spec

    sweep = new_sweep(tmp_path)
    Driver(sweep).prepare(sweep.spec())
    run = sweep.trial(1)
    spec = trial_spec(sweep.spec(), {"optim.lr": 0.05}, run)
    run.write_json("spec.json", spec.model_dump(mode="json"))
    player = Alone(run, spec, sweep.begin_attempt({}), 0)
    assert player.epoch() is not None
    player.trainer.saver.finish()  # type: ignore[union-attr]
    for entry in list(run.store.list("checkpoints/")):
        run.store.delete(entry.key)
    assert player.rest() == 1
    player.close()
    again = Alone(run, spec, 1, 1)
    assert again.trainer.step == player.trainer.step > 0
    again.close()
