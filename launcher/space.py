"""What a sweep searches, in the spec: a domain for each field, and how the search spends its budget. No I/O.

sweep:
  trials: 32
  space:
    optim.lr: {loguniform: [0.001, 0.3]}
    augment.policy: {choice: [none, randaugment]}
    augment.magnitude: {randint: [3, 15], when: {augment.policy: randaugment}}
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_serializer, model_validator

from launcher.section import Section, field

KINDS = ("loguniform", "uniform", "quniform", "randint", "choice", "grid")


class Domain(Section):
    """The values that one field may take; exactly one of `KINDS` is set.

    Ranges are [least, most], both included; `quniform` has a third number, the step between values. With `when` the
    field is only searched in trials in which the other fields named there have that value, or one of those values.
    """

    loguniform: tuple[float, float] | None = Field(default=None, description="Numbers of any size: [least, most].")
    uniform: tuple[float, float] | None = Field(default=None, description="Numbers: [least, most].")
    quniform: tuple[float, float, float] | None = Field(default=None, description="Numbers: [least, most, step].")
    randint: tuple[int, int] | None = Field(default=None, description="Whole numbers: [least, most].")
    choice: tuple[Any, ...] | None = Field(default=None, description="One of these values.")
    grid: tuple[Any, ...] | None = Field(default=None, description="Each of these values, where search is grid.")
    when: dict[str, Any] | None = Field(default=None, description="Only in trials that have these values.")

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of a `choice` or `grid`, the numbers of a range."""
        return tuple(getattr(self, self.kind))

    @property
    def finite(self) -> bool:
        """Whether the values can be listed."""
        return self.kind in ("choice", "grid")

    def holds(self, value: Any) -> bool:
        """Whether it is one of the values."""
        if self.finite:
            return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in self.values)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        least, most = self.values[:2]
        if self.quniform is not None:
            steps = (value - least) / self.values[2]
            return bool(least <= value <= most) and abs(steps - round(steps)) < 1e-6
        return bool(least <= value <= most) and (self.randint is None or isinstance(value, int))

    def applies(self, settings: Mapping[str, Any]) -> bool:
        """Whether the field is searched in a trial with these settings."""
        return all(key in settings and settings[key] in _several(wanted) for key, wanted in (self.when or {}).items())

    def describe(self) -> str:
        """`0.001 … 0.3 (log)`, `none, randaugment`, …"""
        if self.finite:
            return ", ".join(str(value) for value in self.values)
        text = f"{self.values[0]:g} … {self.values[1]:g}"
        notes = {"loguniform": " (log)", "quniform": f" by {self.values[-1]:g}", "randint": " (whole)"}
        return text + notes.get(self.kind, "")

    @model_validator(mode="after")
    def _one_kind(self) -> Domain:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of {', '.join(KINDS)}" + (f", not {' and '.join(given)}" * bool(given))
            )
        if self.finite:
            if not self.values:
                raise ValueError(f"{self.kind} needs a value or more")
            if any(value in self.values[:number] for number, value in enumerate(self.values)):
                raise ValueError(f"{self.kind}: a value stands twice")
            return self
        least, most = self.values[:2]
        if not least < most:
            raise ValueError(f"{self.kind}: {least:g} is not less than {most:g}")
        if self.kind == "loguniform" and least <= 0:
            raise ValueError("loguniform: the least value must be above 0; use uniform")
        if self.kind == "quniform" and not 0 < self.values[2] <= most - least:
            raise ValueError("quniform: the step must be above 0 and fit between least and most")
        return self

    @model_serializer(mode="wrap")
    def _only_what_is_set(self, serialize: Any) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def ordered(space: Mapping[str, Domain]) -> list[str]:
    """The fields, each after those its `when` names; fields whose conditions go in a circle are left out."""
    done: list[str] = []
    while ready := [key for key in space if key not in done and set(space[key].when or {}) <= set(done)]:
        done += ready
    return done


def own(space: Mapping[str, Domain], values: Mapping[str, Any]) -> dict[str, Any]:
    """The searched part of some values: of each field that applies among them."""
    settings: dict[str, Any] = {}
    for key in ordered(space):
        if space[key].applies(settings):
            settings[key] = values[key]
    return {key: settings[key] for key in space if key in settings}


def grid(space: Mapping[str, Domain]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of finite domains, each once."""

    def complete(keys: list[str], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not keys:
            yield {key: settings[key] for key in space if key in settings}
            return
        domain = space[keys[0]]
        for value in domain.values if domain.applies(settings) else ():
            yield from complete(keys[1:], {**settings, keys[0]: value})
        if not domain.applies(settings):
            yield from complete(keys[1:], settings)

    yield from complete(ordered(space), {})


def _short_form(schema: dict[str, Any]) -> None:
    """A spec file may give a list where the schema has a domain: it means a choice."""
    domains = schema["properties"]["space"]["anyOf"][0]
    domains["additionalProperties"] = {"anyOf": [domains["additionalProperties"], {"type": "array"}]}


class Sweep(Section):
    """A search: how many trials, over what, and which of them are worth their epochs."""

    model_config = ConfigDict(json_schema_extra=_short_form)

    trials: int = field(16, "Trials in all.", "a model's few important fields are found within that", ge=1, le=10_000)
    space: dict[str, Domain] | None = field(
        None, "Domain of each field that is searched.", "what matters most for the model"
    )
    objectives: dict[str, Literal["max", "min"]] = field(
        {"top1": "max"}, "What is searched for; the first decides which trials go on and which is best.",
        "accuracy on the validation split",
    )  # fmt: skip
    search: Literal["optuna", "random", "grid"] = field(
        "optuna",
        "How settings are proposed: optuna learns from the trials before.",
        "TPE needs fewer trials than chance",
    )
    scheduler: Literal["asha", "hyperband", "median", "pbt", "none"] = field(
        "asha", "Which trials are stopped early.", "spends the epochs on what looks good"
    )
    grace_epochs: int | None = field(None, "Epochs each trial gets at least.", "a quarter of the epochs", ge=1)
    reduction: int = field(3, "One in so many trials survives each rung.", "Li et al. 2020 use 3 or 4", ge=2, le=16)
    concurrent: int | None = field(None, "Trials at once.", "what the pool holds", ge=1, le=1024)
    trials_per_gpu: int = field(1, "Trials of one worker that share a GPU.", "a GPU each", ge=1, le=16)
    time_limit: float | None = field(None, "Hours after which no trial goes on; the best of what there is counts.",
                                     "no limit", gt=0)  # fmt: skip
    points: tuple[dict[str, Any], ...] = field((), "Settings to try first, beside the defaults.", "none")
    warm_from: str | None = field(None, "A past sweep, by name or place, whose results the search knows.", "none")
    refit: bool = field(False, "Train the best settings once more, on the training and validation images.", "off")

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        if not self.objectives:
            raise ValueError("sweep.objectives: name at least one, as in {top1: max}")
        if self.scheduler == "pbt" and self.search == "grid":
            raise ValueError("sweep.search: pbt changes settings as it goes and cannot keep to a grid; use random")
        return self

    @property
    def objective(self) -> tuple[str, str]:
        """The first objective, as (metric, `max` or `min`)."""
        return next(iter(self.objectives.items()))

    def rungs(self, epochs: int) -> tuple[int, ...]:
        """The epochs at which trials of `epochs` epochs are compared, ascending, without the last epoch.

        They are grace, grace x reduction, … (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning").
        """
        grace = min(self.grace_epochs or 1, epochs)
        count = int(math.log(epochs / grace) / math.log(self.reduction) + 1)
        return tuple(rung for rung in (grace * self.reduction**number for number in range(count)) if rung < epochs)
