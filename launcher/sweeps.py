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
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import TypeAdapter, ValidationError

from launcher.errors import NotFoundError, SiteError
from launcher.runs import Run, State, Status
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
SHARES = ("top1", "top5", "macro_f1", "train_top1", "data_wait")
"""Those that are shares of 1."""


def metric_name(metric: str) -> str:
    """As people read it: `top-1`, `macro F1`, `images per second`."""
    names = {"top1": "top-1", "top5": "top-5", "macro_f1": "macro F1", "train_top1": "train top-1"}
    return names.get(metric, metric.replace("_", " "))


def metric_text(metric: str, value: float | None) -> str:
    """A value as people read it: `98.9%`, `0.0513`, `1,620`; nothing for None."""
    if value is None:
        return ""
    if metric in SHARES:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def setting_text(value: Any) -> str:
    """The value of a field in a few characters: `0.0123`, `none`, `layer1,layer2`."""
    if isinstance(value, (list, tuple)):
        return ",".join(setting_text(item) for item in value) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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

    Each of `epochs` has "epoch", "step", "lr" and `METRICS`, and "settings" where they changed before it (PBT).
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

    def state(self) -> State:
        """Where it stands, in the words of runs."""
        words = {Outcome.FINISHED: Status.SUCCEEDED, Outcome.STOPPED: Status.CANCELLED, Outcome.FAILED: Status.FAILED,
                 Outcome.RUNNING: Status.RUNNING, Outcome.INTERRUPTED: Status.INTERRUPTED}  # fmt: skip
        return State(
            words.get(self.outcome, Status.PENDING), self.reason, created=self.began or 0.0, started=self.began,
            ended=self.ended, error=self.error,
        )  # fmt: skip

    def best(self, metric: str, mode: str) -> dict[str, Any] | None:
        """The epoch with the best value of a metric, of equals that with the least loss; None if there is none."""
        sign = 1 if mode == "max" else -1

        def rank(epoch: dict[str, Any]) -> tuple[float, float]:
            loss = _finite(epoch.get("loss"))
            return sign * epoch[metric], -math.inf if loss is None else -loss

        known = [epoch for epoch in self.epochs if _finite(epoch.get(metric)) is not None]
        return max(known, key=rank, default=None)

    def values(self, objectives: dict[str, str]) -> dict[str, float] | None:
        """The objectives at the epoch that is best by the first of them."""
        found = self.best(*next(iter(objectives.items()))) or {}
        values = {metric: value for metric in objectives if (value := _finite(found.get(metric))) is not None}
        return values if len(values) == len(objectives) else None

    def changes(self) -> list[tuple[int, dict[str, Any]]]:
        """The settings that were changed on the way (PBT), each with the first epoch that was trained with them."""
        return [(epoch["epoch"], epoch["settings"]) for epoch in self.epochs if epoch.get("settings")]


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
            return _SHAPE.validate_python(document)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            what = ": ".join(part for part in (".".join(map(str, first["loc"])), first["msg"]) if part)
            raise SiteError(f"the file is damaged: {what}", where=f"{run.uri}/sweep.json",
                            hint="restore it, or delete the sweep") from error  # fmt: skip

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("there is no objective")
        if [trial.number for trial in self.trials] != list(range(1, len(self.trials) + 1)):
            raise ValueError("the trials are not numbered 1, 2, …")

    def save(self, run: Run) -> None:
        """Writes sweep.json, a trial a line, and leaderboard.csv."""
        head = {"schema": SCHEMA, **{key: value for key, value in vars(self).items() if key != "trials"}}
        # It is written anew every few seconds; copies and indents would take five times as long.
        trials = ",\n".join(json.dumps(vars(trial)) for trial in self.trials)
        run.store.write("sweep.json", f'{json.dumps(head)[:-1]}, "trials": [\n{trials}\n]}}\n'.encode())
        run.store.write("leaderboard.csv", leaderboard_csv(self).encode())

    def trial(self, number: int) -> Trial:
        """`NotFoundError` names the numbers there are."""
        if not 1 <= number <= len(self.trials):
            raise NotFoundError(f"there is no trial {number}", where="--trial",
                                hint=f"1 to {len(self.trials)}" if self.trials else "none has begun")  # fmt: skip
        return self.trials[number - 1]

    def ranked(self) -> list[Trial]:
        """Trials with a result that did not fail, the best first: by the first objective, then by validation loss."""
        metric, mode = next(iter(self.objectives.items()))
        sign = -1 if mode == "max" else 1
        known = [(trial, trial.best(metric, mode)) for trial in self.trials if trial.outcome is not Outcome.FAILED]
        rows = [(sign * best[metric], _finite(best.get("loss")), trial.number, trial) for trial, best in known if best]
        rows.sort(key=lambda row: (row[0], math.inf if row[1] is None else row[1], row[2]))
        return [trial for *_, trial in rows]

    def front(self) -> list[Trial]:
        """The trials that no other beats in one objective without losing in another, best first by the first one."""
        known = [(trial, _losses(trial, self.objectives)) for trial in self.ranked()]
        points = sorted({losses for _, losses in known if losses})  # the best first: it beats most
        return [trial for trial, mine in known if mine and not any(_beats(other, mine) for other in points)]

    def epochs(self) -> int:
        """Epochs trained by all trials."""
        return sum(len(trial.epochs) for trial in self.trials)

    def having(self, *outcomes: Outcome) -> list[Trial]:
        """The trials with one of these outcomes."""
        return [trial for trial in self.trials if trial.outcome in outcomes]

    def over(self) -> list[Trial]:
        """The trials that have ended."""
        return [trial for trial in self.trials if trial.outcome.final]

    def winner(self) -> Trial | None:
        """The best trial: the one that was exported, or the best so far."""
        chosen = [trial for trial in self.trials if trial.number == self.best]
        return next(iter(chosen or self.ranked()), None)


_SHAPE = TypeAdapter(Ledger)


def _finite(value: Any) -> float | None:
    """The value if it is a finite number."""
    try:
        known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if known else None
    except OverflowError:  # JSON knows integers that no float can hold
        return None


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _losses(trial: Trial, objectives: dict[str, str]) -> tuple[float, ...]:
    """The objectives, signed so that less is better; empty for a trial without a result."""
    values = trial.values(objectives)
    return tuple(-values[key] if mode == "max" else values[key] for key, mode in objectives.items()) if values else ()


def spec_of(sweep: Run, trial: Trial) -> Spec:
    """What the trial trains; made anew where its run directory is gone."""
    try:
        return sweep.trial(trial.number).spec()
    except NotFoundError:
        return sweep.spec().model_copy(update={"sweep": None}).updated(trial.settings)


def searched(trials: Iterable[Trial]) -> list[str]:
    """The fields that the trials differ in, in the order in which they appear."""
    return list(dict.fromkeys(key for trial in trials for key in trial.settings))


def short_names(keys: list[str]) -> list[str]:
    """The last part of each field's name, or the whole name where two end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return [key if ends.count(end) > 1 else end for key, end in zip(keys, ends, strict=True)]


def leaderboard(ledger: Ledger) -> list[dict[str, Any]]:
    """One row for each trial, the best first, then those without a result yet, the failed last."""
    ranked = ledger.ranked()
    ranks = {trial.number: rank for rank, trial in enumerate(ranked, 1)}
    front = {trial.number for trial in ledger.front()}
    rest = [trial for trial in ledger.trials if trial.number not in ranks]
    rest.sort(key=lambda trial: trial.outcome is Outcome.FAILED)
    metric, mode = next(iter(ledger.objectives.items()))
    rows = []
    for trial in [*ranked, *rest]:
        best = trial.best(metric, mode) or {}
        rows.append({
            "rank": ranks.get(trial.number), "trial": trial.number, "outcome": str(trial.outcome),
            **{key: _finite(best.get(key)) for key in dict.fromkeys([*ledger.objectives, "top1", "loss"])},
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
