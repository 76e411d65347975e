"""A sweep in its run directory: sweep.json, the one record of all trials, and what can be read off it.

    sweep.json            every trial with its settings and epochs (Ledger); written before a trial starts
    leaderboard.csv       the same as a table
    trials/0007/          the run directory of trial 7: spec, metrics, checkpoints, logs
    refit/                the run that was trained again on all images, if asked for
    model/, metrics.json  those of the best trial, or of the refit

The driver of the sweep is the only writer.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from launcher.errors import NotFoundError, SiteError
from launcher.runs import Run
from launcher.spec import Spec, fields

SCHEMA = 1
METRICS = {
    "top1": "share of validation images classified right", "top5": "share with the right class among five",
    "macro_f1": "mean F1 over the classes", "loss": "validation loss", "train_loss": "training loss",
    "train_top1": "share of training images classified right", "images_per_second": "training speed, over all workers",
    "parameters": "weights of the model", "seconds": "training and evaluation so far",
    "data_wait": "share of training time spent waiting for data",
}  # fmt: skip
"""What a trial reports after each epoch, and what a sweep can search for."""


class Outcome(StrEnum):
    """Where a trial stands. STOPPED trials were not worth more epochs; INTERRUPTED ones go on when the sweep does."""

    WAITING = "WAITING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    INTERRUPTED = "INTERRUPTED"
    FINISHED = "FINISHED"
    STOPPED = "STOPPED"
    FAILED = "FAILED"

    @property
    def final(self) -> bool:
        return self in (Outcome.FINISHED, Outcome.STOPPED, Outcome.FAILED)


@dataclass
class Trial:
    """One trial. `settings` are its values of the searched fields; `origin` says who proposed them: `default`, `point`,
    or the search.

    Each of `epochs` has "epoch", "step", "lr" and `METRICS`, and "settings" where they changed after it (PBT).
    `seconds` is the time it held its resources, `cost` what that cost (None without a price).
    """

    number: int
    settings: dict[str, Any]
    origin: str = ""
    outcome: Outcome = Outcome.WAITING
    reason: str = ""
    error: dict[str, str] | None = None
    epochs: list[dict[str, Any]] = field(default_factory=list)
    began: float | None = None
    ended: float | None = None
    seconds: float = 0.0
    cost: float | None = None
    retries: int = 0

    @property
    def name(self) -> str:
        return f"{self.number:04d}"

    def best(self, metric: str, mode: str) -> dict[str, Any] | None:
        """The epoch with the best value of a metric, the first of equals; None before the first epoch."""
        sign = 1 if mode == "max" else -1
        known = [epoch for epoch in self.epochs if math.isfinite(epoch.get(metric, math.nan))]
        return max(known, key=lambda epoch: sign * epoch[metric], default=None)

    def values(self, objectives: dict[str, str]) -> dict[str, float] | None:
        """The objectives at the epoch that is best by the first of them."""
        found = self.best(*next(iter(objectives.items())))
        if found is None or any(not math.isfinite(found.get(metric, math.nan)) for metric in objectives):
            return None
        return {metric: float(found[metric]) for metric in objectives}


@dataclass
class Ledger:
    """All trials of a sweep by number, 1 first. `importance` is each searched field's share of the differences."""

    objectives: dict[str, str]
    trials: list[Trial] = field(default_factory=list)
    importance: dict[str, float] = field(default_factory=dict)
    refit: dict[str, Any] | None = None
    best: int | None = None

    @classmethod
    def load(cls, run: Run) -> Ledger:
        """The ledger of a sweep; empty before its first trial."""
        document = run.read_json("sweep.json")
        if document is None:
            sweep = run.spec().sweep
            if sweep is None:
                raise NotFoundError(f"{run.name} is a single training, not a sweep", where=run.uri,
                                    hint=f"launch status {run.name}")  # fmt: skip
            return cls(dict(sweep.objectives))
        try:
            trials = [Trial(**{**trial, "outcome": Outcome(trial["outcome"])}) for trial in document["trials"]]
            return cls(document["objectives"], trials, document["importance"], document["refit"], document["best"])
        except (TypeError, KeyError, ValueError) as error:
            raise SiteError(f"the file is damaged: {error}", where=f"{run.uri}/sweep.json",
                            hint="restore it, or delete the sweep") from error  # fmt: skip

    def save(self, run: Run) -> None:
        """Writes sweep.json and leaderboard.csv."""
        run.write_json("sweep.json", {"schema": SCHEMA, **asdict(self)})
        run.store.write("leaderboard.csv", leaderboard_csv(self).encode())

    def trial(self, number: int) -> Trial:
        """`NotFoundError` names the numbers there are."""
        if not 1 <= number <= len(self.trials):
            raise NotFoundError(f"there is no trial {number}", where="--trial",
                                hint=f"1 to {len(self.trials)}" if self.trials else "none has begun")  # fmt: skip
        return self.trials[number - 1]

    def ranked(self) -> list[Trial]:
        """Trials with a result, the best first: by the first objective, then by validation loss."""
        metric, mode = next(iter(self.objectives.items()))
        sign = -1 if mode == "max" else 1
        known = [(trial, trial.best(metric, mode)) for trial in self.trials]
        rows = [(sign * best[metric], best.get("loss", math.inf), trial.number) for trial, best in known if best]
        return [self.trials[number - 1] for _, _, number in sorted(rows)]

    def front(self) -> list[Trial]:
        """The trials that no other beats in one objective without losing in another, best first by the first one."""
        return [trial for trial in self.ranked() if trial.values(self.objectives) and not self._beaten(trial)]

    def _beaten(self, trial: Trial) -> bool:
        mine = _losses(trial, self.objectives)
        others = (_losses(other, self.objectives) for other in self.trials if other is not trial)
        return any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in others if other)

    def epochs(self) -> int:
        """Epochs trained by all trials."""
        return sum(len(trial.epochs) for trial in self.trials)


def _losses(trial: Trial, objectives: dict[str, str]) -> tuple[float, ...]:
    """The objectives, signed so that less is better; empty for a trial without a result."""
    values = trial.values(objectives)
    return tuple(-values[key] if mode == "max" else values[key] for key, mode in objectives.items()) if values else ()


def trial_run(sweep: Run, number: int) -> Run:
    """The run directory of a trial."""
    return Run(f"{sweep.uri}/trials", f"{number:04d}")


def searched(trials: Iterable[Trial]) -> list[str]:
    """The fields that the trials differ in, in the order in which they appear."""
    return list(dict.fromkeys(key for trial in trials for key in trial.settings))


def leaderboard(ledger: Ledger) -> list[dict[str, Any]]:
    """One row for each trial, the best first and those without a result last."""
    ranked = ledger.ranked()
    front = {trial.number for trial in ledger.front()}
    rest = [trial for trial in ledger.trials if trial not in ranked]
    metric, mode = next(iter(ledger.objectives.items()))
    rows = []
    for rank, trial in enumerate([*ranked, *rest], 1):
        best = trial.best(metric, mode) or {}
        rows.append({
            "rank": rank if trial in ranked else None, "trial": trial.number, "outcome": str(trial.outcome),
            **{key: best.get(key) for key in dict.fromkeys([*ledger.objectives, "top1", "loss"])},
            "best_epoch": best.get("epoch"), "epochs": len(trial.epochs), "seconds": round(trial.seconds, 1),
            "cost": trial.cost, "pareto": trial.number in front, "origin": trial.origin,
            "settings": trial.settings, "reason": trial.error["what"] if trial.error else trial.reason,
        })  # fmt: skip
    return rows


def leaderboard_csv(ledger: Ledger) -> str:
    """The leaderboard as CSV, one column for each searched field."""
    rows = leaderboard(ledger)
    keys = searched(ledger.trials)
    names = [key for key in (rows[0] if rows else {}) if key != "settings"]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*names, *keys])
    for row in rows:
        table.writerow([*(_cell(row[name]) for name in names), *(_cell(row["settings"].get(key)) for key in keys)])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Spreadsheets take a text that begins with one of these for a formula."""
    text = value if value is None or isinstance(value, (int, float)) else str(value)
    return f"'{text}" if isinstance(text, str) and text[:1] in "=+-@\t\r" and text else text


def command_of(spec: Spec) -> list[str]:
    """The words of the one command that trains what a trial trained: every field that decides the weights and is not
    left at its default."""
    words = ["launch", "--data", spec.data.uri]
    known = fields()
    for key, value in spec.flat().items():
        section = key.partition(".")[0]
        if section not in ("data", "model", "optim", "train", "augment") or key == "data.uri":
            continue
        if value != _plain(known[key].default):
            words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return words


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
