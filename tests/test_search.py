"""What proposes settings and what stops trials: the same history gives the same answer, also after a restart."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import TrialScheduler

from launcher.space import Sweep, grid
from launcher.spec import Spec
from launcher.sweeps import Ledger, Outcome, Trial
from tests.sweeping import SPACE
from trainers.judge import Judge
from trainers.search import Proposals, Sampler, first_settings

MAX = {"top1": "max"}


def spec_of(**sweep: Any) -> Spec:
    document = {
        "data": {"uri": "sample://digits"}, "optim": {"lr": 0.05}, "train": {"epochs": 9},
        "sweep": {"space": SPACE, "grace_epochs": 1, **sweep},
    }  # fmt: skip
    return Spec.model_validate_json(json.dumps(document))


def sampler(spec: Spec, objectives: dict[str, str] | None = None) -> Sampler:
    assert spec.sweep is not None
    return Sampler(spec.sweep, objectives or MAX, spec.train.seed)


def epochs(*values: float) -> list[dict[str, Any]]:
    return [{"epoch": number, "top1": value, "loss": 1 - value} for number, value in enumerate(values, 1)]


def ended(number: int, found: dict[str, Any], *values: float, outcome: Outcome = Outcome.FINISHED) -> Trial:
    return Trial(number, found, "optuna", outcome, epochs=epochs(*values))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), search=st.sampled_from(["optuna", "random"]))
def test_every_proposal_is_a_valid_spec_and_has_only_the_fields_that_apply(seed: int, search: str) -> None:
    spec = spec_of(search=search).updated({"train.seed": seed})
    source = sampler(spec)
    for number in range(1, 6):
        found = source.propose(number)
        assert found is not None
        assert ("augment.magnitude" in found) == (found["augment.policy"] == "randaugment")
        assert 0.003 <= found["optim.lr"] <= 0.3
        spec.updated(found)


@pytest.mark.parametrize("search", ["optuna", "random"])
def test_the_same_history_gives_the_same_proposal_in_another_process(search: str) -> None:
    spec = spec_of(search=search, trials=8)
    first, history = sampler(spec), []
    for number in range(1, 8):
        found = first.propose(number)
        assert found is not None
        trial = ended(number, found, found["optim.lr"])
        first.teach(trial, number)
        history.append(trial)
    again = sampler(spec)
    for trial in history:
        again.teach(trial)
    assert again.propose(8) == first.propose(8)


def test_a_search_that_learns_comes_closer_to_what_is_good_than_chance() -> None:
    def distances(search: str) -> list[float]:
        source, found = sampler(spec_of(search=search, trials=40)), []
        for number in range(1, 41):
            proposal = source.propose(number)
            assert proposal is not None
            found.append(abs(proposal["optim.lr"] - 0.1))
            source.teach(ended(number, proposal, 1 - found[-1]), number)
        return sorted(found[20:])

    learned, chance = distances("optuna"), distances("random")
    assert learned[10] < chance[10], "the median of the second half"


def test_a_trial_outside_the_space_teaches_nothing_and_breaks_nothing() -> None:
    source = sampler(spec_of())
    source.teach(ended(1, {"optim.lr": 30.0, "augment.policy": "none"}, 0.5))
    source.teach(ended(2, {"optim.lr": 0.1, "augment.policy": "gone"}, 0.5))
    assert source.study().trials == []
    assert source.propose(3) is not None


def test_failed_and_stopped_trials_are_told_as_such() -> None:
    source = sampler(spec_of())
    source.teach(ended(1, {"optim.lr": 0.1, "augment.policy": "none"}, 0.5, 0.6, outcome=Outcome.STOPPED))
    source.teach(ended(2, {"optim.lr": 0.2, "augment.policy": "none"}, outcome=Outcome.FAILED))
    source.teach(ended(3, {"optim.lr": 0.2, "augment.policy": "none"}, float("nan"), outcome=Outcome.FINISHED))
    assert [trial.state.name for trial in source.study().trials] == ["PRUNED", "FAIL", "FAIL"]
    assert source.study().trials[0].intermediate_values == {1: 0.5, 2: 0.6}


def test_a_trial_that_waits_is_known_by_what_it_has_until_it_has_more() -> None:
    source = sampler(spec_of())
    found = source.propose(1)
    assert found is not None
    trial = ended(1, found, 0.5, outcome=Outcome.PAUSED)
    assert [one.state.name for one in source.study().trials] == ["RUNNING"]
    source.teach(trial, 1)
    assert [(one.state.name, one.intermediate_values) for one in source.study().trials] == [("PRUNED", {1: 0.5})]
    trial.epochs, trial.outcome = epochs(0.5, 0.7), Outcome.FINISHED
    source.teach(trial, 1)
    source.teach(trial, sweep="another")
    assert [(one.state.name, one.value) for one in source.study().trials] == [("COMPLETE", 0.7)] * 2


def test_several_objectives_are_searched_at_once() -> None:
    objectives = {"top1": "max", "images_per_second": "max"}
    source = sampler(spec_of(objectives=objectives), objectives)
    for number in range(1, 8):
        found = source.propose(number)
        assert found is not None
        trial = ended(number, found, 0.5)
        trial.epochs[0]["images_per_second"] = 100.0 * number
        source.teach(trial, number)
    assert [trial.values for trial in source.study().trials][-1] == [0.5, 700.0]


def test_a_grid_is_every_combination_once_and_then_over() -> None:
    space = Sweep.model_validate_json(json.dumps({"space": {
        "augment.policy": {"grid": ["none", "randaugment"]},
        "augment.magnitude": {"grid": [3, 9], "when": {"augment.policy": "randaugment"}},
        "optim.lr": {"choice": [0.1, 0.2]},
    }})).space  # fmt: skip
    assert space is not None
    found = list(grid(space))
    assert len(found) == 2 * (1 + 2)
    assert {"augment.policy": "none", "optim.lr": 0.1} in found
    source = sampler(spec_of(search="grid", space=json.loads(Sweep(space=space).model_dump_json())["space"]))
    assert [source.propose(number) for number in range(1, 8)] == [*found, None]


def test_a_field_that_makes_the_difference_has_the_greater_importance() -> None:
    source, trials = sampler(spec_of()), []
    for number in range(1, 21):
        found = source.propose(number)
        assert found is not None
        trials.append(ended(number, found, 1 - abs(found["optim.lr"] - 0.1)))
    importance = source.importance(trials)
    assert importance["optim.lr"] > 0.8
    assert sum(importance.values()) == pytest.approx(1.0, abs=0.01)
    assert "augment.magnitude" not in importance, "not every trial has it"
    assert source.importance(trials[:3]) == {}


def test_the_first_trial_is_what_a_plain_run_would_train_then_come_the_points() -> None:
    spec = spec_of(points=[{"optim.lr": 0.2, "augment.policy": "randaugment"}])
    assert list(first_settings(spec)) == [
        ({"optim.lr": 0.05, "augment.policy": "none"}, "default"),
        ({"optim.lr": 0.2, "augment.policy": "randaugment", "augment.magnitude": 9}, "point"),
    ]


def test_what_had_begun_goes_on_first_and_new_trials_take_the_next_numbers() -> None:
    spec = spec_of(trials=4)
    done = ended(1, {"optim.lr": 0.05, "augment.policy": "none"}, 0.5)
    broken = ended(2, {"optim.lr": 0.1, "augment.policy": "none"}, 0.4, outcome=Outcome.INTERRUPTED)
    ledger, begun = Ledger(dict(MAX), [done, broken]), []
    proposals = Proposals(spec, ledger, sampler(spec), {"sweep": "s"}, lambda trial: begun.append(trial.number))
    given = [proposals.suggest(name) for name in "abcd"]
    assert begun == [2, 3, 4] == [trial.number for trial in ledger.trials[1:]]
    assert given[0] == {"sweep": "s", "number": 2, "settings": broken.settings}
    assert given[3] == Proposals.FINISHED


class Tuned:
    """As much of Tune's trial as a scheduler sees."""

    def __init__(self, name: str) -> None:
        self.trial_id = name
        self.config: dict[str, Any] = {}


def verdicts(judge: Judge, tuned: Tuned, trial: Trial, values: list[float]) -> list[str]:
    given = []
    for epoch in epochs(*values)[len(trial.epochs) :]:
        told = {**epoch, "settings": json.dumps(trial.settings)}
        given.append(judge.on_trial_result(SimpleNamespace(get_live_trials=list), tuned, told))
        trial.epochs.append(epoch)
        if given[-1] == TrialScheduler.STOP:
            break
    return given


def judged(trials: list[Trial], past: Ledger | None = None) -> tuple[Judge, list[Tuned]]:
    tuned = [Tuned(f"t{trial.number}") for trial in trials]
    known = {one.trial_id: trial for one, trial in zip(tuned, trials, strict=True)}
    judge = Judge(spec_of(scheduler="median"), past or Ledger(dict(MAX)), known, lambda: 0)
    for one in tuned:
        judge.on_trial_add(SimpleNamespace(), one)
    return judge, tuned


def test_a_restarted_scheduler_gives_the_verdicts_that_the_first_would_have_given() -> None:
    past = [ended(number, {"optim.lr": number / 100}, *[0.1 * number] * 9) for number in range(1, 6)]
    fresh = Trial(6, {"optim.lr": 0.06})
    whole, tuned = judged([*[Trial(trial.number, trial.settings) for trial in past], fresh])
    for one, trial in zip(tuned, past, strict=False):
        verdicts(whole, one, Trial(trial.number, trial.settings), [epoch["top1"] for epoch in trial.epochs])
    expected = verdicts(whole, tuned[-1], Trial(6, {"optim.lr": 0.06}), [0.2] * 9)

    again, (one,) = judged([fresh], Ledger(dict(MAX), past))
    assert verdicts(again, one, fresh, [0.2] * 9) == expected == [TrialScheduler.STOP]
    assert again.why == {"t6": "below the median of the others at epoch 1"}


def test_epochs_that_a_lost_trial_tells_again_are_not_judged_again() -> None:
    past = [ended(number, {"optim.lr": number / 100}, value, value) for number, value in ((1, 0.4), (2, 0.6))]
    begun, new = Trial(3, {"optim.lr": 0.06}, epochs=epochs(0.9, 0.9)), Trial(4, {"optim.lr": 0.07})
    judge, (one, other) = judged([begun, new], Ledger(dict(MAX), [*past, begun, new]))
    for told in epochs(0.0, 0.0):
        again = {**told, "settings": json.dumps(begun.settings)}
        assert judge.on_trial_result(SimpleNamespace(), one, again) == TrialScheduler.CONTINUE
    assert verdicts(judge, other, new, [0.5, 0.5]) == [TrialScheduler.STOP], "the median is 0.6"


def test_the_default_settings_are_trained_to_the_end_however_they_do() -> None:
    past = [ended(number, {"optim.lr": number / 100}, *[0.9] * 9) for number in range(1, 6)]
    default = Trial(6, {"optim.lr": 0.06}, "default")
    judge, (one,) = judged([default], Ledger(dict(MAX), past))
    assert verdicts(judge, one, default, [0.1] * 9) == [TrialScheduler.CONTINUE] * 8 + [TrialScheduler.STOP]


def test_a_trial_without_figures_is_not_judged() -> None:
    trial = Trial(1, {"optim.lr": 0.1})
    judge, (one,) = judged([trial])
    assert judge.on_trial_result(SimpleNamespace(), one, {"done": True}) == TrialScheduler.CONTINUE
    nan = {"epoch": 1, "top1": float("nan"), "settings": json.dumps(trial.settings)}
    assert judge.on_trial_result(SimpleNamespace(), one, nan) == TrialScheduler.CONTINUE
    judge.on_trial_complete(SimpleNamespace(), one, {"done": True})
