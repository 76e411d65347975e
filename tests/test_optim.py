"""The learning rate as a function of the step, and which weights are decayed."""

from __future__ import annotations

import itertools
import math

import pytest
import timm

from launcher.spec import Optim
from trainers.optim import learning_rate, sgd

STEPS, EPOCHS = 10, 20


def rates(**settings: object) -> list[float]:
    optim = Optim.model_validate({"lr": 0.4, "warmup_epochs": 2.0} | settings)
    return [learning_rate(optim, step, STEPS, EPOCHS) for step in range(STEPS * EPOCHS)]


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_warm_up_rises_in_a_line_to_the_peak_and_nothing_exceeds_it(schedule: str) -> None:
    found = rates(schedule=schedule)
    rises = [later - earlier for earlier, later in itertools.pairwise(found[:20])]
    assert all(rise == pytest.approx(rises[0]) for rise in rises)
    assert rises[0] > 0
    assert max(found) == pytest.approx(0.4)
    assert all(rate > 0 for rate in found)


def test_cosine_is_half_at_the_middle_and_nearly_nothing_at_the_end() -> None:
    found = rates(schedule="cosine")
    assert found[20 + 90] == pytest.approx(0.2)
    assert found[-1] == pytest.approx(0.2 * (1 + math.cos(math.pi * 179 / 180)))
    assert all(later < earlier for earlier, later in itertools.pairwise(found[20:]))


def test_steps_fall_by_gamma_every_so_many_epochs() -> None:
    found = rates(schedule="step", step_epochs=5.0, step_gamma=0.1)
    assert [found[epoch * STEPS] for epoch in (5, 9, 10, 15)] == pytest.approx([0.04, 0.04, 0.004, 0.0004])


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert rates(warmup_epochs=0.0)[0] == 0.4


def test_norms_and_biases_are_not_decayed_and_every_weight_is_trained_once() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    optimizer = sgd(model, Optim(lr=0.1, weight_decay=0.01))
    decayed = {id(weight) for group in optimizer.param_groups if group["weight_decay"] for weight in group["params"]}
    for name, weight in model.named_parameters():
        assert (id(weight) in decayed) == (weight.ndim > 1), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
