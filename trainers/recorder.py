"""Between Ray Tune and the ledger: what trials tell is written down, and what the run directory asks for is done.

Tune calls it in the driver's process. The ledger is written before a trial begins and after every end, so that a
driver that is killed at any moment leaves nothing out.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial as TuneTrial

from launcher.errors import InfrastructureError, LaunchError, from_record
from launcher.journal import Journal
from launcher.runs import STRIKES, Run
from launcher.space import Sweep
from launcher.spec import Spec
from launcher.sweeps import METRICS, Ledger, Outcome, Trial
from trainers.judge import Judge, Unstored, settings_in, told_before
from trainers.search import Proposals, Sampler

log = logging.getLogger(__name__)

TIME_IS_UP = "the time was up"
HOPELESS = 3
"""If the first so many trials all fail, and none has come to the end of an epoch, the sweep is given up."""
SAVE_SECONDS = 2.0
"""How often epochs are written to the ledger; begins and ends always are."""


class Recorder(Unstored, Callback):  # type: ignore[misc]
    """Keeps the ledger. `fatal` is the error that would meet every trial, once there is one."""

    def __init__(
        self, run: Run, spec: Spec, ledger: Ledger, sampler: Sampler, journal: Journal, save: Callable[[], None],
        deadline: float | None,
    ) -> None:  # fmt: skip
        self.run, self.spec, self.ledger, self.sampler, self.journal = run, spec, ledger, sampler, journal
        self.fatal: LaunchError | None = None
        self._save, self._deadline = save, deadline
        self._sweep = spec.sweep or Sweep()
        self._metric, self._mode = self._sweep.objective
        self._price = (run.plan().get("layout") or {}).get("price_per_hour")
        self._saved = self._looked = 0.0
        self._started: dict[int, tuple[float, float]] = {}
        self._with_checkpoints = {trial.number for trial in ledger.over()}
        self._proposals: Proposals | None = None
        self._judge: Judge | None = None
        self._asked = ""

    def judge(self, proposals: Proposals) -> Judge:
        """The scheduler for the trials that `proposals` begins."""
        self._proposals = proposals
        self._judge = Judge(self.spec, self.ledger, proposals.trials, proposals.left)
        proposals.ready = self._judge.ready
        return self._judge

    def stopper(self) -> Stopper:
        """Ends the experiment when the sweep is cancelled, its time is up, or no trial can succeed."""
        recorder = self

        class End(Unstored, Stopper):  # type: ignore[misc]
            def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002 - Tune's signature
                return False

            def stop_all(self) -> bool:
                return recorder.over()

        return End()

    def over(self) -> bool:
        """Whether no trial shall go on; those that run are then asked to save and stop."""
        if not self._asked:
            self._asked = self._why_over()
            if self._asked and self._asked != "cancelled":
                for trial in self.ledger.trials:
                    if trial.outcome is Outcome.RUNNING:
                        self.run.trial(trial.number).request_cancel()
        return bool(self._asked)

    def _why_over(self) -> str:
        now = time.time()
        if self.fatal is not None:
            return "failed"
        if self._deadline is not None and now >= self._deadline:
            return TIME_IS_UP
        if now - self._looked < (5.0 if self.run.uri.startswith("s3://") else 1.0):
            return ""
        self._looked = now
        try:
            return "cancelled" if self.run.cancel_requested() else ""
        except LaunchError:  # the storage may be away for a while; the trials need not care
            return ""

    # -- what Tune tells

    def proposed(self, trial: Trial) -> None:
        """A trial that Tune does not know yet."""
        mine = self.run.trial(trial.number)
        mine.clear_cancel()
        if trial.outcome is not Outcome.INTERRUPTED:
            trial.outcome = Outcome.WAITING
        self._write()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:  # noqa: ARG002
        """It has its resources."""
        mine = self._mine(trial)
        now = time.time()
        mine.outcome, mine.began, mine.reason = Outcome.RUNNING, mine.began or now, ""
        self._started[mine.number] = (now, mine.seconds)
        self.journal.write("trial", now=True, number=mine.number, settings=mine.settings, origin=mine.origin,
                           from_epoch=len(mine.epochs))  # fmt: skip
        self._write()

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any  # noqa: ARG002
    ) -> None:  # fmt: skip
        """An epoch, or how the trial failed."""
        mine = self._mine(trial)
        self._clock(mine)
        if "error" in result:
            mine.error = result["error"]
            if result["fatal"]:
                self.fatal = from_record(result["error"])
        if self._judge is not None and trial.trial_id in self._judge.paused:
            mine.outcome = Outcome.PAUSED
        if "epoch" not in result or told_before(mine, result):
            return
        settings = settings_in(result)
        record = {key: result[key] for key in ("epoch", "step", "lr", *METRICS) if key in result}
        if settings != mine.settings:
            # PBT: the state of a better trial was copied, and goes on with other settings.
            mine.epochs = [past for past in mine.epochs if past["epoch"] < result["epoch"]]
            record["settings"] = mine.settings = settings
        before = self._best_value()
        mine.epochs.append(record)
        # Only losses in a row, without an epoch between them, are a reason to give a trial up: spot nodes come and go.
        trial.run_metadata.num_failures = 0
        value = record.get(self._metric)
        better = value is not None and (before is None or (value > before if self._mode == "max" else value < before))
        self.journal.write(
            "trial_epoch", number=mine.number, epoch=record["epoch"], epochs=self.spec.train.epochs,
            metric=self._metric, value=value, best=better,
        )  # fmt: skip
        if mine.outcome is Outcome.PAUSED and self._proposals is not None:
            # It may wait until the sweep ends, and others are proposed meanwhile.
            self.sampler.teach(mine, self._proposals.proposal_of(mine))
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self._write()

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:  # noqa: ARG002
        """It was lost, and is tried again."""
        mine = self._mine(trial)
        log.warning("trial %d was lost and is tried again: %s", mine.number, trial.get_error())
        self._clock(mine)
        mine.retries += 1
        mine.outcome, mine.reason = Outcome.WAITING, "its process was lost; it is tried again"
        self._write()

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:  # noqa: ARG002
        """It trains no more."""
        mine = self._mine(trial)
        # Tune would keep them to the end of the sweep, 50 kB a trial, and nobody reads them.
        trial.metric_analysis.clear()
        trial.metric_n_steps.clear()
        why = self._judge.why.get(trial.trial_id, "") if self._judge else ""
        if mine.error is not None:
            self._end(mine, Outcome.FAILED, "")
        elif (trial.last_result or {}).get("over") == "asked":
            pass  # `finish` knows why
        elif why:
            self._end(mine, Outcome.STOPPED, why)
        else:
            self._end(mine, Outcome.FINISHED, "")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:  # noqa: ARG002
        """It was lost too often."""
        mine = self._mine(trial)
        lost = InfrastructureError(
            f"it was lost {STRIKES} times in a row, without an epoch between", where=f"trial {mine.number}",
            hint=f"launch logs {self.run.name} --trial {mine.number}",
        )  # fmt: skip
        mine.error = mine.error or lost.to_record()
        self._end(mine, Outcome.FAILED, "")

    def finish(self) -> None:
        """Tune is over: trials that had not ended go on another time, or have had their time."""
        for trial in self.ledger.trials:
            if not trial.outcome.final:
                self._clock(trial)
                if self._asked == TIME_IS_UP and trial.epochs:
                    self._end(trial, Outcome.STOPPED, TIME_IS_UP)
                else:
                    trial.outcome = Outcome.INTERRUPTED
        self._write()
        self._prune({trial.number for trial in self.ledger.over()})

    # -- the ledger

    def _mine(self, trial: TuneTrial) -> Trial:
        assert self._proposals is not None, "Tune begins no trial that was not proposed"
        return self._proposals.trials[trial.trial_id]

    def _clock(self, trial: Trial) -> None:
        started = self._started.get(trial.number)
        if started is not None and trial.outcome is Outcome.RUNNING:
            trial.seconds = started[1] + time.time() - started[0]
            if self._price is not None:
                trial.cost = trial.seconds / 3600 * self._price / (self._sweep.concurrent or 1)

    def _end(self, trial: Trial, outcome: Outcome, reason: str) -> None:
        if trial.outcome.final:
            return
        self._clock(trial)
        trial.outcome, trial.reason, trial.ended = outcome, reason, time.time()
        best = trial.best(self._metric, self._mode)
        self.journal.write("trial_end", now=True, number=trial.number, outcome=outcome,
                           reason=trial.error["what"] if trial.error else reason,
                           value=best[self._metric] if best else None)  # fmt: skip
        self._write()
        assert self._proposals is not None, "a trial ends after it was proposed"
        self.sampler.teach(trial, self._proposals.proposal_of(trial))
        self._tidy(trial)
        failed = self.ledger.having(Outcome.FAILED)
        if len(failed) >= HOPELESS and not any(trial.epochs for trial in self.ledger.trials) and self.fatal is None:
            self.fatal = from_record(failed[0].error or {})

    def _tidy(self, trial: Trial) -> None:
        """Records the end in the trial's own directory, and drops what nobody will want of those before."""
        self.run.trial(trial.number).set_state(trial.state())
        # Its own last checkpoint may still be on its way.
        self._prune(self._with_checkpoints)
        self._with_checkpoints.add(trial.number)

    def _prune(self, numbers: set[int]) -> None:
        """Drops the checkpoints of these trials, but for those that may be the best or are on the Pareto front."""
        over = [trial for trial in self.ledger.ranked() if trial.outcome.final]
        wanted = {trial.number for trial in [*self.ledger.front(), *over[:1]]}
        for number in numbers - wanted:
            store = self.run.trial(number).store
            # The manifests go first: a checkpoint is whole or does not count.
            keys = (entry.key for entry in store.list("checkpoints/"))
            for key in sorted(keys, key=lambda key: not key.endswith("manifest.json")):
                store.delete(key)
        self._with_checkpoints -= numbers - wanted

    def _best_value(self) -> float | None:
        values = [epoch[self._metric] for trial in self.ledger.trials for epoch in trial.epochs
                  if math.isfinite(epoch.get(self._metric, math.nan))]  # fmt: skip
        return (max if self._mode == "max" else min)(values, default=None)

    def _write(self) -> None:
        self._saved = time.monotonic()
        self._save()
