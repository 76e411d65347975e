"""A real sweep on this machine from start to end, gone on with, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.runs import Run, Status
from launcher.sweeps import Ledger, Outcome
from tests.sweeping import new_sweep, run_to_end

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four trials, one of which diverges."""
    space = {"optim.lr": {"choice": [0.05, 0.02, 0.01, 1e18]}, "optim.label_smoothing": {"uniform": [0.0, 0.2]}}
    points = [{"optim.lr": 1e18}, {"optim.lr": 0.01, "optim.label_smoothing": 0.0}]
    folder = tmp_path_factory.mktemp("runs")
    sweep = new_sweep(folder, sweep__trials=4, sweep__points=points, sweep__space=space, sweep__search="random")
    state = run_to_end(sweep)
    assert state.status is Status.SUCCEEDED, state
    return sweep


def test_a_trial_that_diverges_is_a_recorded_result_and_not_the_end(swept: Run) -> None:
    failed = Ledger.load(swept).trial(2)
    assert (failed.outcome, failed.origin, failed.retries) == (Outcome.FAILED, "point", 0)
    assert failed.error is not None
    assert "not finite" in failed.error["what"]
    others = [trial for trial in Ledger.load(swept).trials if trial.number != 2]
    assert {trial.outcome for trial in others} <= {Outcome.FINISHED, Outcome.STOPPED}
    assert all(trial.epochs for trial in others)


def test_the_best_trial_is_exported_as_a_run_is_and_is_that_of_the_sweep(swept: Run) -> None:
    from trainers.data.sample import materialise
    from trainers.predict import Predictor

    ledger = Ledger.load(swept)
    best = ledger.ranked()[0]
    assert ledger.best == best.number
    mine = swept.trial(best.number)
    result = swept.state().result
    assert result["trial"] == best.number
    assert result["trials"] == 4
    assert result["top1"] == mine.metrics()["final"]["top1"] == best.values(ledger.objectives)["top1"]  # type: ignore[index]
    assert swept.store.read("model/weights.safetensors") == mine.store.read("model/weights.safetensors")
    assert b"<html" in mine.store.read("report.html")
    assert b"<html" in swept.store.read("report.html")
    images = sorted(Path(materialise("digits")).rglob("*.png"))[:3]
    assert len(list(Predictor(swept.store.child("model")).predict(images, 1))) == 3


def test_every_trial_has_its_own_directory_but_index_and_first_weights_are_there_once(swept: Run) -> None:
    keys = [entry.key for entry in swept.store.list()]
    assert [key for key in keys if key.endswith("index.parquet")] == ["index.parquet"]
    assert [key for key in keys if "step-00000000/manifest" in key] == [
        "initial/test_resnet/checkpoints/step-00000000/manifest.json"
    ]
    for trial in Ledger.load(swept).trials:
        mine = swept.trial(trial.number)
        spec = mine.spec()
        assert spec.sweep is None
        assert spec.flat()["optim.lr"] == trial.settings["optim.lr"]
        assert any(mine.store.list("logs/rank-0.log"))


def test_only_the_best_trial_keeps_its_checkpoints_and_nothing_is_pickled(swept: Run) -> None:
    keys = [entry.key for entry in swept.store.list()]
    kept = {key.split("/")[1] for key in keys if key.startswith("trials/") and "/checkpoints/" in key}
    assert kept == {Ledger.load(swept).ranked()[0].name}
    assert [key for key in keys if key.endswith((".pkl", ".pickle", ".pt", ".pth"))] == []


def test_the_journal_tells_every_begin_and_end(swept: Run) -> None:
    lines = [json.loads(line) for line in swept.store.read("progress.jsonl").splitlines()]
    ledger = Ledger.load(swept)
    assert {line["number"] for line in lines if line["event"] == "trial"} == {1, 2, 3, 4}
    ends = {line["number"]: line["outcome"] for line in lines if line["event"] == "trial_end"}
    assert ends == {trial.number: trial.outcome for trial in ledger.trials}
    told = [line for line in lines if line["event"] == "trial_epoch"]
    assert len(told) == ledger.epochs()


def test_a_sweep_that_is_extended_runs_no_finished_trial_again(swept: Run) -> None:
    before = {trial.number: trial for trial in Ledger.load(swept).trials}
    spec = swept.spec()
    swept.set_spec(spec.updated({"sweep.trials": 5}), swept.plan())
    assert run_to_end(swept).status is Status.SUCCEEDED
    after = Ledger.load(swept)
    assert len(after.trials) == 5
    assert after.trials[:4] == [before[number] for number in range(1, 5)]
    assert after.trials[4].settings
    assert swept.state().result["trials"] == 5
