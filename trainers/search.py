"""Who proposes the settings of trials: Optuna, behind Ray Tune's `Searcher`.

It is rebuilt from the ledger whenever a sweep goes on, so nothing of it is ever stored: the sampler is taught every
trial that ended or waits. See `trainers.judge` for which trials go on.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.search import Searcher

from launcher.space import Domain, Sweep, grid, ordered, own
from launcher.spec import Spec
from launcher.sweeps import Ledger, Outcome, Trial
from trainers.judge import Unstored

log = logging.getLogger(__name__)

Config = dict[str, Any]


class Sampler:
    """Proposes the settings of the n-th trial from what was taught before; the same history gives the same proposal."""

    def __init__(self, sweep: Sweep, objectives: dict[str, str], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # That several samplers of Optuna call a feature of theirs experimental is no news to a user.
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        space = sweep.space or {}
        self.space = {key: space[key] for key in ordered(space)}
        self._sweep, self._objectives, self._seed = sweep, objectives, seed
        directions = [optuna.study.StudyDirection.MAXIMIZE if mode == "max" else optuna.study.StudyDirection.MINIMIZE
                      for mode in objectives.values()]  # fmt: skip
        self._directions = directions
        self._taught: dict[tuple[str, int], FrozenTrial] = {}
        self._asked: dict[int, FrozenTrial] = {}
        self._grid = list(grid(space)) if sweep.search == "grid" else []

    def propose(self, number: int) -> dict[str, Any] | None:
        """Settings for trial `number`, counted from 1 without those of the user; None when all are tried."""
        if self._sweep.search == "grid":
            return self._grid[number - 1] if number <= len(self._grid) else None
        study = self.study()
        study.sampler = self._sampler(self._seed * 1_000_003 + number)
        trial = study.ask()
        settings: dict[str, Any] = {}
        for key, domain in self.space.items():
            if domain.applies(settings):
                settings[key] = _value(domain, _draw(trial, key, domain))
        self._asked[number] = create_trial(
            state=TrialState.RUNNING, params=trial.params, distributions=trial.distributions
        )
        return settings

    def study(self) -> optuna.Study:
        """All that is known: trials that ended or wait, and those that were proposed and run.

        Optuna takes an end for final, but a trial that waits may go on; so its study is made anew each time.
        """
        study = optuna.create_study(directions=self._directions)
        for frozen in (*(self._taught[key] for key in sorted(self._taught)), *self._asked.values()):
            study.add_trial(frozen)
        return study

    def teach(self, trial: Trial, proposal: int | None = None, sweep: str = "") -> None:
        """Takes into account how far a trial has come that ended or waits, in place of what was known of it.

        `proposal` is the number it was proposed with in this process; `sweep` names the past sweep that it is of.
        """
        if proposal is not None:
            self._asked.pop(proposal, None)
        frozen = self._frozen(trial, *self._result(trial))
        if frozen is not None:
            self._taught[sweep, trial.number] = frozen

    def importance(self, trials: Iterable[Trial]) -> dict[str, float]:
        """Each field's share of the differences in the first objective, the largest first (fANOVA, Hutter et al. 2014).

        Trials that were stopped count with what they had reached. Fields that only some trials have are left out.
        """
        study = optuna.create_study(direction=self._directions[0])
        for trial in trials:
            values = trial.values(self._objectives)
            frozen = self._frozen(trial, TrialState.COMPLETE, list(values.values())[:1], {}) if values else None
            if frozen is not None:
                study.add_trial(frozen)
        known = study.trials
        fields = [key for key in self.space if all(key in trial.params for trial in known)
                  and len({trial.params[key] for trial in known}) > 1]  # fmt: skip
        if len(known) < 4 or not fields or len({trial.value for trial in known}) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self._seed)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=fields)
        return {key: round(float(share), 4) for key, share in found.items()}

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        seed %= 2**32
        if self._sweep.search == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        # Conditional fields are modelled together with what they depend on (group); trials that run are taken for bad
        # ones (constant_liar), so that those at once differ.
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True,
            n_startup_trials=min(10, max(4, self._sweep.trials // 4)),
        )  # fmt: skip

    def _result(self, trial: Trial) -> tuple[TrialState, list[float] | None, dict[int, float]]:
        """What Optuna is told: state, values, and the first objective after each epoch."""
        values = trial.values(self._objectives)
        if trial.outcome is Outcome.FAILED or values is None:
            return TrialState.FAIL, None, {}
        if len(self._objectives) > 1:
            return TrialState.COMPLETE, list(values.values()), {}
        metric = next(iter(self._objectives))
        steps = {epoch["epoch"]: float(epoch[metric]) for epoch in trial.epochs
                 if math.isfinite(epoch.get(metric, math.nan))}  # fmt: skip
        if trial.outcome in (Outcome.STOPPED, Outcome.PAUSED):
            # TPE ranks what was stopped early below what was not, by how far it came (as BOHB's models do).
            return TrialState.PRUNED, None, steps
        return TrialState.COMPLETE, list(values.values()), steps

    def _frozen(
        self, trial: Trial, state: TrialState, values: list[float] | None, steps: dict[int, float]
    ) -> FrozenTrial | None:
        """A trial that Optuna did not propose here; None if it lies outside the space."""
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for key, domain in self.space.items():
            if key in trial.settings and domain.applies(trial.settings):
                distributions[key] = _distribution(domain)
                if domain.finite:
                    if trial.settings[key] not in domain.values:
                        return None
                    params[key] = domain.values.index(trial.settings[key])
                else:
                    params[key] = trial.settings[key]
        try:
            return create_trial(state=state, values=values, params=params, distributions=distributions,
                                intermediate_values=steps)  # fmt: skip
        except ValueError as error:
            log.info("the search learns nothing from trial %d: %s", trial.number, error)
            return None


def _distribution(domain: Domain) -> BaseDistribution:
    if domain.finite:
        # Optuna knows no lists; the place of a value stands for it.
        return CategoricalDistribution(tuple(range(len(domain.values))))
    least, most = domain.values[:2]
    if domain.kind == "randint":
        return IntDistribution(least, most)
    return FloatDistribution(least, most, log=domain.kind == "loguniform",
                             step=domain.values[2] if domain.kind == "quniform" else None)  # fmt: skip


def _draw(trial: optuna.Trial, key: str, domain: Domain) -> Any:
    found = _distribution(domain)
    if isinstance(found, CategoricalDistribution):
        return trial.suggest_categorical(key, found.choices)
    if isinstance(found, IntDistribution):
        return trial.suggest_int(key, found.low, found.high)
    assert isinstance(found, FloatDistribution)
    return trial.suggest_float(key, found.low, found.high, log=found.log, step=found.step)


def _value(domain: Domain, drawn: Any) -> Any:
    if domain.finite:
        return domain.values[drawn]
    if domain.kind == "quniform":
        whole = float(domain.values[0]).is_integer() and float(domain.values[2]).is_integer()
        return int(drawn) if whole else drawn
    return drawn


class Proposals(Unstored, Searcher):  # type: ignore[misc]
    """Tune's view of the search: interrupted trials first, then defaults and points, then the sampler's proposals.

    `begin(trial)` is called before a trial exists for Tune: what it records survives this process. While `ready` says
    no, none begins.
    """

    def __init__(
        self, spec: Spec, ledger: Ledger, sampler: Sampler, config: Config, begin: Callable[[Trial], None]
    ) -> None:
        metric, mode = (spec.sweep or Sweep()).objective
        super().__init__(metric=metric, mode=mode)
        self._spec, self._sweep = spec, spec.sweep or Sweep()
        self._ledger, self._sampler, self._config, self._begin = ledger, sampler, config, begin
        self._again = [trial for trial in ledger.trials if not trial.outcome.final]
        self.trials: dict[str, Trial] = {}
        self._proposed: dict[int, int] = {}
        self._exhausted = False
        self.ready: Callable[[], bool] = lambda: True

    def left(self) -> int:
        """How many trials will still be proposed that nobody has seen."""
        return 0 if self._exhausted else max(0, self._sweep.trials - len(self._ledger.trials))

    def suggest(self, trial_id: str) -> Config | str | None:
        if not self.ready():
            return None
        if self._again:
            trial = self._again.pop(0)
        else:
            number = len(self._ledger.trials) + 1
            settings, origin = self._settings(number) if number <= self._sweep.trials else (None, "")
            if settings is None:
                self._exhausted = True
                return str(Searcher.FINISHED)
            trial = Trial(number, settings, origin)
            self._ledger.trials.append(trial)
        self.trials[trial_id] = trial
        self._begin(trial)
        return {**self._config, "number": trial.number, "settings": trial.settings}

    def _settings(self, number: int) -> tuple[dict[str, Any] | None, str]:
        """Grid searches have no trials of the user's; in others these come first."""
        mine = [] if self._sweep.search == "grid" else list(first_settings(self._spec))
        if number <= len(mine):
            return mine[number - 1]
        self._proposed[number] = number - len(mine)
        return self._sampler.propose(number - len(mine)), self._sweep.search

    def proposal_of(self, trial: Trial) -> int | None:
        """The number under which the sampler proposed a trial in this process, if it did."""
        return self._proposed.get(trial.number)

    def on_trial_complete(self, trial_id: str, result: Config | None = None, error: bool = False) -> None:
        """The ledger is told by another way, and teaches the sampler."""

    def on_trial_result(self, trial_id: str, result: Config) -> None:
        """See `on_trial_complete`."""

    def get_state(self) -> dict[str, Any]:
        """The ledger has everything."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """See `get_state`."""

    def restore(self, checkpoint_path: str) -> None:
        """See `get_state`."""


def first_settings(spec: Spec) -> Iterator[tuple[dict[str, Any], str]]:
    """The settings a plain run would have, in the fields that are searched; then the points of the spec."""
    sweep, flat = spec.sweep or Sweep(), spec.flat()
    space = sweep.space or {}

    def complete(point: dict[str, Any]) -> dict[str, Any]:
        return own(space, {**flat, **point}) | {key: value for key, value in point.items() if key not in space}

    yield complete({}), "default"
    for point in sweep.points:
        yield complete(point), "point"
