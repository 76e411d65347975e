"""A domain knows its values, and a space its combinations."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from launcher.space import Domain, Sweep, grid, ordered, own

POLICY = Domain(choice=("none", "randaugment", "trivialaugment"))
MAGNITUDE = Domain(randint=(3, 15), when={"augment.policy": "randaugment"})


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        (Domain(loguniform=(0.001, 1.0)), [0.001, 0.5, 1, 1.0], [0.0009, 1.1, True, "0.5", None]),
        (Domain(uniform=(-1.0, 1.0)), [-1, 0, 1.0], [-1.1, 2]),
        (Domain(quniform=(0.0, 1.0, 0.1)), [0, 0.1, 0.30000000000000004, 0.7, 1.0], [0.05, 1.1, -0.1]),
        (Domain(quniform=(0.0, 1.0, 0.3)), [0.0, 0.9], [1.0]),
        (Domain(randint=(3, 15)), [3, 15], [2, 16, 3.5, 4.0, True]),
        (POLICY, ["none"], ["None", None, 0]),
        (Domain(choice=([], ["conv1", "bn1"])), [[], ["conv1", "bn1"]], [["conv1"], "conv1"]),
        (Domain(grid=(0, 1)), [0, 1, 1.0], [True, 2]),
    ],
)
def test_a_domain_holds_its_values_and_no_others(domain: Domain, inside: list[Any], outside: list[Any]) -> None:
    assert all(domain.holds(value) for value in inside)
    assert not any(domain.holds(value) for value in outside)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "needs exactly one of"), ({"uniform": [0, 1], "choice": [1]}, "not uniform and choice"),
        ({"choice": []}, "needs a value or more"), ({"grid": [1, 1]}, "a value stands twice"),
        ({"uniform": [1, 1]}, "1 is not less than 1"), ({"loguniform": [0, 1]}, "must be above 0; use uniform"),
        ({"quniform": [0, 1, 2]}, "the step must be above 0 and fit"), ({"quniform": [0, 1, 0]}, "the step must be"),
        ({"randint": [1.5, 2]}, "valid integer"), ({"log": [1, 2]}, "not permitted"),
    ],
)  # fmt: skip
def test_what_is_no_domain_is_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Domain.model_validate_json(json.dumps(document))


@pytest.mark.parametrize(
    ("domain", "text"),
    [
        (Domain(loguniform=(0.001, 0.3)), "0.001 … 0.3 (log)"), (Domain(uniform=(0.0, 0.2)), "0 … 0.2"),
        (Domain(quniform=(0.0, 1.0, 0.25)), "0 … 1 by 0.25"), (Domain(randint=(3, 15)), "3 … 15 (whole)"),
        (POLICY, "none, randaugment, trivialaugment"),
    ],
)  # fmt: skip
def test_a_domain_describes_itself(domain: Domain, text: str) -> None:
    assert domain.describe() == text


@pytest.mark.parametrize(
    ("when", "settings", "applies"),
    [
        ({"a": 1}, {"a": 1}, True), ({"a": 1}, {"a": 2}, False), ({"a": 1}, {}, False), ({"a": [1, 2]}, {"a": 2}, True),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, False), ({"a": [[1], [2]]}, {"a": [1]}, True), (None, {}, True),
    ],
)  # fmt: skip
def test_a_condition_is_met_by_any_of_its_values(when: Any, settings: dict[str, Any], applies: bool) -> None:
    assert Domain(choice=(1,), when=when).applies(settings) == applies


def test_a_field_comes_after_those_it_depends_on() -> None:
    space = {"c": Domain(choice=(1,), when={"b": 1}), "b": Domain(choice=(1,), when={"a": 1}), "a": Domain(choice=(1,))}
    assert ordered(space) == ["a", "b", "c"]
    assert ordered({"a": Domain(choice=(1,), when={"b": 1}), "b": Domain(choice=(1,), when={"a": 1})}) == []
    assert list(own(space, {"a": 1, "b": 1, "c": 5, "d": 6})) == ["c", "b", "a"]
    assert own(space, {"a": 1, "b": 2, "c": 5}) == {"b": 2, "a": 1}


FINITE = st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), FINITE, min_size=1))
def test_a_grid_without_conditions_is_the_product_of_its_values(values: dict[str, list[int]]) -> None:
    space = {key: Domain(grid=tuple(items)) for key, items in values.items()}
    combined = [dict(zip(values, items, strict=True)) for items in itertools.product(*values.values())]
    assert sorted(map(repr, grid(space))) == sorted(map(repr, combined))


@settings(deadline=None)
@given(values=st.dictionaries(st.sampled_from("abcd"), FINITE, min_size=2), data=st.data())
def test_every_combination_of_a_grid_stands_once_and_meets_its_conditions(
    values: dict[str, list[int]], data: st.DataObject
) -> None:
    space: dict[str, Domain] = {}
    for key, items in values.items():
        parent = data.draw(st.sampled_from([None, *space]))
        when = {parent: data.draw(st.sampled_from(values[parent]))} if parent else None
        space[key] = Domain(grid=tuple(items), when=when)
    found = list(grid(space))
    assert len({repr(settings) for settings in found}) == len(found) > 0
    for settings_ in found:
        assert all(space[key].applies(settings_) == (key in settings_) for key in space)
        assert all(space[key].holds(value) for key, value in settings_.items())


@settings(deadline=None)
@given(epochs=st.integers(1, 1000), grace=st.none() | st.integers(1, 50), reduction=st.integers(2, 16))
def test_rungs_are_within_a_trial_and_ascend(epochs: int, grace: int | None, reduction: int) -> None:
    rungs = Sweep(grace_epochs=grace, reduction=reduction).rungs(epochs)
    assert list(rungs) == sorted(set(rungs))
    assert all(1 <= rung < epochs for rung in rungs)
    assert not rungs or rungs[0] == (grace or 1)
