"""The plan is pure, leaves nothing open, keeps what the user said, and says why."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import UserError
from launcher.plan import CLUSTER_FIELDS, SAMPLE_CHOICES, Plan, count, resolve
from launcher.pools import Pool
from launcher.spec import Data, Spec

LAPTOP = Pool("local", cpus=8, memory=16 * 2**30)
GPUS = Pool("gpu-pool", cpus=64, memory=512 * 2**30, gpus=8, gpu_type="NVIDIA H100", bf16=True)
OLD_GPU = Pool("old", cpus=4, memory=32 * 2**30, gpus=1, gpu_type="Tesla T4")
FACTS: dict[str, Any] = {
    "images": 5_000, "bytes": 10**9, "classes": 10, "train": 4_000, "val": 1_000, "test": 0, "ignored": 0,
    "smallest_class": ["daisy", 400], "largest_class": ["tulip", 600],
}  # fmt: skip
KNOWN = {
    "resnet18": {"size": 224, "fixed": False, "weights": True},
    "resnet50": {"size": 224, "fixed": False, "weights": True},
    "fixed_336": {"size": 336, "fixed": True, "weights": True},
    "efficientnet_b0": {"size": 224, "fixed": False, "weights": True},
    "unborn": {"size": 64, "fixed": False, "weights": False},
}
DEFAULTS = {"name": "flowers-1123", "storage": "/home/me/raylaunch"}
OPEN = [key for key, value in Spec(data=Data(uri="x")).flat().items() if value is None]
STAY_OPEN = ["data.val_split", "data.classes", "data.cache_gb", "data.pixels_gb", *CLUSTER_FIELDS]
"""Fields of which nothing means something: found in the data, all classes, and what this machine does not have."""


def _known(name: str) -> dict[str, Any]:
    return KNOWN.get(name, {})


def plan(pool: Pool = LAPTOP, facts: dict[str, Any] = FACTS, uri: str = "s3://b/flowers", **asked: Any) -> Plan:
    wanted = {key.replace("__", "."): value for key, value in asked.items()}
    spec = Spec(data=Data(uri=uri)).updated(wanted)
    origin = dict.fromkeys(["data.uri", *wanted], "you said so")
    return resolve(spec, pool, facts=facts, given=origin, defaults=DEFAULTS, model_facts=_known)


POOLS = st.builds(
    Pool, st.just("pool"), cpus=st.integers(1, 256), memory=st.just(2**34), gpus=st.integers(0, 16),
    gpu_type=st.just("GPU"), bf16=st.booleans(),
)  # fmt: skip
SIZES = st.integers(1, 10**7).map(
    lambda train: {
        **FACTS,
        "train": train,
        "images": train + 1,
        "smallest_class": ["a", 1],
        "largest_class": ["b", train],
    }
)
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "model.name": st.sampled_from([*KNOWN, "unheard_of"]),
        "model.pretrained": st.sampled_from(["hub", "none", "/weights.pth"]),
        "train.batch_size": st.integers(2, 4096),
        "train.accumulate": st.integers(1, 8),
        "train.epochs": st.integers(1, 200),
        "train.precision": st.sampled_from(["fp32", "bf16", "fp16"]),
        "train.channels_last": st.booleans(),
        "resources.workers": st.integers(1, 32),
        "resources.gpus_per_worker": st.integers(0, 1),
        "optim.lr": st.floats(1e-5, 10),
        "augment.flip": st.booleans(),
        "data.image_size": st.integers(8, 512),
    },
)


@settings(deadline=None, max_examples=300)
@given(pool=POOLS, facts=SIZES | st.just({}), uri=st.sampled_from(["s3://b/x", *SAMPLE_CHOICES]), asked=ASKED)
def test_a_plan_leaves_nothing_open_keeps_the_users_values_and_is_the_same_again(
    pool: Pool, facts: dict[str, Any], uri: str, asked: dict[str, Any]
) -> None:
    keys = {key.replace(".", "__"): value for key, value in asked.items()}
    try:
        Spec(data=Data(uri=uri)).updated(asked)
    except ValueError:
        return
    try:
        made = plan(pool, facts, uri, **keys)
    except UserError:  # which requests cannot be, the table below says
        workers, fixed = asked.get("resources.workers", 1), asked.get("model.name") == "fixed_336"
        assert fixed or (workers > pool.gpus and asked.get("resources.gpus_per_worker", pool.gpus))
        return
    spec = made.spec
    assert [key for key, value in spec.flat().items() if value is None] == STAY_OPEN
    assert {key: spec.flat()[key] for key in asked} == asked
    workers, batch = spec.resources.workers or 0, spec.train.batch_size or 0
    assert batch >= workers * spec.train.accumulate
    assert not spec.resources.gpus_per_worker or workers <= pool.gpus
    assert [choice.key for choice in made.choices] == list(spec.flat())
    assert all(choice.why for choice in made.choices)
    assert {choice.key for choice in made.choices if choice.source == "you"} == {"data.uri", *asked}
    assert {choice.key for choice in made.choices if choice.source == "chosen"} == {*OPEN} - {*STAY_OPEN} - {*asked}
    assert plan(pool, facts, uri, **keys) == made


def test_choices_for_a_cpu() -> None:
    spec = plan(LAPTOP).spec
    assert (spec.model.name, spec.model.pretrained, spec.data.image_size) == ("resnet18", "hub", 224)
    assert (spec.resources.workers, spec.resources.cpus_per_worker, spec.resources.gpus_per_worker) == (1, 8, 0)
    assert (spec.train.precision, spec.train.channels_last, spec.train.batch_size) == ("fp32", False, 32)
    assert plan(LAPTOP, model__name="efficientnet_b0").spec.train.channels_last


def test_choices_for_gpus() -> None:
    spec = plan(GPUS, {**FACTS, "train": 10**6}).spec
    assert (spec.model.name, spec.train.precision, spec.train.channels_last) == ("resnet50", "bf16", True)
    assert (spec.resources.workers, spec.resources.cpus_per_worker, spec.resources.gpus_per_worker) == (8, 8, 1)
    assert (spec.train.batch_size, spec.optim.lr) == (512, 0.08)
    assert plan(OLD_GPU).spec.train.precision == "fp16"


def test_a_machine_with_gpus_can_train_on_its_cpus() -> None:
    spec = plan(GPUS, resources__gpus_per_worker=0).spec
    assert (spec.resources.workers, spec.resources.cpus_per_worker, spec.train.precision) == (1, 64, "fp32")


def test_training_anew_takes_more_of_everything() -> None:
    tuned, anew = plan().spec, plan(model__pretrained="none").spec
    assert (anew.train.epochs or 0) > (tuned.train.epochs or 0)
    assert anew.augment.crop_scale == (0.08, 1.0)
    assert (anew.optim.weight_decay or 0) > (tuned.optim.weight_decay or 0)
    assert plan(model__name="unborn").spec.model.pretrained == "none"


def test_a_small_batch_given_by_the_user_limits_the_workers() -> None:
    assert plan(GPUS, train__batch_size=4).spec.resources.workers == 4
    assert plan(GPUS, train__batch_size=9, train__accumulate=2).spec.resources.workers == 4


@pytest.mark.parametrize(("train", "batch"), [(10, 16), (300, 16), (400, 16), (639, 16), (640, 32), (10**6, 32)])
def test_few_images_make_a_small_batch(train: int, batch: int) -> None:
    made = plan(facts={**FACTS, "train": train})
    assert made.spec.train.batch_size == batch
    assert made.steps_per_epoch == -(-train // batch)


@pytest.mark.parametrize(
    ("pool", "asked", "message"),
    [
        (GPUS, {"resources__workers": 9}, "9 workers on 9 GPUs, but gpu-pool has 8 GPUs"),
        (LAPTOP, {"resources__gpus_per_worker": 1}, "1 worker on 1 GPU, but local has no GPU"),
        (
            LAPTOP,
            {"resources__gpus_per_worker": 1, "resources__workers": 2},
            "2 workers on 2 GPUs, but local has no GPU",
        ),
        (LAPTOP, {"model__name": "fixed_336", "data__image_size": 224}, "fixed_336 takes images of 336 pixels only"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(pool: Pool, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        plan(pool, **asked)
    assert raised.value.what == message
    assert raised.value.where
    assert raised.value.hint


def test_digits_are_no_photos() -> None:
    made = plan(uri="sample://digits", facts={**FACTS, "train": 1_438})
    spec = made.spec
    assert (spec.model.name, spec.model.pretrained, spec.data.image_size) == ("resnet10t", "none", 32)
    assert spec.augment.flip is False
    assert plan(GPUS, uri="sample://digits").spec.model.name == "resnet10t"
    assert plan(uri="sample://digits", augment__flip=True).spec.augment.flip is True
    reasons = {choice.key: choice.why for choice in made.choices}
    assert reasons["augment.flip"] == "a mirrored digit is another digit"


def test_a_sample_does_not_overrule_a_value_whose_origin_is_forgotten() -> None:
    spec = Spec(data=Data(uri="sample://digits")).updated({"train.epochs": 20, "model.name": "resnet50"})
    made = resolve(spec, LAPTOP, facts=FACTS, given={}, defaults=DEFAULTS, model_facts=_known)
    assert (made.spec.train.epochs, made.spec.model.name) == (20, "resnet50")


@pytest.mark.parametrize(
    ("facts", "asked", "warning"),
    [
        ({"smallest_class": ["a", 10], "largest_class": ["b", 1_000]}, {}, "b has 1,000 images, a 10"),
        ({"ignored": 1_200}, {}, "1,200 files are not images and are left out"),
        (
            {},
            {"resources__workers": 8, "resources__cpus_per_worker": 2},
            "8 workers x 2 cores share the 8 cores of local",
        ),
        ({}, {"augment__mixup": 0.2}, "label_smoothing comes on top"),
        ({}, {"optim__warmup_epochs": 3.0, "train__epochs": 3}, "the warm-up lasts all 3 epochs"),
        ({}, {"train__precision": "bf16"}, "most CPUs compute bf16 many times slower"),
    ],
)
def test_what_is_unwise_is_noted(facts: dict[str, Any], asked: dict[str, Any], warning: str) -> None:
    assert plan().warnings == ()
    (note,) = plan(facts={**FACTS, **facts}, **asked).warnings
    assert warning in note


def test_the_plan_is_json() -> None:
    document = plan(GPUS).to_json()
    assert json.loads(json.dumps(document))["machine"]["gpu_type"] == "NVIDIA H100"
    assert set(document) == {"pool", "machine", "workers", "steps_per_epoch", "facts", "warnings", "choices", "layout"}
    assert plan(facts={}).steps_per_epoch is None


@pytest.mark.parametrize(("number", "text"), [(0, "no GPU"), (1, "1 GPU"), (2, "2 GPUs")])
def test_things_are_counted_in_words(number: int, text: str) -> None:
    assert count(number, "GPU") == text
