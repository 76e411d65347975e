"""One trial of a sweep as Ray Tune sees it: a `Trainable` of which each step is an epoch.

A trial of one worker trains in Tune's actor itself, and waits there for the verdict on each epoch. One of several
workers is a Ray Train run of its own, which trains on meanwhile and is asked to stop. Both begin at the newest whole
checkpoint of the trial, so a trial that lost its actor, its node or its driver goes on where it was.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ray.tune import PlacementGroupFactory, Trainable

from launcher.errors import DataError, InfrastructureError, LaunchError, NonFiniteLossError, SiteError
from launcher.runs import Run
from launcher.space import Sweep
from launcher.spec import Spec
from launcher.storage import open_store

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
"""How often a trial of several workers is asked for its next epoch."""
TOLD = "epochs"
"""The file that is all of a paused trial that Tune keeps: how many of its epochs Tune knows."""
STOP_SECONDS = 120.0
"""A trial of several workers that has not stopped by then is left to Ray."""


def trial_spec(spec: Spec, settings: dict[str, Any], run: Run) -> Spec:
    """The spec of a trial: that of the sweep with the trial's settings, and without the search."""
    mine = spec.updated(settings)
    return mine.model_copy(update={"sweep": None, "name": f"trial-{run.name}", "storage": run.storage})


def starts(spec: Spec) -> list[Spec]:
    """The sweep's spec once for each network that a trial may begin with."""
    domain = (spec.sweep.space or {}).get("model.name") if spec.sweep else None
    names = dict.fromkeys([spec.model.name, *(domain.values if domain else ())])
    return [spec.updated({"model.name": name}) for name in names]


def resources(spec: Spec) -> PlacementGroupFactory:
    """What Tune books for a trial: all that it needs, or for one of several workers, which Ray Train books, a slot."""
    each, sweep = spec.resources, spec.sweep or Sweep()
    if (each.workers or 1) > 1:
        return PlacementGroupFactory([{"trial": 1.0}])
    gpus = (each.gpus_per_worker or 0) / sweep.trials_per_gpu
    return PlacementGroupFactory([{"CPU": float(each.cpus_per_worker or 1)} | ({"GPU": gpus} if gpus else {})])


class Player(Protocol):
    """What carries a trial out."""

    def epoch(self) -> dict[str, Any] | None:
        """The record of the next epoch; None if the trial was asked to stop, or has no epoch left."""

    def complete(self) -> bool:
        """Whether no epoch is left."""

    def save(self, folder: str) -> None:
        """Copies the state after the last epoch to a folder."""

    def rest(self) -> int:
        """Makes sure that the trial can go on from the end of the last epoch; how many epochs have been told."""

    def close(self) -> None:
        """Stops, and gives everything back."""


class TrialActor(Trainable):  # type: ignore[misc]
    """See the module. `config` has the sweep's URI and attempt, the trial's number and settings."""

    def setup(self, config: dict[str, Any]) -> None:
        self._sweep, self._number, self._attempt = Run.at(config["sweep"]), config["number"], config["attempt"]
        self._settings = config["settings"]
        # Epochs that Tune knows of; a trial that was lost tells those of its checkpoint again.
        self._known = 0
        self._player: Player | None = None

    def step(self) -> dict[str, Any]:
        """An epoch's figures, with `done` after the last; a failure that is the trial's own is a result too."""
        try:
            return self._epoch()
        except BaseException as raised:
            from trainers.guards import classify

            log.exception("trial %d ends here", self._number)
            error = classify(raised)
            try:
                self.cleanup()
            except Exception:  # that it failed is known already
                log.exception("trial %d could not be ended cleanly", self._number)
            if isinstance(error, InfrastructureError):
                raise error from raised
            return {"done": True, "error": error.to_record(), "fatal": _concerns_all(error)}

    def _epoch(self) -> dict[str, Any]:
        if self._player is None:
            self._player = self._open()
        record = self._player.epoch()
        if record is None:
            return {"done": True, "over": "complete" if self._player.complete() else "asked"}
        return {**_figures(record), "settings": json.dumps(self._settings), "done": self._player.complete()}

    def _open(self) -> Player:
        run = self._sweep.trial(self._number)
        spec = trial_spec(self._sweep.spec(), self._settings, run)
        run.write_json("spec.json", spec.model_dump(mode="json"))
        several = (spec.resources.workers or 1) > 1
        return (Group if several else Alone)(run, spec, self._attempt, self._known)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """For PBT, which copies it to other trials; the other schedulers save what they pause, to go on with it."""
        assert self._player is not None, "Tune saves after an epoch"
        if (self._sweep.spec().sweep or Sweep()).scheduler == "pbt":
            self._player.save(checkpoint_dir)
            return
        # The state is in the trial's own directory, where another process may take it up at once.
        Path(checkpoint_dir, TOLD).write_text(str(self._player.rest()))
        self.cleanup()

    def load_checkpoint(self, checkpoint: str) -> None:
        """Goes on where this trial was paused, or where another was saved (PBT)."""
        from trainers.checkpoint import folder, load_latest, save

        told = Path(checkpoint, TOLD)
        if told.exists():
            self._known = int(told.read_text())
            return
        snapshot = load_latest(open_store(checkpoint), lambda what: log.warning("skipped a checkpoint: %s", what))
        if snapshot is None:
            return
        self.cleanup()
        run = self._sweep.trial(self._number)
        mine = trial_spec(self._sweep.spec(), self._settings, run)
        save(run.store, replace(snapshot, fingerprint=mine.fingerprint()))
        for entry in list(run.store.list("checkpoints/step-")):
            if not entry.key.startswith(folder(snapshot.step)):
                run.store.delete(entry.key)
        run.write_json("metrics.json", {"schema": 1, "epochs": snapshot.values["epochs"]})
        self._known = len(snapshot.values["epochs"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in the same process, which saves loading torch anew."""
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        player, self._player = self._player, None
        if player is not None:
            player.close()
            del player
            gc.collect()


def _concerns_all(error: LaunchError) -> bool:
    """Whether every other trial would fail alike: data and site are the same for all; memory depends on the settings,
    and so does a loss that is not finite."""
    own = isinstance(error, NonFiniteLossError) or error.where == "train.batch_size"
    return isinstance(error, (DataError, SiteError)) and not own


def _figures(record: dict[str, Any]) -> dict[str, Any]:
    """An epoch's record with the validation figures beside the others."""
    kept = ("epoch", "step", "lr", "train_loss", "train_top1", "images_per_second", "data_wait", "parameters")
    own = {key: record[key] for key in kept if key in record}
    return own | {"seconds": record["total_seconds"]} | {key: float(value) for key, value in record["val"].items()}


def _seconds(epochs: list[dict[str, Any]]) -> float:
    return float(sum(epoch["seconds"] + epoch["eval_seconds"] for epoch in epochs))


@functools.lru_cache(maxsize=1)
def _index(sweep_uri: str) -> Any:
    """All trials in a process read the index once."""
    from trainers.data.index import Index

    return Index.load(Run.at(sweep_uri).store)


class Alone:
    """A trial of one worker, in this process. `known` epochs have been told to Tune before."""

    def __init__(self, run: Run, spec: Spec, attempt: int, known: int) -> None:  # noqa: ARG002 - as Group
        from trainers.guards import Team
        from trainers.ranklog import rank_log
        from trainers.worker import Trainer

        self._run, self._open = run, ExitStack()
        self._open.enter_context(rank_log(run, 0))
        try:
            fence = functools.partial(run.home.check_attempt, attempt)
            self.trainer = Trainer(run, Team(), time.time(), fence, _index(run.home.uri))
            self._open.callback(self.trainer.close)
            self.trainer.begin()
        except BaseException:
            self._open.close()
            raise
        self._told = known

    def epoch(self) -> dict[str, Any] | None:
        trainer = self.trainer
        while self._told >= len(trainer.epochs):
            if trainer.complete() or not trainer.epoch():
                return None
        # After a loss the checkpoint may hold epochs that nobody was told of.
        record = trainer.epochs[self._told]
        self._told += 1
        return record | {"total_seconds": _seconds(trainer.epochs[: self._told])}

    def complete(self) -> bool:
        return self._told >= len(self.trainer.epochs) and self.trainer.complete()

    def save(self, folder: str) -> None:
        from trainers import checkpoint, resume

        snapshot = resume.capture(self.trainer)
        assert snapshot is not None, "this is rank 0"
        checkpoint.save(open_store(folder), snapshot)

    def rest(self) -> int:
        trainer = self.trainer
        assert trainer.saver is not None, "this is rank 0"
        trainer.saver.finish()
        if self._run.latest_step() != trainer.step:
            trainer.save()
            trainer.saver.finish()
        return self._told

    def close(self) -> None:
        self._open.close()


class Group:
    """A trial of several workers: Ray Train in a thread of this process, followed through the run directory."""

    def __init__(self, run: Run, spec: Spec, attempt: int, known: int) -> None:
        self._run, self._spec, self._attempt, self._told = run, spec, attempt, known
        self._error: BaseException | None = None
        self._ended = ""
        run.clear_cancel()
        self._thread = threading.Thread(target=self._fit, daemon=True, name="fit")
        self._thread.start()

    def _fit(self) -> None:
        from trainers.fit import fit

        try:
            self._ended = fit(self._run, self._spec, self._attempt, time.time(), part="train")
        except BaseException as error:  # carried to the thread that steps
            self._error = error

    def epoch(self) -> dict[str, Any] | None:
        while True:
            over = not self._thread.is_alive()
            epochs = self._epochs()
            if len(epochs) > self._told:
                record = epochs[self._told]
                self._told += 1
                return record | {"total_seconds": _seconds(epochs[: self._told])}
            if over:
                if self._error is not None:
                    raise self._error
                return None
            self._thread.join(LOOK_SECONDS if not self._run.uri.startswith("s3://") else 5 * LOOK_SECONDS)

    def _epochs(self) -> list[dict[str, Any]]:
        epochs: list[dict[str, Any]] = self._run.metrics().get("epochs", [])
        return epochs

    def complete(self) -> bool:
        return self._told >= (self._spec.train.epochs or 1) or (
            self._ended == "finished" and self._told >= len(self._epochs())
        )

    def save(self, folder: str) -> None:
        """The newest checkpoint, which is that of the last epoch told of or a later one."""
        from trainers import checkpoint

        snapshot = checkpoint.load_latest(self._run.store, lambda what: log.warning("skipped a checkpoint: %s", what))
        if snapshot is not None:
            checkpoint.save(open_store(folder), snapshot)

    def rest(self) -> int:
        """Nothing to do: the workers save when they are asked to stop."""
        return self._told

    def close(self) -> None:
        if self._thread.is_alive():
            self._run.request_cancel()
            self._thread.join(STOP_SECONDS)
        self._run.clear_cancel()
