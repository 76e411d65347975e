"""Which trials go on with ASHA, in simulated sweeps: any curves, any order of events, any number at once, kills."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler

from launcher.schedule import asha_survivors
from launcher.space import Sweep
from launcher.spec import Spec
from launcher.sweeps import Ledger, Outcome, Trial
from trainers.asha import Asha
from trainers.judge import Judge
from trainers.search import Proposals, Sampler

Curves = dict[int, list[float]]


@dataclass
class Tuned:
    """As much of Tune's trial as a scheduler sees."""

    trial_id: str
    status: str = TuneTrial.PENDING
    config: dict[str, Any] = field(default_factory=dict)


class Killed(Exception):
    """The driver is gone; the ledger is there."""


class Tune:
    """A sweep as Tune's controller runs it, one event after another in an order drawn by chance.

    `trained` counts how often each epoch of each trial was trained. With a chance of `losses` a trial's process is lost
    instead of ending an epoch.
    """

    def __init__(
        self, spec: Spec, curves: Curves, ledger: Ledger, chance: Random, trained: dict[Any, int], losses: float = 0.0
    ) -> None:
        assert spec.sweep is not None
        self.spec, self.sweep, self.curves, self.ledger, self.chance = spec, spec.sweep, curves, ledger, chance
        self.trained, self.losses = trained, losses
        self.tuned: list[Tuned] = []
        sampler = Sampler(self.sweep, ledger.objectives, 0)
        self.proposals = Proposals(spec, ledger, sampler, {}, lambda _: None)
        self.judge = Judge(spec, ledger, self.proposals.trials, self.proposals.left)
        self.proposals.ready = self.judge.ready
        self.told: dict[str, int] = {}
        self.most = 0

    def mine(self, tuned: Tuned) -> Trial:
        return self.proposals.trials[tuned.trial_id]

    def stop_trial(self, tuned: Tuned) -> None:
        assert tuned.status == TuneTrial.PAUSED, "only those that wait are stopped by the scheduler"
        self.judge.on_trial_remove(self, tuned)
        tuned.status = TuneTrial.TERMINATED
        self.mine(tuned).outcome, self.mine(tuned).reason = Outcome.STOPPED, self.judge.why[tuned.trial_id]

    def run(self, kill_after: int | None = None) -> None:
        """To the end, or until so many epochs have been told."""
        finished, steps, told = False, 0, 0
        while not (finished and all(one.status == TuneTrial.TERMINATED for one in self.tuned)):
            steps += 1
            assert steps < 100_000, "it goes on for ever"
            if not finished and (config := self.proposals.suggest(f"t{len(self.tuned)}")) is not None:
                if finished := config == Proposals.FINISHED:
                    continue
                self.tuned.append(Tuned(f"t{len(self.tuned)}"))
                self.judge.on_trial_add(self, self.tuned[-1])
            chosen = self.judge.choose_trial_to_run(self)
            if chosen is not None:
                assert chosen.status == TuneTrial.PAUSED
                chosen.status = TuneTrial.PENDING
            for one in self.tuned:
                if one.status == TuneTrial.PENDING:
                    one.status = TuneTrial.RUNNING
                    self.mine(one).outcome = Outcome.RUNNING
            running = [one for one in self.tuned if one.status == TuneTrial.RUNNING]
            self.most = max(self.most, len(running))
            if running and self.chance.random() < self.losses:
                self.lose(self.chance.choice(running))
            elif running:
                told += self.epoch(self.chance.choice(running))
            if kill_after is not None and told >= kill_after:
                raise Killed

    def lose(self, tuned: Tuned) -> None:
        """It begins again, and tells what it had told."""
        tuned.status, self.mine(tuned).outcome = TuneTrial.PENDING, Outcome.WAITING
        self.told[tuned.trial_id] = 0
        self.judge.on_trial_error(self, tuned)
        self.judge.on_trial_add(self, tuned)

    def epoch(self, tuned: Tuned) -> int:
        """A trial tells an epoch, which is new or not; how many new ones."""
        mine, total = self.mine(tuned), self.spec.train.epochs or 1
        number = self.told[tuned.trial_id] = self.told.get(tuned.trial_id, 0) + 1
        new = number > len(mine.epochs)
        self.trained[mine.number, number] = self.trained.get((mine.number, number), 0) + new
        result = {"epoch": number, "top1": self.curves[mine.number][number - 1], "settings": json.dumps(mine.settings)}
        # Tune asks nobody about a trial that is through.
        verdict = TrialScheduler.STOP if number == total else self.judge.on_trial_result(self, tuned, result)
        if new:
            mine.epochs.append({"epoch": number, "top1": result["top1"]})
        if verdict == TrialScheduler.PAUSE:
            tuned.status, mine.outcome = TuneTrial.PAUSED, Outcome.PAUSED
        elif verdict == TrialScheduler.STOP:
            tuned.status, mine.outcome = TuneTrial.TERMINATED, Outcome.FINISHED
        return int(new)


def spec_of(trials: int, epochs: int = 9, **sweep: Any) -> Spec:
    space = {"optim.lr": {"loguniform": [0.001, 1.0]}}
    usual = {"trials": trials, "space": space, "search": "random", "grace_epochs": max(epochs // 4, 1), **sweep}
    return Spec.model_validate_json(json.dumps(
        {"data": {"uri": "sample://digits"}, "optim": {"lr": 0.05}, "train": {"epochs": epochs}, "sweep": usual}
    ))  # fmt: skip


def swept(
    spec: Spec, curves: Curves, seed: int = 0, kills: tuple[int, ...] = (), losses: float = 0.0
) -> tuple[Ledger, dict[Any, int], list[int]]:
    """A sweep to its end, over drivers that are killed; its ledger, what was trained, the most trials at once."""
    ledger, trained, chance = Ledger({"top1": "max"}), dict[Any, int](), Random(seed)
    most = []
    for after in (*kills, None):
        for trial in ledger.trials:
            if not trial.outcome.final:
                trial.outcome = Outcome.INTERRUPTED
        tune = Tune(spec, curves, ledger, chance, trained, losses)
        try:
            tune.run(after)
        except Killed:
            pass
        else:
            most.append(tune.most)
            break
    return ledger, trained, most


def drawn(trials: int, epochs: int, seed: int) -> Curves:
    chance = Random(seed)
    return {number: [chance.choice([chance.random(), 0.5]) for _ in range(epochs)] for number in range(1, trials + 1)}


def monotone(trials: int, epochs: int, seed: int) -> Curves:
    """The better trial is better at every epoch."""
    order = list(range(trials))
    Random(seed).shuffle(order)
    return {number: [good + epoch / 100 for epoch in range(epochs)] for number, good in enumerate(order, 1)}


sizes = {"trials": st.integers(1, 5) | st.integers(1, 40), "epochs": st.integers(1, 30), "reduction": st.integers(2, 5),
         "at_once": st.integers(1, 6), "seed": st.integers(0, 10**6)}  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(**sizes, kills=st.lists(st.integers(1, 60), max_size=4), losses=st.sampled_from([0.0, 0.1]))
def test_a_sweep_ends_trains_nothing_twice_and_stops_whom_nothing_could_bring_further(
    trials: int, epochs: int, reduction: int, at_once: int, seed: int, kills: list[int], losses: float
) -> None:
    spec = spec_of(trials, epochs, reduction=reduction, concurrent=min(at_once, trials))
    ledger, trained, most = swept(spec, drawn(trials, epochs, seed), seed, tuple(kills), losses)
    assert [trial.number for trial in ledger.trials] == list(range(1, trials + 1))
    assert {trial.outcome for trial in ledger.trials} <= {Outcome.FINISHED, Outcome.STOPPED}
    assert set(trained.values()) <= {0, 1}, "an epoch is trained once, whatever is killed"
    assert sum(trained.values()) == ledger.epochs() <= trials * epochs
    assert max(most) <= at_once
    rungs = (spec.sweep or Sweep()).rungs(epochs)
    for trial in ledger.trials:
        assert [epoch["epoch"] for epoch in trial.epochs] == list(range(1, len(trial.epochs) + 1))
        assert len(trial.epochs) in (*rungs, epochs)
        assert (len(trial.epochs) == epochs) == (trial.outcome is Outcome.FINISHED)
        if trial.outcome is Outcome.STOPPED:
            assert trial.reason == f"not among the best 1 in {reduction} at epoch {len(trial.epochs)}"
            assert trial.origin != "default"
    for epoch in rungs:
        came = sorted((-trial.epochs[epoch - 1]["top1"], trial.number) for trial in ledger.trials
                      if len(trial.epochs) >= epoch)  # fmt: skip
        went = {trial.number for trial in ledger.trials if len(trial.epochs) > epoch}
        assert {number for _, number in came[: max(len(came) // reduction, 1)]} <= went


@settings(deadline=None, max_examples=40)
@given(**sizes, kills=st.lists(st.integers(1, 60), max_size=3))
def test_the_best_of_trials_that_never_cross_is_trained_to_the_end(
    trials: int, epochs: int, reduction: int, at_once: int, seed: int, kills: list[int]
) -> None:
    spec = spec_of(trials, epochs, reduction=reduction, concurrent=min(at_once, trials))
    curves = monotone(trials, epochs, seed)
    ledger, _, _ = swept(spec, curves, seed, tuple(kills))
    assert len(ledger.ranked()[0].epochs) == epochs
    assert ledger.ranked()[0].epochs[-1]["top1"] == max(values[-1] for values in curves.values())


@settings(deadline=None, max_examples=25)
@given(trials=st.integers(2, 24), seed=st.integers(0, 10**6), kill=st.integers(1, 120))
def test_one_at_a_time_a_killed_sweep_comes_to_what_an_undisturbed_one_does(trials: int, seed: int, kill: int) -> None:
    spec, curves = spec_of(trials, 12, concurrent=1), drawn(trials, 12, seed)
    whole, _, _ = swept(spec, curves, seed)
    broken, _, _ = swept(spec, curves, seed, (kill,))
    assert [trial.epochs for trial in broken.trials] == [trial.epochs for trial in whole.trials]


@settings(deadline=None, max_examples=20)
@given(first=st.integers(1, 16), more=st.integers(1, 16), seed=st.integers(0, 10**6))
def test_an_extended_sweep_leaves_what_had_ended_as_it_was(first: int, more: int, seed: int) -> None:
    curves = drawn(first + more, 9, seed)
    ledger, trained, _ = swept(spec_of(first, concurrent=1), curves, seed)
    before = json.dumps([vars(trial) for trial in ledger.trials])
    Tune(spec_of(first + more, concurrent=2), curves, ledger, Random(seed), trained).run()
    assert json.dumps([vars(trial) for trial in ledger.trials[:first]]) == before
    assert all(trial.outcome.final for trial in ledger.trials)
    assert len(ledger.trials) == first + more


def test_a_trial_that_started_slowly_goes_on_once_enough_worse_ones_have_come() -> None:
    curves = {number: [0.9, *[0.5] * 8] if number <= 3 else [0.1] * 9 for number in range(1, 13)}
    curves[2] = [0.5, *[0.99] * 8]
    ledger, _, _ = swept(spec_of(12, grace_epochs=1, concurrent=1), curves)
    assert ledger.ranked()[0].number == 2, "a scheduler that only stops would have lost it at epoch 1"
    assert ledger.epochs() < 0.6 * 12 * 9


def test_whoever_waits_in_the_highest_rung_goes_first_and_new_trials_begin_when_nobody_may_go_on() -> None:
    ledger, known = Ledger({"top1": "max"}), dict[str, Trial]()
    asha = Asha(Sweep(trials=9, reduction=3, grace_epochs=1, concurrent=1), 9, ledger, known, lambda: 1)

    def come(number: int, epoch: int, value: float) -> str:
        tuned = Tuned(f"t{number}", TuneTrial.RUNNING)
        known[tuned.trial_id] = Trial(number, {}, "random", epochs=[{"epoch": past} for past in range(1, epoch)])
        asha.on_trial_add(None, tuned)
        verdict = asha.on_trial_result(None, tuned, {"epoch": epoch, "top1": value})
        tuned.status = TuneTrial.PAUSED if verdict == TrialScheduler.PAUSE else TuneTrial.TERMINATED
        return verdict

    assert [come(number, 3, 0.9 - number / 10) for number in (1, 2)] == [TrialScheduler.PAUSE] * 2
    assert [come(number, 1, 0.9 - number / 10) for number in (3, 4)] == [TrialScheduler.PAUSE] * 2
    assert asha.ready(), "of two nobody is among the best third"
    come(5, 1, 0.0)
    come(6, 3, 0.0)
    assert not asha.ready()
    for number in (1, 3):
        chosen = asha.choose_trial_to_run(_Stops())
        assert chosen is not None
        assert known[chosen.trial_id].number == number
        chosen.status = TuneTrial.RUNNING
        assert asha.choose_trial_to_run(_Stops()) is None, "there is one place"
        chosen.status = TuneTrial.TERMINATED
    assert asha.ready()


def test_a_grid_that_has_fewer_trials_than_were_asked_for_comes_to_an_end() -> None:
    spec = spec_of(20, search="grid", space={"optim.lr": {"grid": [0.1, 0.2, 0.3, 0.4]}}, concurrent=2)
    ledger, _, _ = swept(spec, monotone(20, 9, 0))
    assert [trial.outcome for trial in ledger.trials].count(Outcome.FINISHED) == 1
    assert len(ledger.trials) == 4


def test_a_figure_that_is_no_number_pauses_nobody_and_keeps_no_place() -> None:
    curves = monotone(6, 9, 1)
    curves[3] = [math.nan] * 9
    ledger, _, _ = swept(spec_of(6, concurrent=2), curves)
    assert all(trial.outcome.final for trial in ledger.trials)
    assert ledger.ranked()[0].epochs[-1]["top1"] == max(values[-1] for values in curves.values() if values[0] >= 0)


@pytest.mark.parametrize("reduction", [2, 3, 4])
@pytest.mark.parametrize("trials", [1, 2, 5, 16, 64])
def test_as_many_trials_are_expected_to_survive_as_do(trials: int, reduction: int) -> None:
    sweep = Sweep(trials=trials, reduction=reduction, grace_epochs=1)
    counts = []
    for seed in range(60):
        chance = Random(seed)
        ledger, known, went = Ledger({"top1": "max"}), dict[str, Trial](), set[int]()
        asha = Asha(sweep, 2, ledger, known, functools.partial(_left, ledger, trials))
        for number in range(1, trials + 1):
            tuned = Tuned(f"t{number}")
            known[tuned.trial_id] = Trial(number, {}, "random", Outcome.RUNNING)
            ledger.trials.append(known[tuned.trial_id])
            asha.on_trial_add(None, tuned)
            if asha.on_trial_result(None, tuned, {"epoch": 1, "top1": chance.random()}) == TrialScheduler.CONTINUE:
                went.add(number)
            else:
                tuned.status = TuneTrial.PAUSED
            ledger.trials[-1].epochs.append({"epoch": 1})
            while (chosen := asha.choose_trial_to_run(_Stops())) is not None:
                chosen.status = TuneTrial.TERMINATED
                went.add(known[chosen.trial_id].number)
            tuned.status = tuned.status if tuned.status == TuneTrial.PAUSED else TuneTrial.TERMINATED
        counts.append(len(went))
    assert asha_survivors(trials, reduction) == pytest.approx(sum(counts) / len(counts), abs=0.6)


def _left(ledger: Ledger, trials: int) -> int:
    return trials - len(ledger.trials)


class _Stops:
    """Lets trials be stopped."""

    def stop_trial(self, tuned: Tuned) -> None:
        tuned.status = TuneTrial.TERMINATED
