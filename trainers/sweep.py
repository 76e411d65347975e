"""A sweep from start to end, in its driver: Ray Tune searches, the ledger records, and the best trial is exported.

All that a sweep knows is in its ledger and its trials' run directories. A driver that takes over from a killed one
starts Tune anew: trials that ended are not run again, those that had begun go on from their checkpoints.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

from launcher.errors import InfrastructureError, from_record
from launcher.journal import Journal
from launcher.runs import STRIKES, Run, State, Status
from launcher.space import Sweep
from launcher.spec import Spec
from launcher.storage import cache_folder
from launcher.sweeps import Ledger, Outcome, Trial
from trainers import session
from trainers.recorder import TIME_IS_UP, Recorder
from trainers.refit import refit
from trainers.search import Proposals, Sampler

log = logging.getLogger(__name__)

RESERVE = 0.1
RESERVE_HOURS = 0.5
"""Share of a cluster's time cap that is kept for evaluating and exporting the best trial, and its most."""


class Search:
    """One attempt of a sweep."""

    def __init__(self, run: Run, spec: Spec, attempt: int, began: float, events: Journal) -> None:
        self.run, self.spec, self.attempt, self.began, self.events = run, spec, attempt, began, events
        self.sweep = spec.sweep or Sweep()
        self.ledger = Ledger.load(run)
        self.spent = run.hours()
        self.fence = functools.partial(run.check_attempt, attempt)
        self.sampler = Sampler(self.sweep, self.ledger.objectives, spec.train.seed)

    def run_to_end(self) -> str:
        """Searches what is left to search, then exports the best; `finished` or `cancelled`.

        Raises the first trial's error if no trial has a result.
        """
        self._recover()
        journal = Journal(self.run.store, "progress.jsonl", every=1.0)
        try:
            self._search(journal)
            if self.run.cancel_requested():
                return "cancelled"
            best = self._best()
            journal.write("finishing", now=True, number=best.number)
            self._export(best)
            if self.sweep.refit:
                journal.write("refit", now=True)
                self._refit(best)
            if self.run.cancel_requested():
                return "cancelled"
        finally:
            journal.close()
        return "finished"

    # -- searching

    def _recover(self) -> None:
        """What the ledger says of trials that nobody trains any more."""
        for trial in self.ledger.trials:
            if not trial.outcome.final:
                trial.outcome = Outcome.INTERRUPTED
            elif trial.outcome is Outcome.STOPPED and trial.reason == TIME_IS_UP and self._hours_left() > 0:
                trial.outcome, trial.reason, trial.ended = Outcome.INTERRUPTED, "", None
            if trial.outcome.final:
                self.sampler.teach(trial)
        if self.sweep.warm_from:
            for trial in Ledger.load(Run.at(self.sweep.warm_from)).trials:
                if trial.outcome.final:
                    self.sampler.teach(trial, sweep=self.sweep.warm_from)

    def _search(self, journal: Journal) -> None:
        left = self.sweep.trials - len(self.ledger.over())
        concurrent = min(self.sweep.concurrent or 1, max(left, 1))
        journal.write("sweep", now=True, trials=self.sweep.trials, concurrent=concurrent,
                      epochs=self.spec.train.epochs, done=self.sweep.trials - left)  # fmt: skip
        nothing = left <= 0 or self._hours_left() <= 0
        if not nothing or (self.spec.resources.workers or 1) > 1 or os.environ.get("RAY_ADDRESS"):
            session.start(self.spec)
        if nothing:
            return
        self.run.update(status=Status.RUNNING, reason="", started=self.run.state().started or time.time())
        recorder = Recorder(self.run, self.spec, self.ledger, self.sampler, journal, self._save, self._deadline())
        config = {"sweep": self.run.uri, "attempt": self.attempt}
        proposals = Proposals(self.spec, self.ledger, self.sampler, config, recorder.proposed)
        folder = self._scratch()
        try:
            tune_trials(self.spec, proposals, recorder, left, concurrent, folder)
        finally:
            recorder.finish()
            shutil.rmtree(folder, ignore_errors=True)
            for entry in list(self.run.store.list("tune/")):
                self.run.store.delete(entry.key)
        if recorder.fatal is not None:
            raise recorder.fatal

    def _deadline(self) -> float | None:
        """Unix time at which no trial goes on."""
        hours = self._hours_left()
        return None if hours == float("inf") else time.time() + 3600 * hours

    def _hours_left(self) -> float:
        limits = [float("inf")]
        if self.sweep.time_limit is not None:
            limits.append(self.sweep.time_limit - self.spent - (time.time() - self.began) / 3600)
        layout = self.run.plan().get("layout")
        if layout:
            # The cluster ends the attempt at its cap, whatever it is doing then.
            gone = (time.time() - self._clock_began(layout["max_hours"])) / 3600
            limits.append(layout["max_hours"] - min(layout["max_hours"] * RESERVE, RESERVE_HOURS) - gone)
        return min(limits)

    def _clock_began(self, cap: float) -> float:
        """When the clock of the cluster's cap began, in hours, or somewhat before.

        It runs while nodes are waited for and while a lost head is replaced, but not in a queue; the run directory says
        when the run was submitted, which was before the queue, and when its cluster was up.
        """
        up = float((self.run.read_json("submission.json") or {}).get("began") or self.began)
        waited = min((self.spec.limits.start_minutes or 0) / 60, cap / 2)
        return min(self.began, up, max(self.run.state().submitted, up - 3600 * waited))

    def _scratch(self) -> str:
        """Where Tune keeps its files, also those of trials that pause or are copied: where all nodes reach it."""
        if os.environ.get("RAY_ADDRESS") and self.sweep.scheduler in ("asha", "hyperband", "pbt"):
            return f"{self.run.uri}/tune"
        (cache_folder() / "ray").mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="tune-", dir=cache_folder() / "ray")

    def _save(self) -> None:
        self.fence()
        self.ledger.save(self.run)

    # -- the best

    def _best(self) -> Trial:
        ranked = self.ledger.ranked()
        if not ranked:
            errors = [trial.error for trial in self.ledger.trials if trial.error]
            raise from_record(errors[0]) if errors else InfrastructureError(
                "no trial came to the end of an epoch", where="sweep.time_limit",
                hint=f"launch resume {self.run.name} with a higher --time-limit")  # fmt: skip
        self.ledger.best = ranked[0].number
        self.ledger.importance = _guarded(lambda: self.sampler.importance(self.ledger.trials))
        self._save()
        return ranked[0]

    def _export(self, best: Trial) -> None:
        """Evaluates the best trial, and makes its model, its figures and its report those of the sweep."""
        from trainers import report
        from trainers.fit import fit

        mine = self.run.trial(best.number)
        if mine.metrics().get("final") is None:
            again(lambda: fit(mine, mine.spec(), self.attempt, self.began, part="export"))
        metrics = mine.metrics()
        mine.write_json("plan.json", _plan_of(self.run.plan(), best))
        state = State(Status.SUCCEEDED, created=best.began or 0.0, started=best.began, ended=time.time(),
                      attempt=self.attempt, result=mine.figures())  # fmt: skip
        report.write(mine, state)
        mine.set_state(state)
        self._take_model(mine)
        self.run.store.write("predictions.parquet", mine.store.read("predictions.parquet"))
        document = {**metrics, "final": {**metrics["final"], "trial": best.number, "trials": len(self.ledger.trials)}}
        self.run.write_json("metrics.json", document)

    def _refit(self, best: Trial) -> None:
        """The best settings on all images; the model is that of the sweep then, the figures stay the best trial's."""
        mine = self.run.trial(best.number)
        plan = mine.read_json("plan.json") or {}
        found = again(lambda: refit(self.run, mine.spec(), plan, self.attempt, self.began))
        if found:
            self.ledger.refit = found
            self._take_model(Run(self.run.uri, "refit"))
            self._save()

    def _take_model(self, mine: Run) -> None:
        for entry in list(mine.store.list("model/")):
            self.run.store.write(entry.key, mine.store.read(entry.key))


def tune_trials(
    spec: Spec, proposals: Proposals, recorder: Recorder, trials: int, concurrent: int, folder: str
) -> None:
    """Runs so many trials through Ray Tune, `concurrent` at once; `folder` is for Tune's own files."""
    from ray import tune

    from trainers.trial import TrialActor, resources

    sweep = spec.sweep or Sweep()
    if sweep.scheduler == "asha":
        # Else the first trials would begin one after another.
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(concurrent)
    tuner = tune.Tuner(
        tune.with_resources(TrialActor, resources(spec)),
        tune_config=tune.TuneConfig(
            search_alg=proposals,
            scheduler=recorder.judge(proposals),
            num_samples=trials,
            # Tune would count the trials that are paused. HyperBand's are kept within the pool by what they book.
            max_concurrent_trials=None if sweep.scheduler in ("asha", "hyperband") else concurrent,
            # An actor that is kept is not told of its trial's stop, and one of several workers would train on.
            reuse_actors=(spec.resources.workers or 1) == 1,
            trial_name_creator=lambda trial: str(trial.trial_id),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            callbacks=[recorder],
            stop=recorder.stopper(),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=STRIKES - 1),
            # Trials write their own checkpoints; Tune's are only for what a scheduler pauses or copies.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, num_to_keep=4),
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    tuner.fit()


def again(work: Callable[[], Any]) -> Any:
    """Does something once more after each of a few losses in a row."""
    for strike in range(1, STRIKES + 1):
        try:
            return work()
        except InfrastructureError:
            if strike == STRIKES:
                raise
            time.sleep(strike)
    raise AssertionError("unreachable")


def _guarded(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    try:
        return measure()
    except Exception:  # a sweep does not fail for a figure on its page
        log.exception("the importance of the fields is not known")
        return {}


def _plan_of(plan: dict[str, Any], trial: Trial) -> dict[str, Any]:
    """The sweep's plan with the trial's settings in it."""
    choices = []
    for choice in plan.get("choices", []):
        if choice["key"] in trial.settings:
            choice = {**choice, "value": trial.settings[choice["key"]], "source": "trial", "why": trial.origin}
        if not choice["key"].startswith("sweep."):
            choices.append(choice)
    return {**plan, "choices": choices}
