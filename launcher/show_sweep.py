"""How a sweep looks on a terminal: its leaderboard, where it stands, and its trials as they go.

`status_text`, `end` and `Viewer` are for sweeps what those of `show` are for single trainings. Reads; changes nothing.
"""

from __future__ import annotations

import shlex
import time
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.text import Text

from launcher import show
from launcher.backends import Backend
from launcher.errors import printable
from launcher.plan import count
from launcher.runs import Run, State, Status
from launcher.show import say, seconds, typed
from launcher.spec import Spec
from launcher.sweeps import (
    Ledger,
    Outcome,
    Trial,
    command_of,
    leaderboard,
    metric_name,
    metric_text,
    searched,
    setting_text,
    short_names,
    spec_of,
)

TOP = 10
"""Rows of the leaderboard that are shown unasked."""
COLORS = {Outcome.FINISHED: "green", Outcome.STOPPED: "dim", Outcome.FAILED: "red", Outcome.RUNNING: "cyan"}

Row = dict[str, Any]


# -- the leaderboard


def board(ledger: Ledger, rows: list[Row], epochs: int, width: int | None = None) -> list[Text]:
    """Rows of `sweeps.leaderboard` as lines. Of the searched fields as many are shown as `width` holds, the most
    important first; the last line says how many are not."""
    keys = sorted(searched(ledger.trials), key=lambda key: -ledger.importance.get(key, 0.0))
    several = len(ledger.objectives) > 1
    headings = ["", "trial", "outcome", *(metric_name(metric) for metric in ledger.objectives), *["front"] * several,
                "best at", "epochs", "time", *(printable(name) for name in short_names(keys))]  # fmt: skip
    cells = [[
        str(row["rank"] or ""), str(row["trial"]), row["outcome"].lower(),
        *(metric_text(metric, row[metric]) for metric in ledger.objectives), *["*" * row["pareto"]] * several,
        str(row["best_epoch"] or ""), f"{row['epochs']}/{epochs}", seconds(row["seconds"]),
        *(printable(setting_text(row["settings"][key])) if key in row["settings"] else "" for key in keys),
    ] for row in rows]  # fmt: skip
    widths = [max(cell_len(line[column]) for line in [headings, *cells]) for column in range(len(headings))]
    fixed = len(headings) - len(keys)
    shown = len(headings)
    while width is not None and shown > fixed and sum(widths[:shown]) + 2 * (shown - 1) > width:
        shown -= 1
    lines = [_line(headings[:shown], widths, "bold")]
    lines += [_line(line[:shown], widths, "", COLORS.get(Outcome(row["outcome"]), "yellow"))
              for line, row in zip(cells, rows, strict=True)]  # fmt: skip
    hidden = [printable(key) for key in keys[shown - fixed :]]
    return lines + [Text(f"not shown for want of width: {', '.join(hidden)}", "dim")] * bool(hidden)


def _line(cells: list[str], widths: list[int], style: str, outcome: str = "") -> Text:
    """Cells one under the other; the outcome has a colour of its own."""
    line = Text(style=style)
    for column, cell in enumerate(cells):
        space = " " * (widths[column] - cell_len(cell) + 2 * (column < len(cells) - 1))
        line.append(cell + space, outcome if column == 2 else "")
    return line


def trials_table(run: Run, console: Console) -> None:
    """The whole leaderboard, and why trials failed."""
    ledger = Ledger.load(run)
    for line in board(ledger, leaderboard(ledger), run.spec().train.epochs or 1):
        console.print(line, soft_wrap=True)
    _failures(ledger, console)


def _failures(ledger: Ledger, console: Console) -> None:
    for trial in ledger.having(Outcome.FAILED):
        say(console, "failed", f"trial {trial.number}: {_reason(trial)}", "red")


def _reason(trial: Trial) -> str:
    return (trial.error or {}).get("what") or trial.reason or "it did not say why"


# -- where it stands


def status_text(run: Run, state: State, console: Console) -> None:
    """Everything about one sweep that fits on a screen."""
    spec, ledger = run.spec(), Ledger.load(run)
    search, epochs = spec.sweep, spec.train.epochs or 1
    assert search is not None
    show.headline(run, state, console)
    say(console, "data", spec.data.uri)
    say(console, "model", f"{spec.model.name}, up to {count(epochs, 'epoch')} a trial, attempt {state.attempt}")
    stops = {"none": "", "pbt": ", the good ones copied and varied by pbt"}
    say(console, "search", f"{count(search.trials, 'trial')} proposed by {search.search}"
                           + stops.get(search.scheduler, f", stopped early by {search.scheduler}"))  # fmt: skip
    say(console, "trials", tally(ledger, search.trials))
    say(console, "time", _time(state, ledger, spec))
    show.cost_line(run, console)
    if not state.status.final and (best := ledger.winner()):
        say(console, "best", best_line(ledger, best))
    if ledger.importance:
        say(console, "matters", ", ".join(f"{key} {share:.0%}" for key, share in _by_weight(ledger.importance)))
    rows = [row for row in leaderboard(ledger) if row["outcome"] != Outcome.FAILED]
    if rows:
        console.print()
        for line in board(ledger, rows[:TOP], epochs, console.width):
            console.print(line, soft_wrap=True)
        if len(rows) > TOP:
            console.print(Text(f"and {len(rows) - TOP} more: launch trials {typed(run)}", "dim"), soft_wrap=True)
        _failures(ledger, console)
        console.print()
    end(run, state, console)


def _by_weight(importance: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(importance.items(), key=lambda pair: -pair[1])


def tally(ledger: Ledger, trials: int) -> str:
    """`7 of 16 have ended (2 finished, 5 stopped), 2 running`"""
    words = {outcome: f"{len(found)} {outcome.lower()}" for outcome in Outcome if (found := ledger.having(outcome))}
    over = ", ".join(text for outcome, text in words.items() if outcome.final)
    going = [text for outcome, text in words.items() if not outcome.final]
    return ", ".join([f"{len(ledger.over())} of {trials} have ended" + f" ({over})" * bool(over), *going])


def best_line(ledger: Ledger, trial: Trial) -> str:
    """`trial 7: top-1 98.9% at epoch 12`"""
    values, epoch = trial.values(ledger.objectives) or {}, trial.best(*next(iter(ledger.objectives.items()))) or {}
    figures = ", ".join(f"{metric_name(metric)} {metric_text(metric, value)}" for metric, value in values.items())
    return f"trial {trial.number}: {figures} at epoch {epoch.get('epoch')}"


def _time(state: State, ledger: Ledger, spec: Spec) -> str:
    text = f"{count(ledger.epochs(), 'epoch')} trained"
    if state.started:
        text = f"{seconds((state.ended or time.time()) - state.started)}, {text}"
    left = None if state.status.final else to_go(ledger, spec, (spec.sweep.concurrent or 0) if spec.sweep else 0)
    return text if left is None else f"{text}; about {seconds(left)} to go"


def to_go(ledger: Ledger, spec: Spec, concurrent: int = 0) -> float | None:
    """Seconds the rest takes if it goes as what has ended, or waits at a rung, where most stay; None while that is too
    little to tell.

    What ends first is what was stopped, so nothing is said before a trial has trained all its epochs.
    """
    trials = spec.sweep.trials if spec.sweep else 0
    through = ledger.having(Outcome.FINISHED, Outcome.STOPPED, Outcome.PAUSED)
    going = [trial for trial in ledger.trials if not trial.outcome.final and trial.outcome is not Outcome.PAUSED]
    at_once = concurrent or len(ledger.having(Outcome.RUNNING)) or 1
    if len(through) < max(3, at_once) or not ledger.having(Outcome.FINISHED):
        return None
    each = sum(trial.seconds for trial in through) / len(through)
    begun = sum(max(each - trial.seconds, 0.0) for trial in going)
    return (begun + each * max(trials - len(ledger.trials), 0)) / min(at_once, max(trials - len(ledger.over()), 1))


# -- how it ended


def end(run: Run, state: State, console: Console) -> None:
    """What the sweep found and how to train that again, or why it ended, and what to type; nothing while it goes on."""
    if not state.status.final:
        return
    ledger = Ledger.load(run)
    best = ledger.winner()
    if state.error:
        show.failure(run, state.error, console)
    elif state.status is not Status.SUCCEEDED:
        say(console, "stopped", state.reason or f"the sweep is {state.status.lower()}")
    if state.status is Status.SUCCEEDED and state.result:
        say(console, "result", f"trial {state.result.get('trial')}: {show.result_line(state)}")
    elif best:
        say(console, "best", best_line(ledger, best))
    if best:
        _best(run, best, console)
    if failed := ledger.having(Outcome.FAILED):
        last = failed[-1].number
        say(console, "failed", f"{len(failed)} of {count(len(ledger.trials), 'trial')}; "
                               f"launch logs {typed(run)} --trial {last} shows why the last did")  # fmt: skip
    if state.status is Status.SUCCEEDED:
        say(console, "report", f"{run.uri}/report.html")
        refit = " (trained once more, on the training and validation images)" if ledger.refit else ""
        say(console, "model", f"{run.uri}/model{refit}")
    elif not state.error:
        say(console, "next", f"launch resume {typed(run)} goes on; trials that have ended are not run again")


def _best(run: Run, best: Trial, console: Console) -> None:
    say(console, "settings", _settings(best.settings) or "those of launch, nothing was searched")
    for epoch, settings in best.changes():
        say(console, "", f"from epoch {epoch} on: {_settings(settings)}")
    say(console, "again", shlex.join(command_of(spec_of(run, best))))
    say(console, "spec", f"{run.trial(best.number).uri}/spec.json")


def _settings(settings: dict[str, Any]) -> str:
    return "  ".join(f"{key}={setting_text(value)}" for key, value in settings.items())


# -- while it goes on


class Viewer(show.Viewer):
    """Shows a sweep until it is over: its leaderboard on a terminal, a line for each event elsewhere."""

    def __init__(self, run: Run, backend: Backend, console: Console) -> None:
        super().__init__(run, backend, console)
        self._spec = run.spec()
        self._metric = next(iter(self._spec.sweep.objectives)) if self._spec.sweep else ""
        self._ledger = Ledger.load(run)
        self._old = False
        self._concurrent = 0
        self._ending = ""

    def _now(self, state: State) -> str:
        if state.status is not Status.RUNNING or self._spec.sweep is None:
            return super()._now(state)
        if self._old:
            self._ledger, self._old = Ledger.load(self._run), False
        parts = [tally(self._ledger, self._spec.sweep.trials), self._ending]
        if state.started:
            parts.append(seconds(time.time() - state.started))
        left = to_go(self._ledger, self._spec, self._concurrent)
        if left and not self._ending:
            parts.append(f"about {seconds(left)} to go")
        return "  ".join(part for part in parts if part)

    def _picture(self, line: str) -> RenderableType:
        rows = leaderboard(self._ledger)
        running = [row for row in rows if row["outcome"] == Outcome.RUNNING]
        best = [row for row in rows if row["rank"] and row not in running]
        room = max(3, min(TOP, self._console.height - 4 - len(running)))
        lines = [text for text in board(self._ledger, best[:room] + running, self._epochs, self._console.width) if rows]
        for text in (*lines, last := Text(line)):
            text.no_wrap, text.overflow = True, "ellipsis"
        return Group(*lines, last)

    def _tell(self, event: dict[str, Any]) -> None:
        self._old = True
        kind = event["event"]
        if kind == "sweep":
            self._concurrent, self._epochs = event["concurrent"], event["epochs"]
            done = f"; {event['done']} have ended already" if event["done"] else ""
            self._print(f"{count(event['trials'], 'trial')}, {event['concurrent']} at once, "
                        f"up to {count(event['epochs'], 'epoch')} each{done}")  # fmt: skip
        elif kind == "trial":
            origin = {"default": "  (the default settings)", "point": "  (a given point)"}.get(event["origin"], "")
            again = f"  from epoch {event['from_epoch'] + 1}" if event["from_epoch"] else ""
            self._print(f"trial {event['number']} begins{again}  {_settings(event['settings'])}{origin}")
        elif kind == "trial_epoch":
            metric = event["metric"]
            self._print(f"trial {event['number']}  epoch {event['epoch']}/{event['epochs']}  {metric_name(metric)} "
                        f"{metric_text(metric, event['value'])}{'  best so far' * event['best']}")  # fmt: skip
        elif kind == "trial_end":
            value = event.get("value")
            best = "" if value is None else f"  {metric_name(self._metric)} {metric_text(self._metric, value)}"
            reason = f": {event['reason']}" if event.get("reason") else ""
            self._print(f"trial {event['number']} {event['outcome'].lower()}{reason}{best}")
        elif kind in ("finishing", "refit"):
            self._ending = (f"trial {event['number']} is the best; it is evaluated and exported" if kind == "finishing"
                            else "training the best settings once more")  # fmt: skip
            self._print(self._ending)
        elif kind == "retry":
            self._print(f"recovering: {event['error']['what']}; trials that have ended are kept")
        elif kind == "attempt" and event["number"] > 1:
            self._print(f"attempt {event['number']}")
