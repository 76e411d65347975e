"""What a sweep may search is known before it starts: whatever passes gives valid trials, whatever does not is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from launcher.errors import UserError
from launcher.families import FAMILIES, default_space, family
from launcher.space import Domain, own
from launcher.spec import Data, Spec, fields
from launcher.sweeping import check, problems_of

SPEC = Spec(data=Data(uri="s3://bucket/flowers"))


def spec(space: dict[str, Any] | None = None, base: Spec = SPEC, **asked: Any) -> Spec:
    """A spec with a sweep; `asked` are fields of the sweep, or others with `__` for the dot."""
    wanted = {key.replace("__", ".") if "__" in key else f"sweep.{key}": value for key, value in asked.items()}
    return base.updated({"sweep.space": space, **wanted})


def only(space: dict[str, Any] | None = None, **asked: Any) -> tuple[str, str]:
    (problem,) = problems_of(spec(space, **asked))
    return problem


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("augment.policy", {"choice": ["none", "autoaugment"]},
     "'autoaugment' is not one of none, randaugment, trivialaugment"),
    ("optim.schedule", {"grid": ["linear"]}, "'linear' is not one of cosine, step, constant"),
    ("train.precision", {"choice": ["fp8"]}, "'fp8' is not one of fp32, bf16, fp16"),
    ("optim.lr", {"uniform": [0, 0.1]}, "0.0 should be greater than 0"),
    ("optim.lr", {"choice": ["0.1"]}, "'0.1' should be a valid number"),
    ("optim.momentum", {"uniform": [0.5, 1]}, "1.0 should be less than 1"),
    ("optim.momentum", {"choice": [0, 0.9]},
     "0: nesterov needs a momentum above 0; set optim.nesterov=false for plain SGD"),
    ("augment.magnitude", {"randint": [3, 40]}, "40 should be less than or equal to 30"),
    ("augment.magnitude", {"choice": [3, 4.5]}, "4.5 should be a valid integer"),
    ("augment.flip", {"choice": ["yes", False]}, "'yes' should be true or false"),
    ("augment.crop_scale", {"choice": [[0.5, 1.0], [0.9, 0.1]]},
     "[0.9, 0.1] is not valid: give two positive numbers, the smaller first"),
    ("augment.crop_scale", {"choice": [0.5]}, "0.5 should be a list, as in [a, b]"),
    ("model.freeze", {"choice": ["backbone"]}, "'backbone' should be a list, as in [a, b]"),
    ("train.batch_size", {"loguniform": [8, 64]}, "takes whole numbers: use randint or choice"),
    ("train.batch_size", {"uniform": [8, 64]}, "takes whole numbers: use randint or choice"),
    ("train.batch_size", {"quniform": [8, 64, 4.5]}, "takes whole numbers: begin at one, and use a whole step"),
    ("train.batch_size", {"quniform": [1, 65, 8]}, "1 should be greater than or equal to 2"),
    ("data.image_size", {"choice": [None, 224]}, "null leaves the field open; name a value"),
    ("model.pretrained", {"choice": ["hub", "w.pth"]},
     "'w.pth': only hub and none can be searched; launch a sweep for each weights file"),
    ("model.name", {"choice": ["resnet18", "resnet5"]}, "timm has no model resnet5; did you mean resnet50?"),
    ("lr", {"uniform": [0.1, 1]}, "no such field; did you mean optim.lr?"),
    ("optim", {"choice": [1]}, "this is a section; name a field of it, as in optim.lr"),
    ("train.epochs", {"randint": [3, 9]},
     "asha compares trials epoch by epoch, so all need as many; search it with scheduler none"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "domain", "words"), WRONG)
def test_what_would_make_an_invalid_trial_is_named(key: str, domain: dict[str, Any], words: str) -> None:
    assert only({key: domain}) == (f"sweep.space.{key}", words)


REFUSED = ["name", "storage", *(key for key in fields() if key.startswith(("sweep.", "resources.", "limits.",
           "checkpoint."))), "data.uri", "data.val_fraction", "data.val_split", "data.classes",
           "data.max_bad_fraction", "data.cache_gb", "data.pixels_gb", "train.epochs"]  # fmt: skip


@pytest.mark.parametrize("key", fields())
def test_what_all_trials_must_share_cannot_be_searched(key: str) -> None:
    value = SPEC.updated({"sweep.trials": 3}).flat()[key]
    refused = any(
        place == f"sweep.space.{key}" and "null" not in what and "only hub" not in what
        for place, what in problems_of(spec({key: {"choice": [value]}}))
        if "no model" not in what
    )
    assert refused == (key in REFUSED)


def test_the_length_may_be_searched_where_nobody_compares() -> None:
    assert problems_of(spec({"train.epochs": {"choice": [3, 9]}}, scheduler="none")) == []


def test_a_value_that_needs_another_is_fine_where_a_trial_can_have_both() -> None:
    plain: dict[str, dict[str, Any]] = {
        "optim.nesterov": {"choice": [True, False]},
        "optim.momentum": {"choice": [0.0, 0.9]},
    }
    assert problems_of(spec(plain)) == []
    plain["optim.momentum"]["when"] = {"optim.nesterov": False}
    assert problems_of(spec(plain)) == []
    plain["optim.momentum"]["when"] = {"optim.nesterov": True}
    assert "nesterov needs a momentum" in problems_of(spec(plain))[0][1]
    assert problems_of(spec({"train.batch_size": {"choice": [4, 16]}}, resources__workers=8)) == [
        (
            "sweep.space.train.batch_size",
            "4: train.batch_size: 4 is less than one image for each of 8 workers x 1 parts",
        )
    ]


POLICY = {"augment.policy": {"choice": ["none", "randaugment"]}}


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ({"augment.polcy": "none"}, "augment.polcy is not searched; did you mean augment.policy?"),
        ({"augment.policy": "trivialaugment"},
         "'trivialaugment' is not a value of augment.policy (none, randaugment)"),
        ({"augment.policy": []}, "augment.policy needs a value or more"),
        ({"augment.magnitude": 3}, "these conditions go in a circle"),
    ],
)  # fmt: skip
def test_a_condition_names_a_searched_field_and_values_it_has(when: dict[str, Any], words: str) -> None:
    space = {**POLICY, "augment.magnitude": {"randint": [3, 9], "when": when}}
    assert only(space) == ("sweep.space.augment.magnitude.when", words)
    assert (
        problems_of(spec({**space, "augment.magnitude": {"randint": [3, 9], "when": {"augment.policy": "none"}}})) == []
    )


LR = {"optim.lr": {"loguniform": [0.001, 0.1]}}


@pytest.mark.parametrize(
    ("point", "where", "words"),
    [
        ({"optim.lr": 0.5}, "optim.lr", "0.5 is not in the space (0.001 … 0.1 (log))"),
        ({"optim.lr": "x"}, "optim.lr", "'x' should be a valid number"),
        ({"optim.lrr": 0.05}, "optim.lrr", "no such field; did you mean optim.lr?"),
        ({"optim.momentum": 0.5}, "optim.momentum", "is not searched; the space has optim.lr, augment.policy, "
                                                    "augment.magnitude"),
        ({"augment.policy": "none", "augment.magnitude": 4}, "augment.magnitude",
         "counts only when augment.policy is 'randaugment'"),
        ({"augment.magnitude": 4}, "augment.magnitude", "counts only when augment.policy is 'randaugment'"),
    ],
)  # fmt: skip
def test_a_point_lies_in_the_space(point: dict[str, Any], where: str, words: str) -> None:
    space = {**LR, **POLICY, "augment.magnitude": {"randint": [3, 9], "when": {"augment.policy": "randaugment"}}}
    fine = [{}, {"optim.lr": 0.1}, {"augment.policy": "randaugment", "augment.magnitude": 9}]
    assert problems_of(spec(space, points=fine)) == []
    assert only(space, points=[{}, point]) == (f"sweep.points.2.{where}", words)


@pytest.mark.parametrize(
    ("asked", "place", "words"),
    [
        ({"objectives": {"top_1": "max"}}, "sweep.objectives.top_1", "is not reported; did you mean top1?"),
        ({"objectives": {"speed": "max"}}, "sweep.objectives.speed", "is not reported; there are top1, top5"),
        ({"objectives": {"top1": "max", "parameters": "min"}, "search": "grid",
          "space": {"optim.lr": {"grid": [0.1]}}}, "sweep.search", "several objectives need optuna or random"),
        ({"search": "grid", "space": LR}, "sweep.space.optim.lr", "a grid needs a list of values, not a loguniform"),
        ({"search": "grid", "space": {"optim.lr": {"grid": [0.1]}}, "points": [{"optim.lr": 0.1}]}, "sweep.points",
         "a grid tries all its values anyway"),
        ({"scheduler": "pbt", "trials": 1}, "sweep.scheduler", "needs 2 trials at once"),
        ({"scheduler": "pbt", "concurrent": 1}, "sweep.scheduler", "needs 2 trials at once"),
        ({"scheduler": "pbt", "space": {"train.batch_size": {"choice": [8]}}}, "sweep.space.train.batch_size",
         "cannot change while a model trains"),
        ({"space": {}}, "sweep.space", "names no field"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_told(asked: dict[str, Any], place: str, words: str) -> None:
    (found,) = problems_of(spec(**asked))
    assert found[0] == place
    assert words in found[1]


def test_all_problems_are_told_at_once_with_a_way_out() -> None:
    with pytest.raises(UserError, match="3 mistakes in the sweep:") as raised:
        check(spec({"optim.lrr": {"choice": [1]}, "optim.clip_norm": {"uniform": [-1, 1]}}, objectives={"x": "max"}))
    assert raised.value.what.count("\n") == 3
    assert raised.value.hint
    check(SPEC)
    check(spec(LR))


# -- whatever passes gives valid trials

NUMBERS = st.floats(-2, 50).map(lambda number: round(number, 3)) | st.integers(-2, 300)
WORDS = st.sampled_from(["none", "hub", "cosine", "bf16", "randaugment", "x", None])
VALUES = NUMBERS | st.booleans() | WORDS | st.lists(st.floats(0, 1), max_size=3)


@st.composite
def domains(draw: st.DrawFn) -> Domain:
    kind = draw(st.sampled_from(["loguniform", "uniform", "quniform", "randint", "choice"]))
    try:
        if kind == "choice":
            return Domain(choice=tuple(draw(st.lists(VALUES, min_size=1, max_size=3))))
        numbers = sorted(draw(st.tuples(*[st.integers(-1, 60) if kind == "randint" else NUMBERS] * 2)))
        step = [draw(st.sampled_from([0.1, 0.5, 1, 2, 7]))] if kind == "quniform" else []
        return Domain.model_validate_json(json.dumps({kind: [*numbers, *step]}))
    except ValidationError:
        assume(False)
        raise


def drawn(draw: Any, domain: Domain, key: str) -> Any:
    """A value of the domain, as a search would propose it."""
    if domain.finite:
        return draw(st.sampled_from(domain.values))
    least, most = domain.values[:2]
    if domain.randint is not None:
        return draw(st.integers(least, most))
    if domain.quniform is not None:
        value = least + domain.values[2] * draw(st.integers(0, int((most - least) / domain.values[2] + 1e-9)))
        return int(value) if value.is_integer() and "int" in str(fields()[key].annotation) else value
    return draw(st.floats(least, most))


SEARCHABLE = [key for key in fields() if key not in REFUSED and key not in ("model.name", "optim.nesterov")]


@settings(deadline=None, max_examples=400)
@given(key=st.sampled_from(SEARCHABLE), domain=domains(), data=st.data())
def test_any_value_of_a_space_that_passes_makes_a_valid_trial(key: str, domain: Domain, data: st.DataObject) -> None:
    asked = spec({key: domain.model_dump(mode="json")})
    found = problems_of(asked)
    if found:
        assert all(place.startswith(f"sweep.space.{key}") and what for place, what in found)
        return
    value = drawn(data.draw, domain, key)
    trial = SPEC.updated({key: value})
    assert trial.flat()[key] == value
    assert domain.holds(value)


# -- the families


@pytest.mark.parametrize(
    "model",
    ["resnet18", "resnet50", "seresnet50", "wide_resnet50_2", "res2net50_26w_4s", "skresnet18", "resnetv2_50",
     "repvgg_a0", "cspresnet50", "ese_vovnet19b_dw", "regnety_002", "efficientnet_b0", "tf_efficientnetv2_b0",
     "mobilenetv3_small_100", "mobilenetv4_conv_small", "mnasnet_100", "fbnetc_100", "mixnet_s", "ghostnet_100",
     "hardcorenas_a", "tinynet_a", "lcnet_050", "convnext_atto", "nfnet_f0", "nf_regnet_b1", "eca_nfnet_l0",
     "densenet121", "vgg11_bn"],
)  # fmt: skip
def test_timm_agrees_with_what_we_say_of_a_family(model: str) -> None:
    import timm
    import torch

    known = family(model)
    with torch.device("meta"):
        net = timm.create_model(model, num_classes=3, **({"drop_path_rate": 0.1} if known.drop_path else {}))
    parts = dict(net.named_modules())
    assert set(known.early) <= set(parts)
    norms = any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in parts.values())
    assert norms == known.batch_norm


def test_every_family_is_tried() -> None:
    assert all(known.names and known.early for known in FAMILIES)
    assert family("unheard_of").early == ()


def test_nothing_is_left_to_search_when_the_user_set_it_all() -> None:
    resolved = SPEC.updated(
        {"optim.lr": 0.1, "optim.weight_decay": 1e-4, "model.pretrained": "none", "sweep.trials": 4}
    )
    with pytest.raises(UserError, match="you have set every field"):
        default_space(resolved, given=set(fields()))
    space, why = default_space(resolved, given={"augment.policy"})
    assert "augment.magnitude" not in space, "without its policy it would never count"
    assert list(space) == list(why)
    assert set(own(space, resolved.flat())) == set(space)
