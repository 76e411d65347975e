"""Which trials go on: our ASHA and the schedulers of Ray Tune, taught what was trained before they were there.

A scheduler is rebuilt from the ledger whenever a sweep goes on, so nothing of it is ever stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune import schedulers
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler

from launcher.space import Domain, Sweep
from launcher.spec import Spec
from launcher.sweeps import Ledger, Trial
from trainers.asha import Asha


class Unstored:
    """Tune stores its parts as pickles, which a sweep never reads: an empty object stands there for ours."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class Judge(Unstored, TrialScheduler):  # type: ignore[misc]
    """A scheduler that knows what was trained before it was there. `why` it stopped a trial, by Tune's id.

    `trials` has those that Tune knows, by that id, and grows; `left` says how many will still be proposed. HyperBand's
    brackets and PBT's population are of the living: what the ledger has means nothing to them.
    """

    def __init__(self, spec: Spec, ledger: Ledger, trials: dict[str, Trial], left: Callable[[], int]) -> None:
        super().__init__()
        self._sweep, self._epochs = spec.sweep or Sweep(), spec.train.epochs or 1
        self._metric = self._sweep.objective[0]
        self._trials = trials
        asha = self._sweep.scheduler == "asha"
        self._asha = Asha(self._sweep, self._epochs, ledger, trials, left) if asha else None
        self._inner = self._asha or _scheduler(self._sweep, self._epochs)
        self.why: dict[str, str] = {}
        self.paused: set[str] = set()
        self._condemned: set[str] = set()
        for trial in ledger.trials if self._sweep.scheduler == "median" else ():
            if trial.outcome.final and trial.epochs:
                ghost = TuneTrial("ghost", trial_id=f"ghost-{trial.number}", stub=True)
                self._inner.on_trial_add(None, ghost)
                self._show(ghost, trial)

    def ready(self) -> bool:
        """Whether Tune may begin a new trial, where it does not count them itself."""
        return self._asha is None or self._asha.ready()

    def _show(self, tune_trial: TuneTrial, trial: Trial) -> None:
        for epoch in trial.epochs:
            self._ask(SimpleNamespace(get_live_trials=list), tune_trial, dict(epoch))

    def _ask(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        # The median rule must not be asked again of a trial that it has stopped, though we may train it on.
        if trial.trial_id in self._condemned:
            return str(TrialScheduler.STOP)
        verdict = str(self._inner.on_trial_result(tune_controller, trial, result))
        if verdict == TrialScheduler.STOP:
            self._condemned.add(trial.trial_id)
        return verdict

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:  # noqa: ARG002
        return True

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        # PBT refuses to run beside a searcher, which might learn from settings that it changes; ours does not.
        pbt = self._sweep.scheduler == "pbt"
        self._inner.on_trial_add(SimpleNamespace(search_alg=None) if pbt else tune_controller, trial)
        if self._sweep.scheduler == "median":
            self._show(trial, self._trials[trial.trial_id])

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._inner.on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        mine = self._trials[trial.trial_id]
        self.paused.discard(trial.trial_id)
        if self._metric not in result or not math.isfinite(result[self._metric]):
            return str(TrialScheduler.CONTINUE)
        if self._asha is None and told_before(mine, result):
            return str(TrialScheduler.CONTINUE)
        verdict = self._ask(tune_controller, trial, result)
        # PBT gives a trial the whole configuration of a better one, whose number is none of it.
        trial.config["number"] = mine.number
        if verdict == TrialScheduler.STOP and mine.origin == "default" and result["epoch"] < self._epochs:
            # What a plain run would have come to is worth knowing, and no sweep ends with less.
            return str(TrialScheduler.CONTINUE)
        if verdict == TrialScheduler.STOP and result["epoch"] < self._epochs:
            self.why[trial.trial_id] = self._reason(f"at epoch {result['epoch']}")
        if verdict == TrialScheduler.PAUSE:
            self.paused.add(trial.trial_id)
        return verdict

    def _reason(self, where: str) -> str:
        if self._sweep.scheduler == "median":
            return f"below the median of the others {where}"
        return f"not among the best 1 in {self._sweep.reduction} {where}"

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        if self._metric in result and math.isfinite(result[self._metric]):
            self._inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        if self._sweep.scheduler in ("asha", "hyperband"):
            where = f"at epoch {self._asha.waits_at(trial)}" if self._asha else "of its bracket"
            self.why[trial.trial_id] = self._reason(where)
        self._inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        return self._inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return str(self._inner.debug_string())

    def save(self, checkpoint_path: str) -> None:
        """The ledger has everything."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


def told_before(trial: Trial, result: dict[str, Any]) -> bool:
    """Whether the ledger has the epoch of a result: a trial that was lost tells those of its checkpoint again."""
    last = trial.epochs[-1]["epoch"] if trial.epochs else 0
    return int(result["epoch"]) <= int(last) and settings_in(result) == trial.settings


def settings_in(result: dict[str, Any]) -> dict[str, Any]:
    """The settings under which a result came about."""
    settings: dict[str, Any] = json.loads(result["settings"])
    return settings


def _scheduler(sweep: Sweep, epochs: int) -> TrialScheduler:
    metric, mode = sweep.objective
    goal = {"time_attr": "epoch", "metric": metric, "mode": mode}
    grace = min(sweep.grace_epochs or 1, epochs)
    if sweep.scheduler == "hyperband":
        return schedulers.HyperBandScheduler(**goal, max_t=epochs, reduction_factor=sweep.reduction)
    if sweep.scheduler == "median":
        return schedulers.MedianStoppingRule(**goal, grace_period=grace, min_samples_required=3)
    if sweep.scheduler == "pbt":
        space = {key: _mutation(domain) for key, domain in (sweep.space or {}).items()}
        return schedulers.PopulationBasedTraining(
            **goal, perturbation_interval=grace, hyperparam_mutations={"settings": space}, log_config=False,
        )  # fmt: skip
    return schedulers.FIFOScheduler()


def _mutation(domain: Domain) -> Any:
    if domain.finite:
        return list(domain.values)
    least, most = domain.values[:2]
    kinds = {"loguniform": tune.loguniform, "uniform": tune.uniform}
    if domain.kind == "randint":
        return tune.randint(least, most + 1)
    if domain.kind == "quniform":
        return tune.quniform(*domain.values)
    return kinds[domain.kind](least, most)
