"""The report.html of a sweep: what is best, what mattered, how the trials went and what they cost.

Like the page of a run it is one file without a script, shows whatever state the sweep is in, and leaves out what cannot
be read. It trains and measures nothing: the numbers are those of sweep.json.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from typing import Any

from launcher.errors import LaunchError, SiteError
from launcher.runs import Run, State, Status
from launcher.space import Sweep
from launcher.spec import Spec
from launcher.sweeps import (
    SHARES,
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
from trainers import plots
from trainers.page import ROWS, Files, Json, table_of, template, wilson

AXES = 8
"""The most axes of the parallel coordinates, and slices; the most important fields are kept."""
_COUNTED = ("top1", "top5")
"""Metrics that are a share of counted images."""


def is_sweep(run: Run) -> bool:
    """Whether the run is a sweep, also if its spec is damaged."""
    for key in ("spec.json", "sweep.json"):
        try:
            document = run.read_json(key)
        except (SiteError, RecursionError):
            continue
        if isinstance(document, dict):
            return bool(document.get("sweep")) if key == "spec.json" else True
    return False


def render(run: Run, state: State | None = None) -> str:
    """The whole page. Raises only if there is no such run or its storage cannot be reached."""
    files = Files(run)
    state, plan = state or files.state(), files.read("plan.json")
    metrics = files.read("metrics.json")
    spec, ledger = _spec(files), _ledger(files)
    view = files.guard("sweep.json", _View, run, spec, ledger, plan, table_of(metrics, "final"))
    page = {
        "run": run,
        "title": run.name,
        "mark": state.status,
        "state": state,
        "plan": plan,
        "metrics": metrics,
        "spec": spec,
        "search": spec.sweep if spec else None,
        "ledger": ledger,
        "logs": f"launch logs {run.name}",
        "facts": table_of(plan, "facts"),
        "final": table_of(metrics, "final"),
        "commands": _commands(run.name, state, ledger, spec),
        "attempts": files.attempts(),
        "rows": ROWS,
        **({name: files.guard("sweep.json", build) for name, build in view.sections().items()} if view else {}),
        "notes": files.notes,
    }
    return template("sweep.html.j2").render(page)


def _spec(files: Files) -> Spec | None:
    try:
        return files.run.spec()
    except LaunchError:
        files.damaged("spec.json")
        return None


def _ledger(files: Files) -> Ledger:
    try:
        return Ledger.load(files.run)
    except (LaunchError, RecursionError):
        files.damaged("sweep.json")
        return Ledger({"top1": "max"})


def _commands(name: str, state: State, ledger: Ledger, spec: Spec | None) -> list[tuple[str, str]]:
    if state.status is Status.SUCCEEDED:
        more = 2 * (spec.sweep.trials if spec and spec.sweep else len(ledger.trials))
        return [("Classify an image", f"launch predict {name} img.jpg"),
                ("Try more settings", f"launch resume {name} --trials {more}")]  # fmt: skip
    if state.status.final:
        return [("Go on; trials that have ended are kept", f"launch resume {name}"),
                ("See all trials", f"launch trials {name}")]  # fmt: skip
    return [("See where it stands", f"launch status {name}"), ("Watch it", f"launch attach {name}")]


class _View:
    """What the page shows of the trials."""

    def __init__(self, run: Run, spec: Spec | None, ledger: Ledger, plan: Json, final: Json) -> None:
        self.run = run
        self.spec = spec
        self.ledger = ledger
        self.search: Sweep | None = spec.sweep if spec else None
        counted = table_of(plan, "facts").get("val") or (final.get("count") if final.get("split") == "val" else 0)
        self.images = counted if type(counted) is int and counted > 0 else 0
        self.currency = str(table_of(plan, "layout").get("currency") or "")
        self.metric, self.mode = next(iter(ledger.objectives.items()))
        self.best = ledger.winner()
        self.default = next((trial for trial in ledger.trials if trial.origin == "default"), None)
        longest = max((len(trial.epochs) for trial in ledger.trials), default=0)
        self.epochs = (spec.train.epochs if spec else None) or longest or 1
        weight = ledger.importance
        self.keys = sorted(searched(ledger.trials), key=lambda key: -weight.get(key, 0.0))
        known = [(trial, self.value(trial)) for trial in ledger.ranked()]
        step = math.ceil(len(known) / plots.DRAWN) or 1
        self.ranked = [(trial, value) for trial, value in known if value is not None][::step]
        self.step = step

    def value(self, trial: Trial | None) -> float | None:
        found = trial and trial.best(self.metric, self.mode)
        return float(found[self.metric]) if found else None

    def sections(self) -> dict[str, Callable[[], Any]]:
        """What the template shows, by name; one that cannot be made costs the page no other."""
        return {
            "metric": lambda: metric_name(self.metric),
            "better": lambda: "Higher is better" if self.mode == "max" else "Lower is better",
            "headline": self.headline,
            "settings": self.settings,
            "changes": lambda: [(epoch, _words(to)) for epoch, to in self.best.changes()] if self.best else [],
            "command": self.command,
            "importance": lambda: sorted(self.ledger.importance.items(), key=lambda pair: -pair[1]),
            "slices": self.slices,
            "parallel": self.parallel,
            "learning": self.learning,
            "fronts": self.fronts,
            "board": self.board,
            "failed": lambda: self.ledger.having(Outcome.FAILED)[:ROWS],
            "totals": self.totals,
            "schedule": self.schedule,
            "currency": lambda: self.currency,
            "every": lambda: self.step,
        }

    # -- the best

    def headline(self) -> Json | None:
        value = self.value(self.best)
        if self.best is None or value is None:
            return None
        total = self.images if self.metric in _COUNTED else 0
        default = self.value(self.default) if self.default is not self.best else None
        interval = wilson(round(value * total), total) if total else None
        low = min(value if default is None else default, interval[0]) if interval else 0.0
        spread = 1.96 * math.sqrt(2 * value * (1 - value) / total) if total else None
        return {
            "trial": self.best.number, "value": value, "text": self.text(value),
            "epoch": (self.best.best(self.metric, self.mode) or {}).get("epoch"), "count": total,
            "interval": interval, "low": max(0.0, 1 - 1.6 * (1 - low)) if low < 1 else 0.0,
            "correct": round(value * total), "is_default": self.best is self.default,
            "default": None if default is None else self.text(default), "default_at": default,
            "gain": None if default is None else self.gain(value, default),
            "chance": None if spread is None else f"{100 * spread:.1f}",
        }  # fmt: skip

    def text(self, value: float) -> str:
        return _shown(self.metric, value)

    def gain(self, value: float, default: float) -> str:
        better = value - default if self.mode == "max" else default - value
        word = "better" if better >= 0 else "worse"
        if self.metric in SHARES:
            # Of the rounded shares, so that it fits what stands beside it.
            return f"{abs(round(100 * value, 1) - round(100 * default, 1)):.1f} points {word}"
        return f"{metric_text(self.metric, abs(better))} {word}"

    def settings(self) -> list[Json]:
        """The searched fields: the best value, that of the default settings, and what was searched."""
        space = (self.search.space if self.search else None) or {}
        default = self.default.settings if self.default else {}
        keys = dict.fromkeys([*self.keys, *space])
        return [{
            "key": key, "best": _of(self.best.settings, key) if self.best else "–", "default": _of(default, key),
            "domain": space[key].describe() if key in space else "",
            "when": ", ".join(f"{name} is {setting_text(wanted)}" for name, wanted in (space[key].when or {}).items())
            if key in space else "",
        } for key in keys]  # fmt: skip

    def command(self) -> str:
        try:
            return shlex.join(command_of(spec_of(self.run, self.best))) if self.best else ""
        except (LaunchError, ValueError):
            return ""

    # -- the drawings

    def marks(self, trial: Trial) -> str:
        share = len(trial.epochs) / self.epochs
        words = [f"e{min(4, math.floor(5 * share))}"]
        words += ["best"] * (trial is self.best) + ["default"] * (trial is self.default)
        words += [trial.outcome.lower()] * (trial.outcome in (Outcome.STOPPED, Outcome.FAILED))
        return " ".join(words)

    def slices(self) -> list[Json]:
        """One scatter for each searched field."""
        if len(self.ranked) < 2:
            return []
        space = (self.search.space if self.search else None) or {}
        up = plots.metric_scale(self.metric, [value for _, value in self.ranked])
        drawn = []
        for key in self.keys[: 2 * AXES]:
            points = [(trial, trial.settings[key], value) for trial, value in self.ranked if key in trial.settings]
            if not points:
                continue
            across = plots.field_scale(space.get(key), [value for _, value, _ in points])
            svg = plots.scatter(f"{metric_name(self.metric)} of {len(points)} trials by {key}", points, (across, up),
                                ("", self.metric), self.marks, self.title)  # fmt: skip
            drawn.append({"key": key, "svg": svg, "trials": len(points), "log": across.kind == "log"})
        return drawn

    def title(self, trial: Trial) -> str:
        """Its settings are on the page once, not once for each mark."""
        value = self.value(trial)
        told = "" if value is None else f"{metric_name(self.metric)} {self.text(value)}, "
        return f"trial {trial.number}: {told}{len(trial.epochs)} epochs, {trial.outcome.lower()}"

    def parallel(self) -> Any:
        keys = self.keys[: AXES - 1]
        if len(keys) < 2 or len(self.ranked) < 3:
            return None
        space = (self.search.space if self.search else None) or {}
        columns: list[Any] = []
        for key, name in zip(keys, short_names(keys), strict=True):
            values = [trial.settings[key] for trial, _ in self.ranked if key in trial.settings]
            scale = plots.field_scale(space.get(key), values)
            columns.append((name, scale, lambda trial, key=key: trial.settings.get(key)))
        columns.append((self.metric, plots.metric_scale(self.metric, [value for _, value in self.ranked]), self.value))
        top = {trial.number for trial, _ in self.ranked[: max(1, round(len(self.ranked) / 5))]}

        def marks(trial: Trial) -> str:
            return "best" if trial is self.best else "top" if trial.number in top else "rest"

        label = f"Settings and {metric_name(self.metric)} of {len(self.ranked)} trials"
        return plots.parallel(label, self.ranked, columns, marks, self.title)

    def learning(self) -> Any:
        trials = [trial for trial in self.ledger.trials if self.value(trial) is not None]
        if not trials:
            return None
        step = math.ceil(len(trials) / plots.DRAWN)
        kept = [trial for trial in trials if trial.number % step == 0 or trial in (self.best, self.default)]
        label = f"{metric_name(self.metric)} of {len(kept)} trials after each epoch"
        return plots.learning(label, kept, self.metric, self.epochs, self.rungs(), self.marks, self.title)

    def fronts(self) -> list[Json]:
        """With several objectives: the first against each of the others, and the trials that nothing beats."""
        front, drawn = self.ledger.front(), []
        for other, mode in list(self.ledger.objectives.items())[1:]:
            pairs = [(trial, values[other], values[self.metric]) for trial, _ in self.ranked
                     if (values := trial.values(self.ledger.objectives))]  # fmt: skip
            if not pairs:
                continue
            scales = (plots.metric_scale(other, [x for _, x, _ in pairs]),
                      plots.metric_scale(self.metric, [y for _, _, y in pairs]))  # fmt: skip
            best = {trial.number for trial in front}
            line = sorted((x, y) for trial, x, y in pairs if trial.number in best)
            label = f"{metric_name(self.metric)} and {metric_name(other)} of {len(pairs)} trials"

            def marks(trial: Trial, best: set[int] = best) -> str:
                return self.marks(trial) + " front" * (trial.number in best)

            svg = plots.scatter(label, pairs, scales, (other, self.metric), marks, self.title,
                                line if len(self.ledger.objectives) == 2 else ())  # fmt: skip
            drawn.append({"name": metric_name(other), "mode": mode, "svg": svg, "front": len(best)})
        return drawn

    # -- the tables

    def board(self) -> Json:
        """The leaderboard: a row of cells for each trial, up to `ROWS`."""
        longest = max((trial.seconds for trial in self.ledger.trials), default=0.0) or 1.0
        pages = _pages(self.run)
        rows = [{
            **row, "values": [_shown(metric, row[metric]) for metric in self.ledger.objectives],
            "cells": [_of(row["settings"], key) for key in self.keys], "share": max(row["seconds"], 0) / longest,
            "page": f"trials/{row['trial']:04d}/report.html" if row["trial"] in pages else None,
            "best": self.best is not None and row["trial"] == self.best.number,
        } for row in leaderboard(self.ledger)[:ROWS]]  # fmt: skip
        return {
            "rows": rows, "heads": list(zip(self.keys, short_names(self.keys), strict=True)),
            "metrics": [metric_name(metric) for metric in self.ledger.objectives],
            "several": len(self.ledger.objectives) > 1, "cost": any(row["cost"] for row in rows),
        }  # fmt: skip

    def totals(self) -> list[Json]:
        """What the trials of each outcome took."""
        whole = sum(trial.seconds for trial in self.ledger.trials) or 1.0
        found = []
        for colour, outcome in enumerate((Outcome.FINISHED, Outcome.STOPPED, Outcome.FAILED, None)):
            trials = [trial for trial in self.ledger.trials
                      if trial.outcome is outcome or (outcome is None and not trial.outcome.final)]  # fmt: skip
            costs = [trial.cost for trial in trials if trial.cost is not None]
            if trials:
                seconds = sum(trial.seconds for trial in trials)
                found.append({
                    "outcome": outcome.lower() if outcome else "not over", "trials": len(trials), "seconds": seconds,
                    "epochs": sum(len(trial.epochs) for trial in trials), "cost": sum(costs) if costs else None,
                    "share": seconds / whole, "colour": colour,
                })  # fmt: skip
        return found

    def rungs(self) -> tuple[int, ...]:
        asha = self.search is not None and self.search.scheduler == "asha"
        return self.search.rungs(self.epochs) if self.search and asha else ()

    def schedule(self) -> Json:
        """What was trained, and what the same trials would have taken without stopping any."""
        trained, whole = self.ledger.epochs(), len(self.ledger.trials) * self.epochs
        return {"trained": trained, "whole": whole, "rungs": self.rungs(), "epochs": self.epochs,
                "share": trained / whole if whole else None, "trials": len(self.ledger.trials)}  # fmt: skip


def _shown(metric: str, value: float | None) -> str:
    if value is not None and metric in SHARES:
        return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
    return metric_text(metric, value)


def _of(settings: dict[str, Any], key: str) -> str:
    return setting_text(settings[key]) if key in settings else "–"


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {setting_text(value)}" for key, value in settings.items())


def _pages(run: Run) -> set[int]:
    """The trials that have a report of their own."""
    found = (re.fullmatch(r"trials/(\d+)/report\.html", entry.key) for entry in run.store.list("trials/"))
    return {int(match[1]) for match in found if match}
