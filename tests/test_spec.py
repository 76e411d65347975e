"""The spec is strict, frozen, and travels as JSON without a loss."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from pydantic import ValidationError

from launcher.spec import Data, Spec, fields, resumable, valid_name

SPEC = Spec(data=Data(uri="s3://bucket/flowers"))
SWEEP = SPEC.updated({"sweep.space": {"optim.lr": {"loguniform": [0.001, 0.1]}}})

OTHER: dict[str, Any] = {
    "name": "other",
    "data.uri": "elsewhere",
    "data.classes": ["a", "b"],
    "optim.schedule": "step",
    "train.batch_size": 512,
    "train.accumulate": 2,
    "augment.crop_scale": [0.2, 0.9],
    "augment.crop_ratio": [1.0, 2.0],
    "model.freeze": ["backbone"],
    "sweep.space": {"optim.lr": {"choice": [0.1, 0.2]}},
    "sweep.objectives": {"loss": "min"},
    "sweep.points": [{"optim.lr": 0.01}],
}
"""Another value for fields that do not take what `_other` finds."""


def _other(key: str) -> Any:
    """A valid value for the field that is not its default."""
    if key in OTHER:
        return OTHER[key]
    kinds = [kind for kind in (get_args(fields()[key].annotation) or (fields()[key].annotation,))]
    kind, value = next(iter(kinds)), SWEEP.flat()[key]
    if get_origin(fields()[key].annotation) is Literal:
        return next(choice for choice in kinds if choice != value)
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if kind is bool:
        return not value
    if kind is str:
        return "text"
    if kind is int:
        return {"data.image_size": 8, "resources.gpus_per_worker": 1}.get(key, (value or 0) + 1)
    return 0.5 if value != 0.5 else 0.25


@pytest.mark.parametrize("key", fields())
def test_the_fingerprint_changes_with_exactly_what_decides_the_weights(key: str) -> None:
    changed = SWEEP.updated({key: _other(key)})
    assert changed.flat()[key] != SWEEP.flat()[key]
    assert (changed.fingerprint() == SWEEP.fingerprint()) == resumable(key)
    assert Spec.model_validate_json(changed.to_json()) == changed


def test_a_single_training_does_not_speak_of_sweeps() -> None:
    assert "sweep" not in SPEC.to_json()
    assert list(SPEC.flat()) == [key for key in fields() if not key.startswith("sweep.")]
    assert list(SWEEP.flat()) == list(fields())
    assert SPEC.fingerprint() != SWEEP.fingerprint()
    assert Spec.model_validate_json('{"data": {"uri": "s3://bucket/flowers"}, "sweep": null}') == SPEC


def test_what_a_resumed_run_may_change_is_this_list() -> None:
    assert [key for key in fields() if resumable(key)] == [
        "data.max_bad_fraction", "data.cache_gb", "data.pixels_gb", "train.epochs", "train.early_stop",
        "resources.workers", "resources.cpus_per_worker", "resources.gpus_per_worker", "resources.node_type",
        "resources.spot", "resources.priority", "limits.max_hours", "limits.max_cost", "limits.start_minutes",
        "limits.idle_minutes", "checkpoint.every_minutes", "checkpoint.every_epochs", "checkpoint.keep", "sweep.trials",
        "sweep.concurrent", "sweep.trials_per_gpu", "sweep.time_limit", "sweep.refit", "storage",
    ]  # fmt: skip


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    document = json.loads(SPEC.to_json())
    backwards = json.dumps({key: document[key] for key in reversed(document)})
    again = Spec.model_validate_json(backwards)
    assert again.to_json() == SPEC.to_json()
    assert again.fingerprint() == SPEC.fingerprint()
    assert " " not in SPEC.to_json()


WRONG: list[tuple[str, Any, str]] = [
    ("train.epochs", "3", "valid integer"),
    ("train.epochs", 3.0, "valid integer"),
    ("train.epochs", True, "valid integer"),
    ("train.epochs", 0, "greater than or equal to 1"),
    ("train.batch_size", 1, "greater than or equal to 2"),
    ("optim.lr", "0.1", "valid number"),
    ("optim.lr", 0, "greater than 0"),
    ("optim.nesterov", 1, "valid boolean"),
    ("optim.nesterov", "yes", "valid boolean"),
    ("optim.momentum", 1.0, "less than 1"),
    ("optim.schedule", "linear", "'cosine', 'step' or 'constant'"),
    ("data.uri", "", "at least 1 character"),
    ("data.uri", 3, "valid string"),
    ("data.val_fraction", 0, "greater than 0"),
    ("data.classes", ["a", "a"], "at least two different classes"),
    ("data.classes", "ab", "valid array"),
    ("data.image_size", 4, "greater than or equal to 8"),
    ("augment.crop_scale", [0.5, 0.4], "the smaller first"),
    ("augment.crop_scale", [0.0, 0.4], "two positive numbers"),
    ("augment.crop_scale", [0.5, 1.1], "more than the whole image"),
    ("augment.crop_scale", [0.5], "required"),
    ("resources.gpus_per_worker", 2, "less than or equal to 1"),
    ("optim.momentum", 0, "nesterov needs a momentum above 0"),
    ("train.seed", -1, "greater than or equal to 0"),
    ("train.sed", 1, "not permitted"),
    ("name", "A", "match pattern"),
    ("sweep.trials", 0, "greater than or equal to 1"),
    ("sweep.search", "tpe", "'optuna', 'random' or 'grid'"),
    ("sweep.space", {"optim.lr": {}}, "needs exactly one of loguniform, uniform, quniform, randint, choice, grid"),
    ("sweep.space", {"optim.lr": {"uniform": [0, 1], "grid": [1]}}, "needs exactly one of .*, not uniform and grid"),
    ("sweep.space", {"optim.lr": [0.1]}, "object"),
    ("sweep.objectives", {}, "name at least one"),
    ("sweep.objectives", {"top1": "most"}, "'max' or 'min'"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_what_is_wrong_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SPEC.updated({key: value})


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_are_finite(number: str) -> None:
    with pytest.raises(ValidationError, match=r"finite number|greater than"):
        Spec.model_validate_json(f'{{"data": {{"uri": "x"}}, "optim": {{"lr": {number}}}}}')


def test_an_int_will_do_for_a_float() -> None:
    assert SPEC.updated({"optim.lr": 1}).optim.lr == 1.0


def test_plain_sgd_needs_no_momentum() -> None:
    assert SPEC.updated({"optim.momentum": 0.0, "optim.nesterov": False}).optim.momentum == 0


@pytest.mark.parametrize(
    ("batch", "workers", "parts", "fits"),
    [(8, 4, 2, True), (7, 4, 2, False), (2, None, 2, True), (2, None, 3, False), (None, 512, 64, True)],
)
def test_each_part_of_a_batch_has_an_image(batch: int | None, workers: int | None, parts: int, fits: bool) -> None:
    changes = {"train.batch_size": batch, "resources.workers": workers, "train.accumulate": parts}
    if fits:
        SPEC.updated(changes)
    else:
        with pytest.raises(ValidationError, match="less than one image for each"):
            SPEC.updated(changes)


def test_a_spec_cannot_be_changed() -> None:
    for model, key in ((SPEC, "name"), (SPEC.optim, "lr"), (SPEC.data, "uri")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model, key, "x")


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("a", True), ("a-1", True), ("a" * 40, True), ("a" * 41, False), ("1a", False), ("a-", False), ("-a", False),
        ("", False), ("A", False), ("a_b", False), ("a.b", False), ("a/b", False), ("..", False), ("ä", False),
        ("a\n", False),
    ],
)  # fmt: skip
def test_a_name_is_one_that_kubernetes_and_s3_take(name: str, valid: bool) -> None:
    assert valid_name(name) == valid
    document = json.dumps({"name": name, "data": {"uri": "x"}})
    if valid:
        assert Spec.model_validate_json(document).name == name
    else:
        with pytest.raises(ValidationError):
            Spec.model_validate_json(document)


def test_every_field_says_what_it_is_and_why() -> None:
    for key, info in fields().items():
        assert info.description, key
        assert info.description.endswith("."), key
        assert info.is_required() or info.json_schema_extra["why"], key


def test_the_schema_is_one_that_editors_take() -> None:
    schema = Spec.model_json_schema()
    Draft202012Validator.check_schema(schema)
    check = Draft202012Validator(schema)
    assert check.is_valid(json.loads(SPEC.to_json()))
    assert check.is_valid(json.loads(SWEEP.to_json()))
    assert check.is_valid({"data": {"uri": "x"}, "sweep": {"space": {"optim.lr": [0.1, 0.2]}}})
    assert not check.is_valid({"data": {"uri": "x"}, "sweep": {"space": {"optim.lr": {"logunifrom": [1, 2]}}}})
    assert not check.is_valid({"data": {"uri": "x"}, "train": {"epoch": 3}})
    for section in schema["$defs"].values():
        assert section["additionalProperties"] is False
        assert all(field.get("description") for field in section["properties"].values())
