"""What people read of a sweep: golden text where nothing moves, a leaderboard that moves on a terminal, commands."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from launcher import manage, show, show_sweep
from launcher.cli import main
from launcher.errors import InfrastructureError
from launcher.runs import Owner, Run, State, Status
from launcher.show_sweep import Viewer, board, to_go
from launcher.sweeps import Ledger, Outcome, Trial, leaderboard, leaderboard_csv
from tests.report_run import build as build_single
from tests.sweep_run import BEGAN, build
from tests.test_show import GOLDEN, MARKUP, Flaky, Stage, _journal, page, text

TWO = {"top1": "max", "images_per_second": "max"}


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default storage of the test."""
    monkeypatch.setenv("RAYLAUNCH_STORAGE", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("RAYLAUNCH_CLUSTER", raising=False)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    return tmp_path


def launch(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), prog_name="launch")


def _sweep_succeeded(storage: Path, console: Console) -> None:
    run = build(storage)
    show_sweep.status_text(run, run.state(), console)


def _sweep_running(storage: Path, console: Console) -> None:
    run = build(storage, Status.RUNNING, objectives=TWO)
    _journal(run, {"event": "sweep", "trials": 16, "concurrent": 2, "epochs": 12, "done": 0})
    show_sweep.status_text(run, replace(run.state(), started=None), console)


def _sweep_cancelled(storage: Path, console: Console) -> None:
    run = build(storage, Status.CANCELLED, done=3)
    show_sweep.status_text(run, replace(run.state(), reason="it was cancelled"), console)


def _sweep_failed(storage: Path, console: Console) -> None:
    error = {"kind": "SiteError", "family": "site", "what": "3 [/] disks", "where": "s3://b/x", "hint": "mend them"}
    run = build(storage, Status.FAILED, done=2, failed=2, error=error, price=None)
    show_sweep.status_text(run, run.state(), console)


def _sweep_pending(storage: Path, console: Console) -> None:
    run = build(storage, Status.PENDING, scheduler="none")
    show_sweep.status_text(run, replace(run.state(), started=None, reason="no GPU", hint="wait"), console)


def _sweep_trials(storage: Path, console: Console) -> None:
    show_sweep.trials_table(build(storage, Status.RUNNING, trials=12), console)


def _sweep_list(storage: Path, console: Console) -> None:
    build(storage, name="done")
    build(storage, Status.CANCELLED, name="half")
    build(storage, Status.CANCELLED, name="none", done=0)
    build_single(storage, name="single")
    rows = [(run, run.state()) for run in (Run(str(storage), name) for name in ("done", "half", "none", "single"))]
    show.runs_table(rows, console)


@pytest.mark.parametrize(
    "shown",
    [
        _sweep_succeeded, _sweep_running, _sweep_cancelled, _sweep_failed, _sweep_pending, _sweep_trials, _sweep_list,
    ],
)  # fmt: skip
def test_what_is_shown_is_the_golden_text(shown: Any, tmp_path: Path) -> None:
    console = page()
    shown(tmp_path, console)
    golden = GOLDEN / f"{shown.__name__.removeprefix('_')}.txt"
    assert text(console).replace(str(tmp_path), "/storage") == golden.read_text()


def test_a_damaged_sweep_does_not_hide_the_others_from_the_list(tmp_path: Path) -> None:
    build(tmp_path, name="broken").store.write("sweep.json", b"{")
    console = page(width=300)
    runs = Run(str(tmp_path), "broken"), build(tmp_path, name="fine")
    show.runs_table([(run, run.state()) for run in runs], console)
    assert "sweep.json: the file is damaged" in text(console)
    assert "16 trials" in text(console)


@pytest.mark.parametrize("odd", MARKUP)
@pytest.mark.parametrize("terminal", [False, True])
def test_other_peoples_text_comes_out_as_it_is(odd: str, terminal: bool, tmp_path: Path) -> None:
    expected = odd.replace("\x1b", "\\x1b").replace("\x07", "\\x07")
    run = build(tmp_path, Status.CANCELLED, uri=odd)
    ledger = Ledger.load(run)
    for trial in ledger.trials:
        trial.settings = {**trial.settings, "augment.policy": odd}
        trial.error = trial.error and {"what": odd}
    ledger.save(run)
    console = page(terminal=terminal, width=400)
    show_sweep.status_text(run, replace(run.state(), reason=odd), console)
    show_sweep.trials_table(run, console)
    _journal(run, *_events(odd))
    Viewer(run, Stage(run, iter([None])), console).watch(sleep=lambda _: None)  # type: ignore[arg-type]
    assert text(console).count(expected) >= 20
    assert "\x1b[31mred" not in text(console)


def _events(reason: str = "worse than two thirds of the trials at epoch 3") -> list[dict[str, Any]]:
    sweep = {"event": "sweep", "trials": 16, "concurrent": 2, "epochs": 12, "done": 0}
    settings = {"optim.lr": 0.0125, "augment.policy": "none"}
    begun = {"event": "trial", "number": 1, "settings": settings, "origin": "default", "from_epoch": 0}
    epoch = {"event": "trial_epoch", "number": 1, "epoch": 3, "epochs": 12, "metric": "top1", "value": 0.93}
    return [
        sweep, begun, {**epoch, "best": True}, {**epoch, "number": 2, "value": 0.41, "best": False},
        {"event": "trial_end", "number": 2, "outcome": "STOPPED", "reason": reason, "value": 0.41},
        {"event": "trial_end", "number": 3, "outcome": "FAILED", "reason": "the loss became NaN", "value": None},
    ]  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80, 120, 300])
def test_the_leaderboard_fits_the_width_and_says_what_it_leaves_out(tmp_path: Path, width: int) -> None:
    ledger = Ledger.load(build(tmp_path))
    *lines, last = board(ledger, leaderboard(ledger), 12, width)
    shown = str(lines[0]).split()
    fields = [key for key in ledger.importance if key.rpartition(".")[2] in shown]
    assert fields == list(ledger.importance)[: len(fields)]
    for key in ledger.importance:
        assert (key in fields) is not (key in str(last))
    assert max(len(str(line).rstrip()) for line in lines) <= max(width, 54)
    assert (width >= 300) == (len(fields) == 5) or width == 120


def test_two_fields_that_end_alike_are_told_apart() -> None:
    epochs = [{"epoch": 1, "top1": 0.5}]
    ledger = Ledger({"top1": "max"}, [Trial(1, {"model.name": "a", "data.name": "b", "optim.lr": 0.1}, epochs=epochs)])
    assert str(board(ledger, leaderboard(ledger), 3)[0]).split()[-3:] == ["model.name", "data.name", "lr"]


def test_how_long_it_takes_is_told_once_it_can_be() -> None:
    spec = build_spec(trials=10)
    ended = [Trial(number, {}, outcome=Outcome.STOPPED, seconds=10.0) for number in (1, 2, 3)]
    assert to_go(Ledger({"top1": "max"}, ended), spec, 2) is None  # the long ones are still to come
    ended[2].outcome, ended[2].seconds = Outcome.FINISHED, 40.0
    running = [Trial(number, {}, outcome=Outcome.RUNNING, seconds=5.0) for number in (4, 5)]
    # 20 s each: two have 15 s left, five are to come, two at once.
    assert to_go(Ledger({"top1": "max"}, [*ended, *running]), spec, 2) == pytest.approx((2 * 15 + 5 * 20) / 2)
    assert to_go(Ledger({"top1": "max"}, [*ended, *running]), spec, 4) is None
    ended[0].outcome = Outcome.PAUSED  # at a rung, as most that do not go on
    assert to_go(Ledger({"top1": "max"}, [*ended, *running]), spec, 2) == pytest.approx((2 * 15 + 5 * 20) / 2)
    assert to_go(Ledger({"top1": "max"}, ended[:2]), spec, 2) is None


def build_spec(trials: int) -> Any:
    from launcher.space import Sweep
    from launcher.spec import Data, Spec

    return Spec(data=Data(uri="sample://digits"), sweep=Sweep(trials=trials))


def test_settings_that_changed_on_the_way_are_told(tmp_path: Path) -> None:
    run = build(tmp_path)
    ledger = Ledger.load(run)
    best = ledger.winner()
    assert best is not None
    best.epochs[3]["settings"] = {"optim.lr": 0.5}
    ledger.save(run)
    console = page()
    show_sweep.end(run, run.state(), console)
    assert "\n          from epoch 4 on: optim.lr=0.5\n" in text(console)


# -- the viewer


def _scenes(run: Run) -> Iterator[None]:
    run.update(status=Status.STARTING, started=None)
    _journal(run, {"event": "attempt", "number": 1, "from_step": 0, "host": "a"}, key="events.jsonl")
    yield
    run.update(status=Status.RUNNING)
    _journal(run, *_events())
    yield
    run.update(status=Status.RECOVERING, reason="a worker was lost")
    _journal(run, {"event": "retry", "error": {"what": "a node [/] was lost"}, "step": -1}, key="events.jsonl")
    yield
    run.update(status=Status.RUNNING, reason="")
    _journal(run, {"event": "attempt", "number": 2, "from_step": 0, "host": "b"}, key="events.jsonl")
    _journal(run, {**_events()[0], "done": 7}, {**_events()[1], "number": 8, "origin": "optuna", "from_epoch": 2})
    yield
    _journal(run, {"event": "finishing", "number": 3}, {"event": "refit"})
    yield
    run.update(status=Status.SUCCEEDED)
    yield


def _watch(console: Console, run: Run, scenes: Any = _scenes) -> State:
    viewer = Viewer(run, Stage(run, scenes(run)), console)  # type: ignore[arg-type]
    return viewer.watch(sleep=lambda _: None)


def test_without_a_terminal_the_viewer_writes_plain_lines(tmp_path: Path) -> None:
    console = page()
    assert _watch(console, build(tmp_path, Status.RUNNING)).status is Status.SUCCEEDED
    assert text(console) == (GOLDEN / "sweep_viewer.txt").read_text()


def test_on_a_terminal_the_leaderboard_moves_and_vanishes(tmp_path: Path) -> None:
    console = page(terminal=True)
    _watch(console, build(tmp_path, Status.RUNNING))
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert "8 of 16 have ended (3 finished, 4 stopped, 1 failed), 2 running" in written
    assert "weight_decay" in written
    assert "a node [/] was lost" in written
    assert "weight_decay" not in written.rsplit("\x1b[2K", 1)[1]


def test_on_a_terminal_running_trials_are_shown_below_the_best_and_all_fits(tmp_path: Path) -> None:
    run = build(tmp_path, Status.RUNNING, trials=40, done=30)
    console = Console(file=io.StringIO(), width=100, height=12)
    viewer = Viewer(run, Stage(run, iter([])), console)  # type: ignore[arg-type]
    console.print(viewer._picture("the last line"))
    lines = text(console).splitlines()
    assert len(lines) <= 12
    assert [line.split()[2] for line in lines[-4:-2]] == ["running", "running"]
    assert lines[-1] == "the last line"


def test_a_storage_that_is_out_of_reach_does_not_end_the_view(tmp_path: Path) -> None:
    def scenes(run: Run) -> Iterator[None]:
        run.update(status=Status.STARTING)
        yield
        raise InfrastructureError("S3 answered SlowDown", where="s3://b/x")

    console, run = page(), build(tmp_path, Status.RUNNING)
    state = Viewer(run, Flaky(run, scenes(run)), console).watch(sleep=lambda _: None)  # type: ignore[arg-type]
    assert state.status is Status.SUCCEEDED
    assert "trying again: s3://b/x: S3 answered SlowDown\n" in text(console)


def test_ctrl_c_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    def scenes(run: Run) -> Iterator[None]:
        run.update(status=Status.RUNNING)
        yield
        raise KeyboardInterrupt

    console = page(terminal=True)
    with pytest.raises(KeyboardInterrupt):
        _watch(console, build(tmp_path, Status.RUNNING), scenes)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().rindex("\x1b[?25h") > console.file.getvalue().rindex("\x1b[?25l")


# -- the commands


def test_a_sweep_is_shown_as_a_sweep_by_the_commands_for_runs(storage: Path) -> None:
    run = build(storage, name="s1")
    assert "16 of 16 have ended" in launch("status", "s1").stdout
    assert launch("attach", "s1").stderr.count("trial 3: top-1 99.3%") == 1
    assert "16 trials" in launch("list").stdout
    cancelled = launch("cancel", "s1")
    assert (cancelled.exit_code, cancelled.stderr) == (0, "s1 is over already: succeeded\n")
    context = main.make_context("launch", ["trials", run.name])
    assert manage._complete(context, "s") == ["s1"]
    assert launch("rm", "s1", "--yes").exit_code == 0
    assert not run.exists()


def test_scripts_get_all_trials_as_strict_json(storage: Path) -> None:
    run = build(storage, name="s1")
    document = json.loads(launch("status", "s1", "-o", "json").stdout, parse_constant=pytest.fail)
    assert document["status"] == "SUCCEEDED"
    assert [len(trial["epochs"]) for trial in document["sweep"]["trials"]] == [
        len(trial.epochs) for trial in Ledger.load(run).trials
    ]
    assert document["sweep"]["trials"][15]["epochs"][-1]["loss"] is None
    assert json.loads(launch("trials", "s1", "-o", "json").stdout) == document["leaderboard"]
    assert launch("trials", "s1", "-o", "csv").stdout == leaderboard_csv(Ledger.load(run))
    assert launch("trials", "s1").stdout.splitlines()[1].split()[1] == str(document["leaderboard"][0]["trial"])


def test_the_logs_of_a_trial_are_its_own(storage: Path) -> None:
    run = build(storage, name="s1")
    run.store.write("logs/driver.log", b"the driver\n")
    run.trial(7).store.write("logs/rank-1.log", b"other rank\n")
    assert launch("logs", "s1").stdout == "[driver] the driver\n"
    begins = "2026-11-23T18:53:20Z trial 7 begins"
    assert launch("logs", "s1", "--trial", "7").stdout == f"[rank-0] {begins}\n[rank-1] other rank\n"
    assert launch("logs", "s1", "--trial", "7", "--rank", "0").stdout == f"{begins}\n"
    assert launch("logs", "s1", "--trial", "7", "--tail", "1").stdout == "[rank-1] other rank\n"
    followed = launch("logs", "s1", "--trial", "7", "--rank", "1", "-f")
    assert (followed.exit_code, followed.stdout) == (0, "other rank\n")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("logs s1 --trial 99", 102, "there is no trial 99"), ("logs s1 --trial 0", 2, ""),
        ("report s1 --trial 99", 102, "there is no trial 99"),
        ("logs s1 --trial 7 --rank 3", 2, "there is no log of rank 3"),
        ("logs single --trial 1", 102, "single is a single training, not a sweep"),
        ("report single --trial 1", 102, "single is a single training, not a sweep"),
        ("trials single", 102, "single is a single training, not a sweep"),
        ("trials none", 102, "there is no run none"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told_with_what_is(storage: Path, words: str, code: int, told: str) -> None:
    build(storage, name="s1")
    build_single(storage, name="single")
    result = launch(*words.split())
    assert result.exit_code == code
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_the_logs_of_a_trial_are_followed_until_the_sweep_is_over(storage: Path) -> None:
    run = build(storage, Status.RUNNING, name="s1")
    run.hold(Owner.me())
    try:
        lines = _logs(run, 9)
        assert next(lines)[1].endswith("trial 9 begins")
        assert next(lines) == ("", "")
        run.trial(9).store.write("logs/rank-0.log", b"2026-11-23T18:53:20Z trial 9 begins\nmore\n")
        assert next(lines) == ("rank-0", "more")
        run.update(status=Status.SUCCEEDED, ended=BEGAN)
        assert [line for line in lines if line[0]] == []
    finally:
        run.release()


def _logs(run: Run, number: int) -> Iterator[tuple[str, str]]:
    from launcher.backends import backend, stored_logs
    from launcher.pools import find_pool

    engine = backend(find_pool("local"))
    return stored_logs(run.trial(number), lambda: engine.status(run).status.final)
