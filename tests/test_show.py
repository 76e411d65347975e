"""What people read: golden text where nothing moves, and a line that moves on a terminal."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher import show
from launcher.errors import InfrastructureError
from launcher.journal import Journal
from launcher.plan import resolve
from launcher.pools import Pool
from launcher.runs import Run, State, Status
from launcher.show import Viewer, seconds, size, typed
from launcher.spec import Data, Spec
from tests.report_run import BEGAN, build

GOLDEN = Path(__file__).parent / "golden"
RESULT = {"split": "val", "epoch": 19, "count": 800, "top1": 0.9325, "top5": 0.991, "macro_f1": 0.9301, "loss": 0.7}
MARKUP = ["[bold]x[/]", "[/]", ":warning:", "back\\slash", "[link=http://evil]", "\x1b[31mred", "a\x07b", "%s {0}"]


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLAUNCH_STORAGE", "/default")
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def page(*, terminal: bool = False, width: int = 120) -> Console:
    return Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system="standard" if terminal else None,
        highlight=False,
    )  # fmt: skip


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return "".join(line.rstrip() + "\n" for line in console.file.getvalue().splitlines())


def plan(**changes: Any) -> Any:
    spec = Spec(data=Data(uri="s3://bucket/flowers")).updated({"name": "flowers", "storage": "/runs", **changes})
    facts = {
        "images": 4_012, "bytes": 10**9, "classes": 10, "train": 3_211, "val": 801, "test": 0, "ignored": 3,
        "smallest_class": ["daisy", 40], "largest_class": ["tulip", 1_204],
    }  # fmt: skip
    pool = Pool("gpu-pool", 32, 2**37, 4, "NVIDIA H100", True)
    return resolve(
        spec, pool, facts=facts, given={"data.uri": "--data"}, defaults={"name": "x", "storage": "y"},
        model_facts=lambda _: {"size": 224, "fixed": False, "weights": True},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0.0 s"), (9.46, "9.5 s"), (59.94, "59.9 s"), (59.96, "1m 00s"), (185, "3m 05s"), (3599.6, "1h 00m"),
        (7620, "2h 07m"), (180_000, "50h 00m"), (-3, "0.0 s"),
    ],
)  # fmt: skip
def test_durations_read_well(value: float, words: str) -> None:
    assert seconds(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (1.44e9, "1.4 GB"), (5e15, "5000.0 TB")],
)
def test_sizes_read_well(value: float, words: str) -> None:
    assert size(value) == words


def _golden_plan(_storage: Path, console: Console) -> None:
    show.plan_table(plan(), "/runs/flowers", console, every=False)


def _golden_dry_run(_storage: Path, console: Console) -> None:
    show.plan_table(plan(), "/runs/flowers", console, every=True)


def _golden_succeeded(storage: Path, console: Console) -> None:
    run = build(storage)
    show.status_text(run, run.update(result=RESULT), console)


def _golden_failed(storage: Path, console: Console) -> None:
    error = {"kind": "DataError", "family": "data", "what": "3 [/] images", "where": "s3://b/x", "hint": "mend them"}
    run = build(storage, Status.FAILED, error=error)
    show.status_text(run, run.state(), console)


def _golden_running(storage: Path, console: Console) -> None:
    run = build(storage, Status.RUNNING)
    _journal(run, _step(11, 5))
    show.status_text(run, run.state(), console)


def _golden_interrupted(storage: Path, console: Console) -> None:
    run = build(storage, Status.INTERRUPTED)
    run.store.write("checkpoints/step-00001800/manifest.json", b"{}")
    show.status_text(run, replace(run.state(), reason="nothing drives it any more"), console)


def _golden_cancelled_early(storage: Path, console: Console) -> None:
    run = build(storage, Status.CANCELLED, done=0)
    show.status_text(run, run.state(), console)


def _golden_list(storage: Path, console: Console) -> None:
    rows = [(run, run.state()) for run in (build(storage, status, name=f"run-{status.lower()}") for status in Status)]
    over = [(run, replace(state, ended=state.ended or BEGAN + 7)) for run, state in rows]
    over[0] = (over[0][0], replace(over[0][1], status=Status.INTERRUPTED, ended=None))
    show.runs_table(over, console)


@pytest.mark.parametrize(
    "shown",
    [
        _golden_plan, _golden_dry_run, _golden_succeeded, _golden_failed, _golden_running, _golden_interrupted,
        _golden_cancelled_early, _golden_list,
    ],
)  # fmt: skip
def test_what_is_shown_is_the_golden_text(shown: Any, tmp_path: Path) -> None:
    console = page()
    shown(tmp_path, console)
    golden = GOLDEN / f"{shown.__name__.removeprefix('_golden_')}.txt"
    assert text(console).replace(str(tmp_path), "/storage") == golden.read_text()


@pytest.mark.parametrize("odd", MARKUP)
@pytest.mark.parametrize("terminal", [False, True])
def test_other_peoples_text_comes_out_as_it_is(odd: str, terminal: bool, tmp_path: Path) -> None:
    expected = odd.replace("\x1b", "\\x1b").replace("\x07", "\\x07")
    console = page(terminal=terminal, width=300)
    show.plan_table(replace(plan(), warnings=(odd,)), odd, console, every=True)
    error = {"kind": "DataError", "what": odd, "where": odd, "hint": odd}
    run = build(tmp_path, Status.FAILED, uri=odd, error=error)
    show.status_text(run, run.state(), console)
    show.runs_table([(run, run.state())], console)
    show.end(run, run.state(), console)
    assert text(console).count(expected) >= 10
    assert "\x1b[31mred" not in text(console)


def test_a_long_path_is_never_broken(tmp_path: Path) -> None:
    console, long = page(width=40), "s3://bucket/" + "folder/" * 30
    show.plan_table(plan(**{"data.uri": long}), long, console, every=False)
    run = build(tmp_path / ("x" * 100))
    show.end(run, run.update(result=RESULT), console)
    assert text(console).count(long) == 2
    assert f"{run.uri}/report.html\n" in text(console)


def test_a_run_is_named_as_one_would_type_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(tmp_path)
    assert typed(run) == f"flowers-1123 --storage {tmp_path}"
    monkeypatch.setenv("RAYLAUNCH_STORAGE", str(tmp_path))
    assert typed(run) == "flowers-1123"


# -- the viewer


def _step(epoch: int, at: int) -> dict[str, Any]:
    return {
        "event": "step", "epoch": epoch, "step": (epoch - 1) * 25 + at, "at": at, "of": 25, "batch": 128,
        "loss": 0.51234, "lr": 0.01, "images_per_second": 1600.0, "data_wait": 0.031, "memory": 1_400_000_000,
        "gpu_memory": 9_000_000_000,
    }  # fmt: skip


def _journal(run: Run, *events: dict[str, Any], key: str = "progress.jsonl") -> None:
    out = Journal(run.store, key)
    for event in events:
        values = dict(event)
        out.write(values.pop("event"), **values)
    out.close()


class Stage:
    """A backend for the viewer: each look at the run plays the next scene. Other verbs are not asked for."""

    def __init__(self, run: Run, scenes: Iterator[None]) -> None:
        self.run = run
        self.scenes = scenes

    def status(self, run: Run) -> State:
        next(self.scenes)
        return run.state()


class Flaky(Stage):
    """Loses the storage with the last scene, and finds the run over when that is back."""

    def status(self, run: Run) -> State:
        try:
            return super().status(run)
        except StopIteration:
            return run.update(status=Status.SUCCEEDED)


def _scenes(run: Run) -> Iterator[None]:
    record = run.metrics()["epochs"][0]
    start = {"event": "start", "step": 0, "steps_per_epoch": 25, "epochs": 2, "workers": 2, "device": "NVIDIA H100"}
    run.update(status=Status.PENDING)
    yield
    run.update(status=Status.STARTING)
    _journal(run, {"event": "attempt", "number": 1, "from_step": 0, "host": "a"}, key="events.jsonl")
    yield
    run.update(status=Status.RUNNING)
    _journal(run, start, _step(1, 5))
    yield
    _journal(run, {"event": "evaluating", "split": "val"})
    yield
    _journal(run, {"event": "epoch", **record})
    yield
    run.update(status=Status.RECOVERING, reason="a worker was lost")
    _journal(run, {"event": "retry", "error": {"what": "a worker [/] was lost"}, "step": 25}, key="events.jsonl")
    yield
    run.update(status=Status.RUNNING, reason="")
    _journal(run, {"event": "attempt", "number": 2, "from_step": 25, "host": "b"}, key="events.jsonl")
    _journal(run, {**start, "step": 25}, _step(2, 20))
    yield
    run.update(status=Status.SUCCEEDED, result=RESULT)
    _journal(run, {"event": "epoch", **record, "epoch": 2})
    yield


def _watch(console: Console, storage: Path, scenes: Any = _scenes) -> State:
    run = build(storage, epochs=2, done=1)
    viewer = Viewer(run, Stage(run, scenes(run)), console)  # type: ignore[arg-type]
    return viewer.watch(sleep=lambda _: None)


def test_without_a_terminal_the_viewer_writes_plain_lines(tmp_path: Path) -> None:
    console = page()
    assert _watch(console, tmp_path).status is Status.SUCCEEDED
    assert text(console) == (GOLDEN / "viewer.txt").read_text()


def test_on_a_terminal_one_line_moves_and_vanishes(tmp_path: Path) -> None:
    console = page(terminal=True)
    _watch(console, tmp_path)
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert "\x1b[?25l" in written
    assert written.count("\x1b[2K") >= 3
    assert "a worker [/] was lost" in written
    last = written.rsplit("\x1b[2K", 1)[1]
    assert "images/s" not in last


def test_the_moving_line_tells_when_it_will_be_over(tmp_path: Path) -> None:
    run = build(tmp_path, Status.RUNNING)
    viewer = Viewer(run, Stage(run, iter(lambda: None, 0)), page())  # type: ignore[arg-type]
    viewer._tell(_step(11, 5))
    # 20 steps of 128 images are left, and 9 epochs of 25, at 1,600 images/s.
    assert viewer._now(run.state()).endswith("waiting for data 3%  memory 1.4 GB  GPU 9.0 GB  ETA 19.6 s")


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
        _journal(run, _step(1, 5))
        yield
        raise KeyboardInterrupt

    console = page(terminal=True)
    with pytest.raises(KeyboardInterrupt):
        _watch(console, tmp_path, scenes)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().rindex("\x1b[?25h") > console.file.getvalue().rindex("\x1b[?25l")
