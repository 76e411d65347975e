"""Builds run directories as the driver of a sweep leaves them, for the tests of what is shown of a sweep."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from launcher.runs import Run, State, Status
from launcher.space import Domain, Sweep
from launcher.spec import Data, Model, Spec, Train
from launcher.sweeps import Ledger, Outcome, Trial

BEGAN = 1795460000.0
SPACE = {
    key: Domain.model_validate(domain)
    for key, domain in {
        "optim.lr": {"loguniform": (0.001, 0.3)},
        "optim.weight_decay": {"loguniform": (1e-6, 1e-2)},
        "optim.label_smoothing": {"quniform": (0.0, 0.2, 0.05)},
        "augment.policy": {"choice": ("none", "randaugment")},
        "augment.magnitude": {"randint": (3, 15), "when": {"augment.policy": "randaugment"}},
    }.items()
}
NAN = {
    "kind": "NonFiniteLossError", "family": "data", "what": "the loss became NaN at step 12", "where": "s3://bucket/x",
    "hint": "a lower optim.lr",
}  # fmt: skip


def build(
    storage: Path,
    status: Status = Status.SUCCEEDED,
    *,
    name: str = "search-1123",
    trials: int = 16,
    epochs: int = 12,
    done: int | None = None,
    objectives: dict[str, str] | None = None,
    space: dict[str, Domain] | None = None,
    uri: str = "s3://bucket/flowers",
    failed: int = 1,
    price: float | None = 2.0,
    error: dict[str, str] | None = None,
    **sweep: Any,
) -> Run:
    """A sweep of which `done` trials have ended (all of one that succeeded); the last `failed` of them failed.

    While it runs, two more trials are in their second epoch.
    """
    run = Run(str(storage), name)
    space = space or SPACE
    objectives = objectives or {"top1": "max"}
    search = Sweep.model_validate({"trials": trials, "space": space, "objectives": objectives, **sweep})
    spec = Spec(data=Data(uri=uri), model=Model(name="resnet10t"), train=Train(epochs=epochs), sweep=search)
    run.create(spec, _plan(uri, price))
    done = done if done is not None else {Status.SUCCEEDED: trials, Status.PENDING: 0}.get(status, trials // 2)
    ended = BEGAN + 2000 if status.final else None
    run.set_state(State(status, attempt=1, created=BEGAN - 60, started=BEGAN, ended=ended, error=error))
    if status is Status.PENDING:
        return run
    run.write_json("attempts/0001.json", {"began": BEGAN, "ended": BEGAN + 1800, "from_step": 0, "host": "head-a1"})
    ledger = Ledger(dict(search.objectives))
    chance = random.Random(0)
    for number in range(1, done + 1):
        ledger.trials.append(_trial(number, spec, space, chance, failed=number > done - failed, price=price))
    for number in range(done + 1, min(done + 2, trials) + 1) if not status.final else ():
        trial = _trial(number, spec, space, chance, price=price)
        trial.outcome, trial.reason, trial.epochs, trial.ended = Outcome.RUNNING, "", trial.epochs[:1], None
        ledger.trials.append(trial)
    ranked = ledger.ranked()
    if len(ranked) > 4:
        ledger.importance = dict(zip(space, (0.61, 0.22, 0.11, 0.05, 0.01), strict=False))
    ledger.best = ranked[0].number if ranked else None
    ledger.save(run)
    for trial in ledger.trials:
        _leave(run, spec, trial)
    if status is Status.SUCCEEDED and ranked:
        _finish(run, ranked[0], trials)
    return run


def _plan(uri: str, price: float | None) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "choices": [{"key": "data.uri", "value": uri, "why": "", "source": "you"}],
        "facts": {"images": 4_012, "classes": 10, "train": 3_211, "val": 800, "test": 0},
        "pool": "local", "workers": 1, "warnings": [],
    }  # fmt: skip
    if price is not None:
        plan["layout"] = {"price_per_hour": price, "currency": "USD"}
    return plan


def _trial(
    number: int, spec: Spec, space: dict[str, Domain], chance: random.Random, *, failed: bool = False,
    price: float | None = None,
) -> Trial:  # fmt: skip
    """The first has the defaults; later ones are the better the nearer their learning rate is to 0.03."""
    settings = _draw(space, chance)
    if number == 1:
        settings = {**settings, **({"optim.lr": 0.0125} if "optim.lr" in space else {})}
    trial = Trial(number, settings, "default" if number == 1 else "optuna", began=BEGAN + 90 * number)
    total = spec.train.epochs or 1
    miss = abs(math.log10(float(settings.get("optim.lr", 0.03)) / 0.03)) + chance.uniform(0, 0.2)
    reach = 0.995 - 0.04 * miss**2
    rungs = [1, 3, 9]
    stop = next((rung for rung, limit in zip(rungs, (1.0, 0.7, 0.45), strict=True) if miss > limit), total)
    for epoch in range(1, (min(2, total) if failed else min(stop, total)) + 1):
        top1 = max(0.0, reach * (1 - 0.7 * math.exp(-epoch / 1.6)) + chance.uniform(-0.004, 0.004))
        trial.epochs.append({
            "epoch": epoch, "step": 25 * epoch, "lr": 0.01, "top1": top1, "top5": min(1.0, top1 + 0.03),
            "macro_f1": top1 - 0.002, "loss": 2.3 * (1 - top1) + 0.1, "train_loss": 2.2 * (1 - top1),
            "train_top1": top1, "images_per_second": 200 + 400 * chance.random(), "parameters": 5e6,
            "seconds": 7.1 * epoch, "data_wait": 0.01,
        })  # fmt: skip
    trial.seconds = 3.0 + 7.1 * len(trial.epochs)
    trial.ended = BEGAN + 90 * number + trial.seconds
    trial.cost = None if price is None else price * trial.seconds / 3600
    trial.outcome = Outcome.FINISHED
    if failed:
        trial.outcome, trial.error = Outcome.FAILED, dict(NAN)
        trial.epochs[-1]["loss"] = math.nan
    elif stop < total:
        trial.outcome, trial.reason = Outcome.STOPPED, f"worse than two thirds of the trials at epoch {stop}"
    return trial


def _draw(space: dict[str, Domain], chance: random.Random) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, domain in space.items():
        if not domain.applies(settings):
            continue
        values = domain.values
        if domain.kind == "loguniform":
            settings[key] = 10 ** chance.uniform(math.log10(values[0]), math.log10(values[1]))
        elif domain.kind == "uniform":
            settings[key] = chance.uniform(values[0], values[1])
        elif domain.kind == "quniform":
            settings[key] = values[0] + values[2] * chance.randrange(round((values[1] - values[0]) / values[2]) + 1)
        elif domain.kind == "randint":
            settings[key] = chance.randint(values[0], values[1])
        else:
            settings[key] = chance.choice(values)
    return settings


def _leave(run: Run, spec: Spec, trial: Trial) -> None:
    """The files of the trial's own run directory."""
    here = run.trial(trial.number)
    single = spec.model_copy(update={"sweep": None, "name": None})
    here.write_json("spec.json", single.updated(trial.settings).model_dump(mode="json"))
    kept = ("epoch", "step", "lr", "train_loss", "train_top1", "images_per_second", "data_wait")
    epochs = [
        {**{key: epoch[key] for key in kept},
         "val": {key: epoch[key] for key in ("top1", "top5", "macro_f1", "loss")},
         "seconds": 6.0, "eval_seconds": 1.1, "best": epoch is trial.epochs[-1]}
        for epoch in trial.epochs
    ]  # fmt: skip
    if epochs:
        here.write_json("metrics.json", {"epochs": epochs})
    here.store.write("logs/rank-0.log", f"2026-11-23T18:53:20Z trial {trial.number} begins\n".encode())


def _finish(run: Run, best: Trial, trials: int) -> None:
    last = max(best.epochs, key=lambda epoch: epoch["top1"])
    final = {"split": "val", "epoch": last["epoch"], "count": 800, "loss": last["loss"], "top1": last["top1"],
             "top5": last["top5"], "macro_f1": last["macro_f1"]}  # fmt: skip
    run.write_json("metrics.json", {"epochs": [], "final": final, "versions": {"raylaunch": "0.1.0", "ray": "2.60.0"}})
    run.update(result={**final, "trial": best.number, "trials": trials})
    run.trial(best.number).store.write("report.html", b"<!DOCTYPE html>")
