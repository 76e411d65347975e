"""The best settings of a sweep once more, on the training and the validation images together.

What this model makes of the validation images says nothing, since it has seen them: only a test split measures it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from launcher.runs import Run, State, Status, checkpoint_steps
from launcher.spec import Spec
from trainers import checkpoint, report
from trainers.data.index import Index
from trainers.fit import fit
from trainers.resume import first_weights

SEEN = "the validation images are among the training images: figures on them are not held-out figures"


def refit(sweep: Run, best: Spec, plan: dict[str, Any], attempt: int, began: float) -> dict[str, Any]:
    """Trains in `refit/` of the sweep; what it came to, with `seen` where it could only be measured on seen images.

    `best` is the spec of the best trial, `plan` its plan. Called again it goes on from its checkpoint.
    """
    run = Run(sweep.uri, "refit", home=sweep)
    spec = best.updated({"train.early_stop": 0}).model_copy(update={"name": "refit", "storage": sweep.uri})
    run.write_json("spec.json", spec.model_dump(mode="json"))
    run.write_json("plan.json", {**plan, "warnings": [SEEN, *plan.get("warnings", [])]})
    if not checkpoint_steps(run.store):
        whole(Index.load(sweep.store)).save(run.store)
        first = checkpoint.load(first_weights(sweep, spec), 0)
        checkpoint.save(run.store, replace(first, fingerprint=spec.fingerprint()))
    state = State(Status.RUNNING, created=time.time(), started=time.time(), attempt=attempt)
    run.set_state(state)
    if fit(run, spec, attempt, began) != "finished":
        run.set_state(replace(state, status=Status.CANCELLED, ended=time.time()))
        return {}
    final = run.figures()
    state = replace(state, status=Status.SUCCEEDED, ended=time.time(), result=final)
    report.write(run, state)
    run.set_state(state)
    return {"uri": run.uri, "seen": final["split"] == "val", **final}


def whole(index: Index) -> Index:
    """The index with the validation images among the training images too; as such they stay, to be looked at."""
    import pyarrow as pa
    import pyarrow.compute as pc

    seen = index.table.filter(pc.equal(index.table["split"], "val"))
    column = seen.schema.get_field_index("split")
    more = seen.set_column(column, seen.schema.field(column), pa.array(["train"] * len(seen), pa.string()))
    return Index(index.uri, index.classes, pa.concat_tables([index.table, more]).combine_chunks(), index.ignored)
