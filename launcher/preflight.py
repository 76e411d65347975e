"""What is found out before anything starts: where things are, what the data holds, and so what the plan is.

It reads the spec's data and the machine; it writes nothing and starts nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import catalog
from launcher.errors import UserError
from launcher.plan import Choice, Plan, resolve
from launcher.pools import Pool
from launcher.runs import Run, default_storage
from launcher.spec import RESUMABLE, Spec, resumable
from launcher.specfile import Draft

if TYPE_CHECKING:
    from trainers.data.index import Index


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
    index, facts = _look_at_data(spec)
    defaults = {"name": _new_name(spec.data.uri), "storage": usual}
    plan = resolve(spec, pool, facts=facts, given=draft.origin, defaults=defaults, model_facts=catalog.model_facts)
    weights = plan.spec.model.pretrained or "none"
    if weights not in ("hub", "none") and "://" not in weights and not Path(weights).is_file():
        raise UserError("there is no such weights file", where=f"model.pretrained {weights}",
                        hint="--pretrained hub, none, or a .safetensors or .pth file")  # fmt: skip
    return plan, index


def prepare_resume(run: Run, draft: Draft, pool: Pool) -> tuple[Plan, dict[str, tuple[Any, Any]]]:
    """The plan for going on with `run` under the changes in `draft`, and what they are: (before, after) by field.

    Raises `UserError` for a change that would alter what was trained already.
    """
    # A run directory may have been moved: where it lies now is where it goes on.
    old = run.spec().flat() | {"storage": run.storage}
    given = dict(draft.origin)
    draft.values = old | draft.values
    if "resources.workers" in given and "resources.cpus_per_worker" not in given:
        draft.values["resources.cpus_per_worker"] = None
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
    return replace(plan, choices=_remembered(run, plan, changes)), changes


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
