"""The plan of a sweep: what it searches, how many trials at once, and that it never asks for what cannot be."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import UserError
from launcher.plan import Plan, resolve
from launcher.pools import Pool
from launcher.schedule import Speed, schedule
from launcher.site import NodeType, Offer
from launcher.space import own
from launcher.spec import Data, Spec
from tests.pools import pool, site
from tests.test_plan import DEFAULTS, FACTS, GPUS, LAPTOP

NODE = Pool("node", cpus=32, memory=2**36, gpus=4, gpu_type="GPU")
RANGE = {"optim.lr": {"loguniform": [0.001, 0.1]}}


def sweep(where: Pool = LAPTOP, uri: str = "s3://b/flowers", **asked: Any) -> Plan:
    """The plan of a sweep; `asked` are spec fields with `__` for the dot, those of the sweep without its name."""
    wanted = {key.replace("__", ".") if "__" in key else f"sweep.{key}": value for key, value in asked.items()}
    spec = Spec(data=Data(uri=uri)).updated({"sweep.trials": 16, **wanted})
    return resolve(
        spec, where, facts=FACTS, given=dict.fromkeys(["data.uri", *wanted], "you"), defaults=DEFAULTS,
        model_facts=lambda _: {"size": 224, "fixed": False, "weights": True},
    )  # fmt: skip


def at_once(made: Plan) -> int:
    assert made.spec.sweep is not None
    return made.spec.sweep.concurrent or 0


def refusal(where: Pool = LAPTOP, **asked: Any) -> UserError:
    with pytest.raises(UserError) as raised:
        sweep(where, **asked)
    assert raised.value.hint
    return raised.value


# -- trials at once


@pytest.mark.parametrize(
    ("where", "asked", "trials", "cores"),
    [
        (LAPTOP, {}, 4, 2),
        (replace(LAPTOP, cpus=2), {}, 2, 1),
        (replace(LAPTOP, cpus=1), {}, 1, 1),
        (LAPTOP, {"trials": 3}, 3, 2),
        (LAPTOP, {"concurrent": 8}, 8, 1),
        (LAPTOP, {"resources__workers": 3}, 2, 1),
        (LAPTOP, {"resources__cpus_per_worker": 4}, 2, 4),
        (NODE, {}, 4, 8),
        (NODE, {"resources__workers": 2}, 2, 8),
        (NODE, {"resources__workers": 3}, 1, 10),
        (NODE, {"trials_per_gpu": 4}, 16, 2),
        (NODE, {"trials_per_gpu": 4, "trials": 6}, 6, 5),
        (NODE, {"concurrent": 1}, 1, 32),
        (NODE, {"resources__gpus_per_worker": 0}, 4, 8),
    ],
)
def test_trials_at_once_share_this_machine(where: Pool, asked: dict[str, Any], trials: int, cores: int) -> None:
    made = sweep(where, **asked)
    assert (at_once(made), made.spec.resources.cpus_per_worker) == (trials, cores)


@pytest.mark.parametrize(
    ("node_type", "asked", "trials", "pods", "gpus"),
    [
        ("a10g", {}, 1, 1, 1),
        ("a10g", {"concurrent": 8}, 8, 8, 1),
        ("a10g", {"trials_per_gpu": 3}, 3, 1, 1),
        ("a10g", {"trials_per_gpu": 3, "concurrent": 4}, 4, 2, 1),
        ("a10g", {"resources__workers": 4}, 1, 4, 1),
        ("h100", {}, 8, 1, 8),
        ("h100", {"trials": 5}, 5, 1, 5),
        ("h100", {"resources__workers": 4}, 2, 1, 8),
        ("h100", {"resources__workers": 4, "concurrent": 3}, 3, 3, 4),
        ("h100", {"resources__workers": 16}, 1, 2, 8),
        ("h100", {"trials_per_gpu": 2, "concurrent": 16}, 16, 1, 8),
    ],
)
def test_trials_at_once_fill_the_pods_of_a_pool(
    node_type: str, asked: dict[str, Any], trials: int, pods: int, gpus: int
) -> None:
    made = sweep(pool("gpu-pool"), resources__node_type=node_type, **asked)
    assert made.layout is not None
    assert (at_once(made), made.layout.pods, made.layout.gpus) == (trials, pods, gpus)


@pytest.mark.parametrize(
    ("where", "asked", "said"),
    [
        (LAPTOP, {"concurrent": 9}, "9 trials at once, but local can hold 8"),
        (LAPTOP, {"concurrent": 3, "resources__workers": 4}, "3 trials at once, but local can hold 2"),
        (LAPTOP, {"concurrent": 5, "trials": 4}, "5 trials at once, but the sweep has 4 in all"),
        (LAPTOP, {"resources__workers": 9}, "not even one trial fits on local"),
        (LAPTOP, {"trials_per_gpu": 2}, "only trials of one worker with a GPU can share it"),
        (NODE, {"trials_per_gpu": 2, "resources__workers": 2}, "only trials of one worker with a GPU can share it"),
        (NODE, {"concurrent": 5}, "5 trials at once, but node can hold 4"),
        (NODE, {"resources__workers": 5}, "5 workers on 5 GPUs, but node has 4 GPUs"),
        (pool("gpu-pool"), {"concurrent": 9}, "9 trials at once, but gpu-pool can hold 8"),
        (pool("gpu-pool"), {"resources__node_type": "h100", "concurrent": 17, "trials": 32}, "gpu-pool can hold 16"),
        (pool("cpu-pool"), {"concurrent": 13}, "13 trials at once, but cpu-pool can hold 12"),
        (pool("gpu-pool"), {"time_limit": 25.0}, "limits.max_hours ends the sweep after 24 h"),
        (LAPTOP, {"scheduler": "pbt", "concurrent": 1}, "pbt copies what runs beside"),
        (LAPTOP, {"search": "grid", "space": {"optim.lr": {"uniform": [0.1, 1]}}}, "a grid needs a list of values"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_numbers(where: Pool, asked: dict[str, Any], said: str) -> None:
    assert said in refusal(where, **asked).what


@settings(deadline=None, max_examples=200)
@given(
    gpus=st.integers(0, 8), cpus=st.floats(1, 64), nodes=st.integers(1, 4), most=st.none() | st.integers(1, 16),
    workers=st.none() | st.integers(1, 4), sharing=st.integers(1, 4), asked=st.none() | st.integers(1, 40),
    trials=st.integers(1, 40),
)  # fmt: skip
def test_no_sweep_asks_for_more_than_its_pool_can_hold(
    gpus: int, cpus: float, nodes: int, most: int | None, workers: int | None, sharing: int, asked: int | None,
    trials: int,
) -> None:  # fmt: skip
    """Every trial that is begun has all its workers: none waits for ever for what another holds."""
    kind = NodeType(name="kind", gpus=gpus, cpus=cpus, memory="64Gi", max_nodes=nodes, spot=Offer())
    limits = {"max_gpus": most} if most else {}
    where = Pool.of("pool", site("cpu-pool", limits=limits).model_copy(update={"node_types": (kind,)}))
    wanted: dict[str, Any] = {
        "concurrent": asked,
        "trials_per_gpu": sharing,
        "trials": trials,
        "resources__workers": workers,
    }
    try:
        made = sweep(where, **wanted)
    except UserError:  # which requests cannot be, the table above says
        return
    layout, each, share = made.layout, made.spec.resources, made.spec.sweep
    assert layout is not None
    assert share is not None
    assert 1 <= at_once(made) <= trials
    assert asked in (None, at_once(made))
    wants = at_once(made) * made.workers
    assert layout.pods * layout.workers >= wants
    assert layout.cpus >= layout.workers * (each.cpus_per_worker or 0)
    if each.gpus_per_worker:
        assert layout.gpus * sharing == layout.workers
        assert layout.pods * layout.gpus == math.ceil(wants / sharing) <= min(gpus * nodes, most or math.inf)
    together = min(cpus // layout.cpus, gpus // layout.gpus if layout.gpus else math.inf)
    assert layout.pods <= nodes * together


# -- what is searched


@settings(deadline=None, max_examples=100)
@given(
    model=st.sampled_from(["resnet18", "resnet50", "convnext_tiny", "efficientnet_b0", "nfnet_f0", "vgg16", "unheard"]),
    weights=st.sampled_from(["hub", "none"]), uri=st.sampled_from(["s3://b/x", "sample://digits"]),
    scheduler=st.sampled_from(["asha", "pbt", "none"]), search=st.sampled_from(["optuna", "random", "grid"]),
    epochs=st.integers(1, 300),
)  # fmt: skip
def test_every_default_space_is_small_valid_and_holds_the_settings_of_launch(
    model: str, weights: str, uri: str, scheduler: str, search: str, epochs: int
) -> None:
    if (scheduler, search) == ("pbt", "grid"):
        return
    made = sweep(uri=uri, model__name=model, model__pretrained=weights, train__epochs=epochs, scheduler=scheduler,
                 search=search)  # fmt: skip
    assert made.spec.sweep is not None
    space = made.spec.sweep.space
    assert space is not None
    assert 3 <= len(space) <= 7
    assert list(space) == list(made.searched)
    assert all(made.searched.values())
    for key, value in own(space, made.spec.flat()).items():
        assert space[key].holds(value), key
    assert not [note for note in made.warnings if "not in the space" in note]


def test_what_the_user_set_is_not_searched() -> None:
    made = sweep(optim__lr=0.02, augment__policy="trivialaugment")
    assert made.spec.sweep is not None
    assert not {"optim.lr", "augment.policy", "augment.magnitude"} & set(made.spec.sweep.space or {})


@pytest.mark.parametrize(
    ("model", "weights", "fields"),
    [
        ("resnet18", "hub", {"model.freeze", "augment.crop_scale"}),
        ("resnet50", "hub", {"model.freeze", "model.drop_path_rate"}),
        ("resnet50", "none", {"model.drop_path_rate", "augment.crop_scale"}),
        ("nfnet_f0", "none", {"model.drop_path_rate", "optim.clip_norm"}),
        ("vgg16", "hub", {"augment.crop_scale"}),
    ],
)
def test_the_default_space_depends_on_the_family(model: str, weights: str, fields: set[str]) -> None:
    made = sweep(model__name=model, model__pretrained=weights)
    assert made.spec.sweep is not None
    usual = {"optim.lr", "optim.weight_decay", "optim.label_smoothing", "augment.policy", "augment.magnitude"}
    assert set(made.spec.sweep.space or {}) - usual == fields


def test_a_digit_stays_a_digit() -> None:
    made = sweep(uri="sample://digits")
    assert made.spec.sweep is not None
    assert list(made.spec.sweep.space or {}) == [
        "optim.lr", "optim.weight_decay", "optim.label_smoothing", "augment.crop_scale",
    ]  # fmt: skip


def test_a_grid_has_as_many_trials_as_combinations_unless_the_user_wants_fewer() -> None:
    space = {"optim.lr": {"grid": [0.1, 0.2, 0.3]}, "augment.policy": {"choice": ["none", "randaugment"]},
             "augment.magnitude": {"grid": [3, 9], "when": {"augment.policy": "randaugment"}}}  # fmt: skip
    spec = Spec(data=Data(uri="x")).updated({"sweep.search": "grid", "sweep.space": space})
    made = resolve(spec, LAPTOP, facts=FACTS, given={}, defaults=DEFAULTS, model_facts=lambda _: {})
    assert made.spec.sweep is not None
    assert made.spec.sweep.trials == 9
    for trials, expected in ((4, 4), (20, 9)):
        asked = sweep(search="grid", space=space, trials=trials).spec.sweep
        assert asked is not None
        assert asked.trials == expected
    endless = {f"optim.{key}": {"grid": [number / 10_000 for number in range(1, 60)]}
               for key in ("lr", "weight_decay", "clip_norm")}  # fmt: skip
    assert "more than 10,000 combinations" in refusal(search="grid", space=endless).what


def test_a_searched_model_is_the_first_of_its_choices_and_planned_for() -> None:
    made = sweep(space={"model.name": {"choice": ["efficientnet_b0", "resnet50"]}})
    assert made.spec.model.name == "efficientnet_b0"
    assert made.warnings == ()


@pytest.mark.parametrize(
    ("asked", "note"),
    [
        ({"trials": 5}, "5 trials are few for 7 fields"),
        ({"train__epochs": 1}, "trials of 1 epoch cannot be compared on the way"),
        ({"grace_epochs": 30, "train__epochs": 30}, "trials of 30 epochs cannot be compared on the way"),
        ({"space": {"optim.lr": {"uniform": [1, 2]}}}, "the first trial has optim.lr 0.005, as `launch` would"),
    ],
)
def test_what_is_unwise_is_noted(asked: dict[str, Any], note: str) -> None:
    assert sweep().warnings == ()
    assert [found for found in sweep(**asked).warnings if note in found]


# -- what it takes


def test_the_schedule_of_asha_counts_rungs_epochs_hours_and_cost() -> None:
    made = sweep(pool("gpu-pool"), concurrent=4, train__epochs=9, trials=16, limits__max_hours=2.0)
    ahead = made.schedule
    assert ahead is not None
    assert [rung.epoch for rung in ahead.rungs] == [2, 6]
    assert ahead.epochs_worst == 16 * 9
    assert ahead.epochs_expected == pytest.approx(32 + 4 * ahead.rungs[0].survive + 3 * ahead.rungs[1].survive)
    assert 16 / 3 < ahead.rungs[0].survive == ahead.rungs[1].reached < 8
    assert (ahead.at_once, ahead.gpus, ahead.hours_worst, ahead.cost_worst) == (4, 4, None, None)
    assert ahead.caps == ("--max-hours after 2 h",)
    timed = schedule(made.spec, made.layout, 4_000, Speed("first", 0.01))
    assert timed.hours_worst == pytest.approx(16 * 9 / 4 * 4_000 * 0.01 / 3600)
    assert timed.hours_expected is not None
    assert made.layout is not None
    assert timed.cost_expected == pytest.approx(timed.hours_expected * (4 * 1.21 + 0.12))
    slow = schedule(made.spec, made.layout, 4_000, Speed("first", 1.0))
    assert (slow.hours_worst, slow.cost_worst) == (2.0, made.layout.most), "the clock ends it"


@pytest.mark.parametrize(
    ("epochs", "scheduler", "grace"),
    [(1, "asha", 1), (5, "asha", 1), (18, "asha", 4), (30, "median", 7), (1, "pbt", 1), (18, "pbt", 3)],
)
def test_trials_are_first_compared_at_a_quarter_of_their_epochs(epochs: int, scheduler: str, grace: int) -> None:
    made = sweep(train__epochs=epochs, scheduler=scheduler, space=RANGE)
    assert made.spec.sweep is not None
    assert made.spec.sweep.grace_epochs == grace


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"scheduler": "none"}, 16 * 9), ({"scheduler": "pbt"}, 16 * 9), ({"scheduler": "median"}, None),
        ({"search": "random", "scheduler": "none", "trials": 1}, 9), ({"grace_epochs": 9}, 16 * 9),
    ],
)  # fmt: skip
def test_other_schedulers_promise_no_more_than_they_keep(asked: dict[str, Any], expected: int | None) -> None:
    ahead = sweep(train__epochs=9, **asked).schedule
    assert ahead is not None
    assert ahead.epochs_expected == expected
    assert ahead.rungs == ()
    assert ahead.note


@settings(deadline=None)
@given(trials=st.integers(1, 200), epochs=st.integers(1, 100), reduction=st.integers(2, 8),
       scheduler=st.sampled_from(["asha", "hyperband", "median", "none"]))  # fmt: skip
def test_what_is_expected_is_never_more_than_the_worst(
    trials: int, epochs: int, reduction: int, scheduler: str
) -> None:
    ahead = sweep(trials=trials, train__epochs=epochs, reduction=reduction, scheduler=scheduler, space=RANGE).schedule
    assert ahead is not None
    assert ahead.epochs_worst == trials * epochs
    assert ahead.epochs_expected is None or 0 < ahead.epochs_expected <= ahead.epochs_worst
    assert all(0 < rung.survive <= rung.reached <= trials for rung in ahead.rungs)
    assert json.loads(json.dumps(ahead.to_json()))["trials"] == trials


def test_the_plan_of_a_sweep_is_json() -> None:
    document = json.loads(json.dumps(sweep(GPUS).to_json()))
    assert document["schedule"]["rungs"]
    assert document["searched"]["optim.lr"].startswith("matters most")
