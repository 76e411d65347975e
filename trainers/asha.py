"""ASHA as published (Li et al. 2020, Algorithm 2), for Ray Tune, whose own only ever stops trials.

A trial that comes to a rung goes on if it is among the best there so far. If not, it pauses, and goes on from its
checkpoint as soon as it is; what waits in the highest rung goes first, and new trials begin when nobody may go on. It
keeps nothing but what the ledger has: the figures of trials at the rungs.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from launcher.space import Sweep
from launcher.sweeps import Ledger, Trial


class Rung:
    """The trials that came to an epoch, the best first; of equals that with the lower number."""

    def __init__(self) -> None:
        self._order: list[tuple[float, int]] = []
        self.came: set[int] = set()

    def add(self, number: int, loss: float) -> None:
        """What is told again counts once."""
        if number not in self.came:
            self.came.add(number)
            bisect.insort(self._order, (loss, number))

    def ranked(self) -> list[int]:
        """The numbers of the trials."""
        return [number for _, number in self._order]


class Asha(FIFOScheduler):  # type: ignore[misc]
    """See the module. `epochs` is how many a trial may have, `trials` those that Tune knows by its id, and `left` says
    how many will still be proposed."""

    def __init__(
        self, sweep: Sweep, epochs: int, ledger: Ledger, trials: dict[str, Trial], left: Callable[[], int]
    ) -> None:
        super().__init__()
        self._sweep, self._ledger, self._trials, self._left = sweep, ledger, trials, left
        self._goal, self._mode = sweep.objective
        self._rungs = {epoch: Rung() for epoch in sweep.rungs(epochs)}
        self._tuned: dict[int, TuneTrial] = {}
        self._waiting: dict[int, int] = {}
        """The epochs at which trials wait, by number."""
        for trial in ledger.trials:
            for epoch in trial.epochs:
                self._came(trial.number, epoch)

    def _came(self, number: int, epoch: dict[str, Any]) -> None:
        value = epoch.get(self._goal, math.nan)
        if epoch["epoch"] in self._rungs and math.isfinite(value):
            self._rungs[epoch["epoch"]].add(number, -value if self._mode == "max" else value)

    # -- what the rungs say

    def _coming(self, epoch: int) -> int:
        """How many trials may still come to a rung."""
        came = self._rungs[epoch].came
        begun = sum(
            not trial.outcome.final and trial.number not in came and _last(trial) < epoch
            for trial in self._ledger.trials
        )
        return begun + self._left()

    def _best(self, epoch: int) -> list[int]:
        """The trials that go on from a rung: one in `reduction`, and in the end one at least."""
        ranked = self._rungs[epoch].ranked()
        return ranked[: len(ranked) // self._sweep.reduction or int(self._coming(epoch) == 0)]

    def _hopeless(self, epoch: int) -> list[int]:
        """The trials that would not go on from a rung even if all that may still come were worse."""
        ranked = self._rungs[epoch].ranked()
        most = (len(ranked) + self._coming(epoch)) // self._sweep.reduction
        return ranked[max(most, 1) :]

    def _promoted(self) -> TuneTrial | None:
        """The next trial that goes on, of the highest rung that has one."""
        if self._waiting:
            for epoch in reversed(self._rungs):
                for number in self._best(epoch):
                    if self._waiting.get(number) == epoch and self._tuned[number].status == TuneTrial.PAUSED:
                        return self._tuned[number]
        return None

    def _room(self) -> bool:
        """Whether another trial may run; one that is about to pause leaves its place."""
        live = (TuneTrial.PENDING, TuneTrial.RUNNING)
        busy = sum(tuned.status in live and number not in self._waiting for number, tuned in self._tuned.items())
        return busy < (self._sweep.concurrent or 1)

    def ready(self) -> bool:
        """Whether a new trial may begin."""
        return self._room() and self._promoted() is None

    # -- what Tune asks

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:  # noqa: ARG002 - Tune's signature
        """A new trial, or one that was lost and begins again."""
        number = self._trials[trial.trial_id].number
        self._tuned[number] = trial
        self._waiting.pop(number, None)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:  # noqa: ARG002
        """Also of epochs that were told before: a trial that was lost at a rung is judged there again."""
        mine, epoch = self._trials[trial.trial_id], result["epoch"]
        self._came(mine.number, result)
        goes_on = epoch not in self._rungs or _last(mine) > epoch or mine.origin == "default"
        if goes_on or mine.number in self._best(epoch):
            return str(TrialScheduler.CONTINUE)
        self._waiting[mine.number] = epoch
        return str(TrialScheduler.PAUSE)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """The next trial that goes on from its rung. Those that never will are stopped, so that the sweep ends."""
        for epoch in self._rungs if self._waiting else ():
            for number in self._hopeless(epoch):
                if self._waiting.get(number) == epoch and self._tuned[number].status == TuneTrial.PAUSED:
                    tune_controller.stop_trial(self._tuned[number])
        chosen = self._promoted() if self._room() else None
        if chosen is not None:
            del self._waiting[self._trials[chosen.trial_id].number]
        return chosen

    def waits_at(self, trial: TuneTrial) -> int | None:
        """The epoch at which a trial waits."""
        return self._waiting.get(self._trials[trial.trial_id].number)

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:  # noqa: ARG002 - Tune's signature
        """It is stopped where it waited."""
        self._waiting.pop(self._trials[trial.trial_id].number, None)


def _last(trial: Trial) -> int:
    return int(trial.epochs[-1]["epoch"]) if trial.epochs else 0
