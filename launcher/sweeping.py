"""What a sweep may search: its space, points and objectives, checked against the spec's own types before anything
starts. No I/O but timm's list of models, where a sweep searches them."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from launcher import catalog
from launcher.errors import UserError, nearest
from launcher.section import complaint
from launcher.space import Domain, Sweep, grid, ordered
from launcher.spec import Spec, fields, unknown
from launcher.sweeps import METRICS

Problem = tuple[str, str]
"""The dotted place of a mistake, and what it is."""

MOST_GRID = 10_000
TRIED = 200
"""Combinations with other fields that are tried before a value counts as impossible."""

_SHARED = {
    "name": "belongs to the sweep as a whole",
    "storage": "belongs to the sweep as a whole",
    "sweep.": "is a setting of the sweep itself",
    "resources.": "must be the same for all trials, since they share their pods; set it once, outside the space",
    "limits.": "is a clock of the whole sweep; set it once, outside the space",
    "checkpoint.": "changes no result; set it once, outside the space",
    "data.uri": "must be the same for all trials, or they could not be compared; launch a sweep for each",
    "data.val_fraction": "must be the same for all trials, or they could not be compared; launch a sweep for each",
    "data.val_split": "must be the same for all trials, or they could not be compared; launch a sweep for each",
    "data.classes": "must be the same for all trials, or they could not be compared; launch a sweep for each",
    "data.max_bad_fraction": "changes no result; set it once, outside the space",
    "data.cache_gb": "changes no result; set it once, outside the space",
    "data.pixels_gb": "changes no result; set it once, outside the space",
}
"""Fields, or sections, that no sweep searches, and why."""

_MUTABLE = ("optim.", "augment.", "model.drop_rate", "model.drop_path_rate")


def mutable(key: str) -> bool:
    """Whether a field may change while a model trains."""
    return key.startswith(_MUTABLE)


def check(spec: Spec) -> None:
    """Raises `UserError` with everything that is wrong with the sweep of a spec."""
    found = problems_of(spec)
    if found:
        count = f"{len(found)} mistakes" if len(found) > 1 else "a mistake"
        raise UserError(f"{count} in the sweep:\n" + "\n".join(f"  {place}: {what}" for place, what in found),
                        hint="launch schema prints every field")  # fmt: skip


def problems_of(spec: Spec) -> list[Problem]:
    """Everything that is wrong with the sweep of a spec, in the order of its fields; nothing for a single training."""
    sweep = spec.sweep
    if sweep is None:
        return []
    return [
        *_space_problems(spec, sweep), *_objective_problems(sweep), *_rules(sweep), *_point_problems(spec, sweep)
    ]  # fmt: skip


def grid_size(space: Mapping[str, Domain]) -> int:
    """How many trials a grid has; `UserError` if nobody could want so many."""
    size = sum(1 for _ in islice(grid(space), MOST_GRID + 1))
    if size > MOST_GRID:
        raise UserError(f"the grid has more than {MOST_GRID:,} combinations", where="sweep.space",
                        hint="fewer values or fields, or --search optuna")  # fmt: skip
    return size


# -- the space


def _space_problems(spec: Spec, sweep: Sweep) -> Iterator[Problem]:
    space = sweep.space
    if space is None:
        return
    if not space:
        yield "sweep.space", "names no field; leave it out for the default space"
    known = {key: domain for key, domain in space.items() if not _refusal(key, sweep)}
    for key, domain in space.items():
        place = f"sweep.space.{key}"
        if refusal := _refusal(key, sweep):
            yield place, refusal
            continue
        if conditions := list(_when_problems(key, domain, space)):
            yield from ((f"{place}.when", what) for what in conditions)
            continue
        yield from ((place, what) for what in _domain_problems(spec, key, domain, known))


def _refusal(key: str, sweep: Sweep) -> str:
    """Why a field cannot be searched."""
    if key not in fields():
        return unknown(key)
    for shared, why in _SHARED.items():
        if key == shared or (shared.endswith(".") and key.startswith(shared)):
            return why
    if key == "train.epochs" and sweep.scheduler != "none":
        return f"{sweep.scheduler} compares trials epoch by epoch, so all need as many; search it with scheduler none"
    if sweep.scheduler == "pbt" and not mutable(key):
        return "cannot change while a model trains, as pbt would; search it with another scheduler"
    return ""


def _when_problems(key: str, domain: Domain, space: Mapping[str, Domain]) -> Iterator[str]:
    for other, wanted in (domain.when or {}).items():
        values = wanted if isinstance(wanted, list) else [wanted]
        if other not in space:
            close = nearest(other, space)
            yield f"{other} is not searched" + (f"; {close}" if close else "")
        elif not values:
            yield f"{other} needs a value or more"
        else:
            foreign = [value for value in values if not space[other].holds(value)]
            yield from (f"{shown(value)} is not a value of {other} ({space[other].describe()})" for value in foreign)
    if set(domain.when or {}) <= set(space) and key not in ordered(space):
        yield "these conditions go in a circle"


def _domain_problems(spec: Spec, key: str, domain: Domain, space: Mapping[str, Domain]) -> Iterator[str]:
    sweep, kinds = spec.sweep, _kinds(key)
    assert sweep is not None
    if sweep.search == "grid" and not domain.finite:
        yield f"a grid needs a list of values, not a {domain.kind}: use grid or choice, or --search optuna"
    if int in kinds and float not in kinds and (words := _not_whole(domain)):
        yield words
        return
    if key == "model.name":
        yield from _model_problems(spec, domain)
    for value in _probes(key, domain):
        if value is None:
            yield "null leaves the field open; name a value"
        elif key == "model.pretrained" and value not in ("hub", "none"):
            yield f"{shown(value)}: only hub and none can be searched; launch a sweep for each weights file"
        else:
            yield from _value_problems(spec, key, value, space)


def _not_whole(domain: Domain) -> str:
    if domain.kind in ("loguniform", "uniform"):
        return "takes whole numbers: use randint or choice"
    if domain.quniform is not None and not (domain.values[0].is_integer() and domain.values[2].is_integer()):
        return "takes whole numbers: begin at one, and use a whole step"
    return ""


def _probes(key: str, domain: Domain) -> list[Any]:
    """The values that must be valid for all of the domain to be: its list, or the ends of its range."""
    if domain.finite:
        return list(domain.values)
    least, most = domain.values[:2]
    if domain.quniform is not None:
        most = least + int((most - least) / domain.values[2] + 1e-9) * domain.values[2]
    return [int(end) if int in _kinds(key) and float(end).is_integer() else end for end in (least, most)]


def _value_problems(spec: Spec, key: str, value: Any, space: Mapping[str, Domain]) -> Iterator[str]:
    """What the spec says of the value, among the settings it can stand beside."""
    plain = spec.model_copy(update={"sweep": None})
    condition = _condition(key, space)
    errors = _errors(plain, {**condition, key: value})
    if not errors:
        return
    own = [item for item in errors if _of(item, key)]
    if own:
        yield f"{shown(value)} {_words(key, own[0])}"
        return
    # A rule between fields: the value will do if some setting of the others makes it valid.
    others = {other: domain for other, domain in space.items() if other != key and other not in condition}
    beside = ({other: setting} for other, domain in others.items() for setting in _probes(other, domain))
    if all(_errors(plain, {**condition, **setting, key: value}) for setting in islice(beside, TRIED)):
        yield f"{shown(value)}: {complaint(errors[0])}"


def _condition(key: str, space: Mapping[str, Domain]) -> dict[str, Any]:
    """Settings under which the field is searched."""
    settings: dict[str, Any] = {}
    for other, wanted in (space[key].when or {}).items():
        if other in space:
            settings |= {**_condition(other, space), other: wanted[0] if isinstance(wanted, list) else wanted}
    return settings


def _errors(spec: Spec, changes: dict[str, Any]) -> list[Any]:
    try:
        spec.updated(changes)
    except ValidationError as error:
        return list(error.errors(include_url=False))
    return []


def _of(item: Any, key: str) -> bool:
    return ".".join(str(part) for part in item["loc"]).startswith(key)


def _words(key: str, item: Any) -> str:
    if item["type"] == "literal_error":
        return f"is not one of {', '.join(str(choice) for choice in _choices(key))}"
    words = complaint(item)
    return words if words.startswith("should") else f"is not valid: {words}"


def _kinds(key: str) -> tuple[Any, ...]:
    """The types that a field takes."""
    annotation = fields()[key].annotation
    return get_args(annotation) if get_origin(annotation) in (types.UnionType, Union) else (annotation,)


def _choices(key: str) -> tuple[Any, ...]:
    return next((get_args(kind) for kind in _kinds(key) if get_origin(kind) is Literal), ())


def _model_problems(spec: Spec, domain: Domain) -> Iterator[str]:
    """What timm, where it is installed, says of the models: that it has them, and what they start from."""
    searched = (spec.sweep.space if spec.sweep else None) or {}
    for name in domain.values if domain.finite else ():
        try:
            facts = catalog.model_facts(str(name))
        except UserError as error:
            yield error.what
            continue
        if facts and not facts["weights"] and spec.model.pretrained in (None, "hub"):
            yield f"timm has no weights for {name}; leave it out, or train all of them anew (--pretrained none)"
        size = spec.data.image_size
        if facts.get("fixed") and "data.image_size" not in searched and size not in (None, facts["size"]):
            yield f"{name} takes images of {facts['size']} pixels only, and the trials have {size}"


# -- what is searched for, and what goes together


def _objective_problems(sweep: Sweep) -> Iterator[Problem]:
    for metric in sweep.objectives:
        if metric not in METRICS:
            close = nearest(metric, METRICS) or f"there are {', '.join(METRICS)}"
            yield f"sweep.objectives.{metric}", f"is not reported; {close}"


def _rules(sweep: Sweep) -> Iterator[Problem]:
    if len(sweep.objectives) > 1 and sweep.search == "grid":
        yield "sweep.search", "several objectives need optuna or random"
    if sweep.points and sweep.search == "grid":
        yield "sweep.points", "a grid tries all its values anyway; leave the points out"
    if sweep.scheduler == "pbt" and 1 in (sweep.trials, sweep.concurrent):
        yield "sweep.scheduler", "pbt copies what runs beside does better: it needs 2 trials at once, or another one"


def _point_problems(spec: Spec, sweep: Sweep) -> Iterator[Problem]:
    space = sweep.space
    plain = spec.model_copy(update={"sweep": None})
    for number, point in enumerate(sweep.points, 1):
        for key, value in point.items():
            place = f"sweep.points.{number}.{key}"
            if refusal := _refusal(key, sweep):
                yield place, refusal
            elif space is not None and key not in space:
                yield place, f"is not searched; the space has {', '.join(space)}"
            elif own := [item for item in _errors(plain, {key: value}) if _of(item, key)]:
                yield place, f"{shown(value)} {_words(key, own[0])}"
            elif space is not None and not space[key].holds(value):
                yield place, f"{shown(value)} is not in the space ({space[key].describe()})"
        if space is not None:
            values = spec.flat() | point
            idle = [key for key in point if key in space and not _may_apply(space[key], values)]
            yield from ((f"sweep.points.{number}.{key}", f"counts only when {_whens(space[key])}") for key in idle)


def _may_apply(domain: Domain, values: Mapping[str, Any]) -> bool:
    """Whether values allow the field; those that are still open may."""
    known = {key: wanted for key, wanted in (domain.when or {}).items() if values.get(key) is not None}
    return domain.model_copy(update={"when": known}).applies(values)


def _whens(domain: Domain) -> str:
    return " and ".join(f"{key} is {shown(wanted)}" for key, wanted in (domain.when or {}).items())


def shown(value: Any) -> str:
    """A value as it stands in messages."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
