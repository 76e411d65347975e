"""The record of a sweep: what is best, in which order, what survives the file, and the command that trains it again."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import LaunchError, NotFoundError, SiteError
from launcher.runs import Run
from launcher.specfile import Draft
from launcher.sweeps import (
    Ledger,
    Outcome,
    Trial,
    command_of,
    leaderboard,
    leaderboard_csv,
    metric_text,
    setting_text,
    spec_of,
)
from tests.report_run import build as build_single
from tests.sweep_run import build

ODD: list[Any] = [math.nan, math.inf, None, "text", [], True, 10**400]


def trial(number: int, *values: Any, outcome: Outcome = Outcome.FINISHED, **more: Any) -> Trial:
    epochs = [{"epoch": at, "top1": value, "loss": 1.0, **more} for at, value in enumerate(values, 1)]
    return Trial(number, {"optim.lr": 0.1 * number}, outcome=outcome, epochs=epochs)


def ledger(*trials: Trial, **objectives: str) -> Ledger:
    return Ledger(objectives or {"top1": "max"}, list(trials))


def test_the_record_survives_the_file(tmp_path: Path) -> None:
    run = build(tmp_path, trials=6)
    before = Ledger.load(run)
    before.save(run)
    after = Ledger.load(run)
    assert [trial.name for trial in after.trials] == [f"{number:04d}" for number in range(1, 7)]
    assert leaderboard(after) == leaderboard(before)
    assert run.store.read("leaderboard.csv").decode() == leaderboard_csv(after)


def test_before_the_first_trial_the_record_is_empty_and_a_training_has_none(tmp_path: Path) -> None:
    run = build(tmp_path, trials=4)
    run.store.delete("sweep.json")
    assert Ledger.load(run) == Ledger({"top1": "max"})
    with pytest.raises(NotFoundError, match="a single training, not a sweep"):
        Ledger.load(build_single(tmp_path))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b"7", b'{"trials": [{"number": 1}]}'])
def test_a_damaged_record_is_told_as_one(tmp_path: Path, damage: bytes) -> None:
    run = build(tmp_path, trials=3)
    run.store.write("sweep.json", damage)
    with pytest.raises(SiteError, match=r"sweep.json: the file is damaged"):
        Ledger.load(run)


def test_a_trials_value_is_that_of_its_best_epoch() -> None:
    assert trial(1, 0.5, 0.9, 0.9, 0.7).best("top1", "max") == {"epoch": 2, "top1": 0.9, "loss": 1.0}
    assert trial(1, 0.5, 0.9).best("top1", "min") == {"epoch": 1, "top1": 0.5, "loss": 1.0}
    assert trial(1).best("top1", "max") is None
    assert trial(1, 0.5, 0.9, seconds=3).values({"top1": "max", "seconds": "min"}) == {"top1": 0.9, "seconds": 3.0}
    assert trial(1, 0.5).values({"top1": "max", "seconds": "min"}) is None


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_what_is_no_number_is_no_result(odd: Any) -> None:
    assert trial(1, odd).best("top1", "max") is None
    assert trial(1, odd, 0.5).values({"top1": "max"}) == {"top1": 0.5}
    assert trial(1, 0.5, loss=odd).values({"top1": "max", "loss": "min"}) is None
    board = leaderboard(ledger(trial(1, odd), trial(2, 0.5), trial(3, 0.5, loss=odd)))
    assert [(row["rank"], row["trial"]) for row in board] == [(1, 2), (2, 3), (None, 1)]
    assert board[1]["loss"] is None


def test_the_best_comes_first_and_those_that_failed_last() -> None:
    failed, waiting = trial(1, 0.99, outcome=Outcome.FAILED), trial(3, outcome=Outcome.WAITING)
    found = ledger(failed, trial(2, 0.7), waiting, trial(4, 0.8), trial(5, 0.8, loss=0.5))
    assert [(row["rank"], row["trial"]) for row in leaderboard(found)] == [(1, 5), (2, 4), (3, 2), (None, 3), (None, 1)]
    least = ledger(*found.trials, top1="min")
    assert [trial.number for trial in least.ranked()] == [2, 5, 4]


def test_the_winner_is_the_one_that_was_exported_else_the_best_so_far() -> None:
    found = ledger(trial(1, 0.5), trial(2, 0.7))
    assert found.winner() is found.trials[1]
    found.best = 1
    assert found.winner() is found.trials[0]
    assert ledger(trial(1, 0.5, outcome=Outcome.FAILED)).winner() is None


numbers = st.integers(0, 4).map(float)


@given(st.lists(st.tuples(numbers, numbers), max_size=12))
def test_the_front_holds_whom_nobody_beats(points: list[tuple[float, float]]) -> None:
    trials = [trial(number, top1, seconds=seconds) for number, (top1, seconds) in enumerate(points, 1)]
    front = ledger(*trials, top1="max", seconds="min").front()
    for one, (top1, seconds) in zip(trials, points, strict=True):
        beaten = any(
            other != (top1, seconds) and other[0] >= top1 and other[1] <= seconds for other in points
        )  # fmt: skip
        assert (one in front) is not beaten
    values = [one.epochs[0]["top1"] for one in front]
    assert values == sorted(values, reverse=True)


def test_a_number_that_no_trial_has_is_told_with_those_there_are() -> None:
    found = ledger(trial(1, 0.5), trial(2, 0.7))
    assert found.trial(2).number == 2
    for number, known in ((0, "1 to 2"), (3, "1 to 2")):
        with pytest.raises(NotFoundError) as told:
            found.trial(number)
        assert told.value.hint == known
    with pytest.raises(NotFoundError) as told:
        ledger().trial(1)
    assert told.value.hint == "none has begun"


def test_the_table_has_a_column_for_each_searched_field_and_no_formula(tmp_path: Path) -> None:
    found = Ledger.load(build(tmp_path, trials=5))
    found.trials[4].error = {"what": "=HYPERLINK(1)"}
    found.trials[0].settings["augment.policy"] = "@none"
    rows = list(csv.DictReader(io.StringIO(leaderboard_csv(found))))
    assert [row["trial"] for row in rows] == [str(row["trial"]) for row in leaderboard(found)]
    assert rows[-1]["reason"] == "'=HYPERLINK(1)"
    assert {row["augment.policy"] for row in rows} == {"'@none", "none", "randaugment"}
    assert all(row["augment.magnitude"] == "" for row in rows if row["augment.policy"] == "none")
    assert leaderboard_csv(Ledger({"top1": "max"})) == "\n"


def test_the_command_of_a_trial_gives_its_spec_again(tmp_path: Path) -> None:
    run = build(tmp_path, trials=3, uri="s3://bucket/with space")
    spec = spec_of(run, Ledger.load(run).trials[1])
    words = command_of(spec)
    assert words[:3] == ["launch", "--data", "s3://bucket/with space"]
    draft = Draft()
    draft.put("data.uri", words[2], "--data")
    for flag, text in zip(words[3::2], words[4::2], strict=True):
        assert flag == "--set"
        draft.assign(text)
    again = draft.spec()
    for section in ("data", "model", "optim", "train", "augment"):
        assert getattr(again, section) == getattr(spec, section)


def test_a_trial_whose_directory_is_gone_still_has_its_spec(tmp_path: Path) -> None:
    run = build(tmp_path, trials=3)
    one = Ledger.load(run).trials[1]
    before = spec_of(run, one)
    run.trial(2).delete()
    after = spec_of(run, one)
    assert after.sweep is None
    assert after.optim == before.optim
    with pytest.raises(LaunchError):
        run.trial(2).spec()


def test_changes_on_the_way_are_told_with_their_epoch() -> None:
    one = trial(1, 0.5, 0.6, 0.7)
    one.epochs[1]["settings"] = {"optim.lr": 0.3}
    assert one.changes() == [(2, {"optim.lr": 0.3})]


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("top1", 0.9893, "98.9%"), ("loss", 0.05134, "0.05134"), ("parameters", 4907684.0, "4,907,684"),
        ("images_per_second", 512.34, "512.3"), ("top1", None, ""),
    ],
)  # fmt: skip
def test_values_read_well(metric: str, value: float | None, text: str) -> None:
    assert metric_text(metric, value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (True, "yes"), (None, "-"), ((), "none"), (["layer1", "layer2"], "layer1,layer2"),
     ("none", "none"), (1e-05, "1e-05"), (12, "12")],
)  # fmt: skip
def test_settings_read_well(value: Any, text: str) -> None:
    assert setting_text(value) == text


def test_a_trial_knows_its_sweep(tmp_path: Path) -> None:
    run = build(tmp_path, trials=3)
    assert run.trial(2).home is run
    assert run.trial(2).uri == f"{run.uri}/trials/0002"
    assert Run.at(run.uri).uri == run.uri
