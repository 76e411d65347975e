"""What of a trainer a checkpoint holds, and how a trainer takes it up again.

On a CPU, and at the same world size, what follows is bit for bit what would have followed without the interruption.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from launcher.errors import SiteError
from launcher.runs import Run
from launcher.spec import Spec
from launcher.storage import Store
from trainers.checkpoint import Snapshot, load, load_latest

if TYPE_CHECKING:
    from trainers.worker import Trainer

log = logging.getLogger(__name__)


def capture(trainer: Trainer) -> Snapshot | None:
    """The state of all ranks, copied to the host, on rank 0; None on the others. Every rank must call it."""
    norms = _copies(trainer.norm_buffers())
    ranks = trainer.team.gather((norms, trainer.meter.state()))
    if trainer.team.rank != 0:
        return None
    states = {name: trainer.optimizer.state.get(weight, {}) for name, weight in trainer.model.named_parameters()}
    momentum = {name: state["momentum_buffer"] for name, state in states.items() if "momentum_buffer" in state}
    tensors = {"weights": _copies(trainer.model.state_dict()), "optimizer": _copies(momentum)}
    if trainer.ema is not None:
        tensors["ema"] = _copies(trainer.ema.module.state_dict())
    # The statistics of batch norm differ between ranks within an epoch; each rank gets its own back.
    tensors["norms"] = {key: torch.stack([norms[key] for norms, _ in ranks]) for key in norms}
    values = {
        "epochs": trainer.epochs, "world": trainer.team.world, "meters": [meter for _, meter in ranks],
        "seconds": trainer.seconds, "scaler": trainer.scaler.state_dict(), "spec": trainer.spec.model_dump(mode="json"),
    }  # fmt: skip
    return Snapshot(trainer.step, trainer.spec.fingerprint(), tensors, values)


def restore(trainer: Trainer) -> None:
    """Puts a new trainer where the newest whole checkpoint of its run was made.

    Another world size is allowed: the ranks then begin with the mean of the statistics of batch norm.
    """
    run = trainer.run
    snapshot = load_latest(run.store, lambda what: log.warning("skipped a checkpoint: %s", what))
    if snapshot is None and run.home is not run:
        # All trials with the same model begin with the weights that their sweep has fetched once.
        first = load(first_weights(run.home, trainer.spec), 0)
        snapshot = replace(first, fingerprint=trainer.spec.fingerprint())
    if snapshot is None:
        raise SiteError("no whole checkpoint is left, not even the first", where=run.uri, hint="launch a new run")
    if snapshot.fingerprint != trainer.spec.fingerprint():
        raise SiteError("the newest checkpoint was made by another spec", where=f"{run.uri}/spec.json",
                        hint="it was edited by hand: restore it, or launch a new run")  # fmt: skip
    trainer.model.load_state_dict(snapshot.tensors["weights"])
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(snapshot.tensors.get("ema", snapshot.tensors["weights"]))
    if snapshot.step == 0:
        return
    values = snapshot.values
    same = values["world"] == trainer.team.world
    for key, buffer in trainer.norm_buffers().items():
        rows = snapshot.tensors["norms"][key]
        buffer.copy_(rows[trainer.team.rank] if same else rows.mean(0))
    for name, weight in trainer.model.named_parameters():
        if name in snapshot.tensors["optimizer"]:
            # In the weight's own memory layout, so that NHWC stays NHWC.
            momentum = torch.empty_like(weight).copy_(snapshot.tensors["optimizer"][name])
            trainer.optimizer.state[weight]["momentum_buffer"] = momentum
    trainer.step, trainer.epochs, trainer.seconds = snapshot.step, values["epochs"], values["seconds"]
    trainer.meter.restore(values["meters"], trainer.team.rank, same=same)
    trainer.scaler.load_state_dict(values["scaler"])


def first_weights(home: Run, spec: Spec) -> Store:
    """Where a sweep keeps the weights that its trials of this model begin with."""
    return home.store.child("initial/" + re.sub(r"[^A-Za-z0-9_.-]", "_", spec.model.name or ""))


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the host, which training does not change any more."""
    return {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
