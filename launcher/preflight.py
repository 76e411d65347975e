"""What is found out before anything starts: where things are, what the data holds, and so what the plan is.

It reads the spec's data and the machine; it writes nothing and starts nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from launcher import catalog
from launcher.errors import LaunchError, UserError
from launcher.plan import Choice, Plan, resolve
from launcher.pools import Pool
from launcher.runs import Run, default_storage, find
from launcher.schedule import Speed, schedule
from launcher.space import Sweep
from launcher.spec import RESUMABLE, Spec, resumable, valid_name
from launcher.specfile import Draft
from launcher.storage import open_store
from launcher.sweeps import Ledger

if TYPE_CHECKING:
    from trainers.data.index import Index

MOST_LOOKED_AT = 30
_SPEED_FIELDS = ("model.name", "data.image_size", "resources.node_type", "resources.workers",
                 "resources.gpus_per_worker", "train.precision", "train.compile")  # fmt: skip
"""What decides how fast a trial is, beside the pool and the cores."""


def whole(place: str) -> str:
    """A folder as an absolute path; an address (`s3://…`) as it is."""
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


def prepare(draft: Draft, pool: Pool) -> tuple[Plan, Index | None]:
    """The plan for a new run, and the index it was made from (None for a sample, which the driver indexes)."""
    spec = _with_whole_places(draft.spec())
    usual = pool.site.storage if pool.site else whole(default_storage())
    if pool.site:
        _check_reach(spec, pool.name)
    if spec.name:
        # Said before a bucket is listed, not after; `Run.create` decides.
        run = Run(spec.storage or usual, spec.name)
        if run.exists():
            raise run.taken()
    spec = _with_past_sweep(spec, spec.storage or usual)
    defaults = {"name": _new_name(spec.data.uri), "storage": usual}
    made = partial(resolve, spec, pool, given=draft.origin, defaults=defaults, model_facts=catalog.model_facts)
    if spec.sweep:
        made(facts={})  # what is wrong whatever the data hold is said before it is looked at
    index, facts = _look_at_data(spec)
    plan = made(facts=facts)
    weights = plan.spec.model.pretrained or "none"
    if weights not in ("hub", "none") and "://" not in weights and not Path(weights).is_file():
        raise UserError("there is no such weights file", where=f"model.pretrained {weights}",
                        hint="--pretrained hub, none, or a .safetensors or .pth file")  # fmt: skip
    return with_speed(plan), index


def prepare_resume(run: Run, draft: Draft, pool: Pool) -> tuple[Plan, dict[str, tuple[Any, Any]]]:
    """The plan for going on with `run` under the changes in `draft`, and what they are: (before, after) by field.

    Raises `UserError` for a change that would alter what was trained already.
    """
    # A run directory may have been moved: where it lies now is where it goes on.
    old = run.spec().flat() | {"storage": run.storage}
    given = dict(draft.origin)
    draft.sweep = run.spec().sweep is not None
    if not draft.sweep and (foreign := [key for key in draft.values if key.startswith("sweep.")]):
        raise UserError(f"{run.name} is a single training, not a sweep", where=given.get(foreign[0], foreign[0]),
                        hint="launch sweep begins one")  # fmt: skip
    draft.values = old | draft.values
    _open_what_follows(run, draft)
    # A grid has as many trials as it was given when it began.
    given |= {"sweep.trials": given.get("sweep.trials", "")} if draft.sweep else {}
    plan = resolve(draft.spec(), pool, facts=run.plan().get("facts", {}), given=given,
                   defaults={"name": run.name, "storage": run.storage}, model_facts=catalog.model_facts,
                   spent=run.spent())  # fmt: skip
    new = plan.spec.flat()
    changes = {key: (old[key], new[key]) for key in new if old[key] != new[key]}
    refused = [key for key in changes if not resumable(key) or key == "storage"]
    if refused:
        lines = "\n".join(f"  {key}: {old[key]} -> {new[key]}" for key in refused)
        allowed = ", ".join(key.rstrip(".") for key in RESUMABLE if key != "storage")
        raise UserError(f"a resumed run cannot change this:\n{lines}", where=run.name,
                        hint=f"launch a new run, or change only {allowed}")  # fmt: skip
    if new["train.epochs"] < old["train.epochs"]:
        raise UserError(f"a run cannot become shorter: {old['train.epochs']} -> {new['train.epochs']} epochs",
                        where=given.get("train.epochs", "train.epochs"), hint="launch a new run")  # fmt: skip
    if plan.spec.sweep is not None:
        _check_extended(run, plan.spec.sweep, changes)
    reasons = run.plan().get("searched", plan.searched)
    return replace(plan, choices=_remembered(run, plan, changes), searched=reasons), changes


def _open_what_follows(run: Run, draft: Draft) -> None:
    """Hands back to the plan what it chose itself and what depends on a change: cores, and trials at once."""
    chosen = {choice["key"] for choice in run.plan().get("choices", []) if choice["source"] == "chosen"}
    following = {
        "resources.cpus_per_worker": ("resources.workers", "sweep.concurrent", "sweep.trials_per_gpu", "sweep.trials"),
        "sweep.concurrent": ("resources.workers", "sweep.trials_per_gpu", "sweep.trials"),
    }
    for key, causes in following.items():
        changed = any(cause in draft.origin for cause in causes)
        if changed and key not in draft.origin and (key in chosen or "resources.workers" in draft.origin):
            draft.values[key] = None


def _check_extended(run: Run, sweep: Sweep, changes: Mapping[str, Any]) -> None:
    """Raises `UserError` for changes that would leave trials out, or make them unlike."""
    existing = len(Ledger.load(run).trials)
    if sweep.trials < existing:
        raise UserError(f"the sweep has {existing} trials already, and cannot have {sweep.trials}",
                        where="sweep.trials", hint=f"--trials {existing} or more")  # fmt: skip
    if "train.epochs" in changes:
        before, after = changes["train.epochs"]
        raise UserError(f"the trials of a sweep are all of one length: {before} -> {after} epochs",
                        where="train.epochs", hint="launch a new sweep with --warm-from " + run.name)  # fmt: skip


def _with_past_sweep(spec: Spec, storage: str) -> Spec:
    """The sweep's `warm_from` as a whole place, which is one of a past sweep."""
    past = spec.sweep.warm_from if spec.sweep else None
    if past is None:
        return spec
    run = Run.at(whole(past)) if "/" in past else find(storage, past)
    if not run.exists():
        raise UserError("there is no such sweep", where=f"sweep.warm_from {past}",
                        hint="the name of one in the same storage, or the place of its folder")  # fmt: skip
    if run.spec().sweep is None:
        raise UserError(f"{run.name} is a single training, not a sweep", where="sweep.warm_from",
                        hint="launch list shows all")  # fmt: skip
    if not Ledger.load(run).ranked():
        raise UserError(f"no trial of {run.name} has a result yet", where="sweep.warm_from", hint="leave it out")
    return spec.updated({"sweep.warm_from": run.uri})


def with_speed(plan: Plan) -> Plan:
    """The plan of a sweep, with hours and cost if the storage holds an earlier run of the same kind."""
    if plan.spec.sweep is None:
        return plan
    runs = open_store(plan.spec.storage or "").folders()
    # Of many runs the last ones by name, which mostly ends in a date, are looked at: each costs a few requests.
    recent = [Run(plan.spec.storage or "", name) for name in sorted(runs)[-MOST_LOOKED_AT:] if valid_name(name)]
    speed = next((found for run in reversed(recent) if (found := _speed(run, plan))), None)
    images = plan.facts.get("train")
    return replace(plan, schedule=schedule(plan.spec, plan.layout, images, speed)) if speed else plan


def _speed(run: Run, plan: Plan) -> Speed | None:
    """How fast a run was, if it had the model, image size, pool and workers of the plan, and went through an epoch."""
    try:
        spec, past = run.spec(), run.plan()
        images = (past.get("facts") or {}).get("train")
        same = all(spec.flat()[key] == plan.spec.flat()[key] for key in _SPEED_FIELDS)
        if not images or not same or past.get("pool") != plan.pool.name:
            return None
        if spec.sweep is not None:
            trial = next((trial for trial in Ledger.load(run).trials if trial.epochs), None)
            each = trial.epochs[-1]["seconds"] / len(trial.epochs) if trial else None
        else:
            epochs = run.metrics().get("epochs", [])
            each = median(epoch["seconds"] + epoch["eval_seconds"] for epoch in epochs) if epochs else None
    except (LaunchError, KeyError):  # what cannot be read says nothing
        return None
    if not each:
        return None
    # Trials that share a GPU, or have fewer cores without one, are slower in proportion.
    if spec.resources.gpus_per_worker:
        slower = _sharing(plan.spec) / _sharing(spec)
    else:
        slower = (spec.resources.cpus_per_worker or 1) / (plan.spec.resources.cpus_per_worker or 1)
    return Speed(run.name, each / images * slower)


def _sharing(spec: Spec) -> int:
    return spec.sweep.trials_per_gpu if spec.sweep else 1


def _remembered(run: Run, plan: Plan, changes: Mapping[str, Any]) -> tuple[Choice, ...]:
    """The plan's choices, of which those that did not change keep the reason they were once made for."""
    past = {choice["key"]: Choice(**choice) for choice in run.plan().get("choices", [])}
    return tuple(choice if choice.key in changes else past.get(choice.key, choice) for choice in plan.choices)


def _with_whole_places(spec: Spec) -> Spec:
    """The run may be resumed from another folder, so paths do not depend on this one."""
    places = {"data.uri": spec.data.uri, "storage": spec.storage, "model.pretrained": spec.model.pretrained}
    return spec.updated({key: whole(place) for key, place in places.items() if place and place not in ("hub", "none")})


def _check_reach(spec: Spec, pool: str) -> None:
    """Raises `UserError` for what lies on this machine, where the pods of a pool cannot see it."""
    weights = spec.model.pretrained if spec.model.pretrained not in ("hub", "none") else None
    for key, place in (("data.uri", spec.data.uri), ("storage", spec.storage), ("model.pretrained", weights)):
        if place and "://" not in place:
            raise UserError(f"{pool} cannot see {place}, which is on this machine", where=key,
                            hint=f"copy it to S3 (aws s3 sync {place} s3://…), or leave --cluster out")  # fmt: skip


def _look_at_data(spec: Spec) -> tuple[Index | None, dict[str, Any]]:
    if spec.data.uri.startswith("sample://") and not (spec.data.classes or spec.data.val_split):
        from trainers.data.sample import sample_facts

        return None, sample_facts(spec.data.uri.removeprefix("sample://"), spec.data.val_fraction)
    from trainers.data.index import build_index

    index = build_index(spec.data)
    return index, index.facts()


def _new_name(uri: str) -> str:
    """A name from the data's own and the time: unique enough, and short enough to type."""
    last = uri.rstrip("/").rpartition("/")[2].partition(".")[0].lower()
    slug = re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:24].strip("-")
    if not slug[:1].isalpha():
        slug = f"run-{slug}".rstrip("-")
    return f"{slug}-{datetime.now():%m%d-%H%M%S}"
