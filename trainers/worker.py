"""The training loop of one rank: the same for one worker and for many, on a laptop and in a pod.

`work` is what Ray Train calls in every worker. It begins at the newest whole checkpoint, always: a run's first
attempt finds the one of step 0, which the driver wrote. It never decides whether a failed run is tried again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from launcher.errors import SiteError
from launcher.runs import Run
from launcher.spec import Spec
from trainers import checkpoint, export, guards, optim, resume
from trainers.data.counts import total
from trainers.data.index import Index, index_of
from trainers.data.loader import Batch, Step, too_many_bad
from trainers.data.policy import batch_mixer
from trainers.evaluate import Tally
from trainers.feed import Feed
from trainers.guards import Team
from trainers.model import Preprocess, build, freeze
from trainers.progress import Meter, Progress
from trainers.ranklog import rank_log

log = logging.getLogger(__name__)


def work(config: dict[str, str]) -> str:
    """Trains the run at `config["run"]` to its end; returns `finished` or `cancelled`.

    `config["attempt"]` is the number of this attempt, and `config["began"]` the Unix time at which it began. A trial
    also has the sweep at `config["home"]`, whose attempt it is; `config["part"]` is `all`, or what to do of `train` and
    `export`.

    An error is written to `failures/ATTEMPT-rank-N.json`, in terms of who has to act, before it is raised.
    """
    run, attempt = Run.at(config["run"], config.get("home", "")), int(config["attempt"])
    team = Team.join()
    with rank_log(run, team.rank):
        try:
            trainer = Trainer(run, team, float(config["began"]), functools.partial(run.home.check_attempt, attempt))
            try:
                return trainer.train(config.get("part", "all"))
            finally:
                trainer.close()
        except BaseException as error:
            log.exception("rank %d ends here", team.rank)
            run.write_json(f"failures/{attempt:04d}-rank-{team.rank}.json", guards.classify(error).to_record())
            raise


class Trainer:
    """One rank's model, optimizer, data and position. `fence` raises once another attempt has taken over."""

    def __init__(
        self, run: Run, team: Team, began: float, fence: Callable[[], None] = lambda: None, index: Index | None = None
    ) -> None:
        self.run, self.team, self.began = run, team, began
        self.spec = spec = run.spec()
        self.index = index or index_of(run)
        self.device = _device(spec, team.world)
        self._arithmetic()
        self.model = build(spec.model, len(self.index.classes))
        self.preprocess = Preprocess.of(self.model, spec.data.image_size or 224)
        self.layout = layout = torch.channels_last if spec.train.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self.frozen_norms = freeze(self.model, spec.model.freeze)
        self.optimizer = optim.sgd(self.model, spec.optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=spec.train.precision == "fp16")
        self.ema = _ema(self.model, spec.optim.ema_decay)
        self.feed = Feed(spec, self.index, self.preprocess, team, pinned=self.device.type == "cuda")
        self.loader = self.feed.loader
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) * 255
            for values in (self.preprocess.mean, self.preprocess.std)
        )
        self.parameters = sum(weight.numel() for weight in self.model.parameters())
        self.epochs: list[dict[str, Any]] = []
        self.seconds = {"train": 0.0, "eval": 0.0, "wait": 0.0}
        self.meter = Meter()
        self.step = 0
        listed = (run.read_json("data_report.json") or {"bad": []})["bad"]
        self.bad = {item["key"]: item["reason"] for item in listed}
        self.progress = Progress(run) if team.rank == 0 else None
        resume.restore(self)
        self.parallel = self._parallel()
        self.mix = batch_mixer(spec.augment, len(self.index.classes))
        self.stop = guards.StopWatcher(run.cancel_requested, 5.0 if run.uri.startswith("s3://") else 1.0)
        self.control = guards.Control(team, self.stop, spec.checkpoint.every_minutes * 60)
        self.saver = checkpoint.Saver(run.store, spec.checkpoint.keep, self._saved, fence) if team.rank == 0 else None

    # -- the loop

    def train(self, part: str = "all") -> str:
        """Every epoch that is left, and then the final evaluation and the export; or one `part` of it."""
        self.begin()
        while part != "export" and not self.complete():
            if not self.epoch():
                return "cancelled"
        if part != "train":
            export.finish(self)
        return "finished"

    def begin(self) -> None:
        """Says that the training begins, or goes on."""
        self.first_step = time.time()
        log.info("rank %d of %d on %s, from step %d", self.team.rank, self.team.world, self.device, self.step)
        if self.progress:
            self.progress.start(self.step, self.loader.steps, self.spec, self.team.world, str(self.device))

    def complete(self) -> bool:
        """Whether no epoch is left to train."""
        return len(self.epochs) >= (self.spec.train.epochs or 1) or self._out_of_patience()

    def epoch(self) -> bool:
        """The next epoch, or what is left of it, with its evaluation; False if the run was asked to stop."""
        number = len(self.epochs)
        if not self.train_epoch(number, self.step - number * self.loader.steps):
            return False
        self.end_epoch(number)
        return True

    def train_epoch(self, epoch: int, first: int) -> bool:
        """One pass over the training split, from step `first` of it; False if the run was asked to stop."""
        self.model.train()
        for norm in self.frozen_norms:
            norm.eval()
        steps = self.loader.train(epoch, first)
        with contextlib.closing(steps):  # type: ignore[type-var]
            for step in self._watched(steps):
                self.train_step(step)
                decision = self.control.after_step()
                if decision.stop or decision.save:
                    self.save()
                if decision.stop:
                    return False
        return True

    def train_step(self, step: Step) -> None:
        """Forward, backward and update on one global batch, of which this rank has `step.parts`.

        The gradient is that of the mean loss over the global batch, whatever the number of ranks and parts.
        """
        lr = optim.learning_rate(self.spec.optim, self.step, self.loader.steps, self.spec.train.epochs or 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Dropout and mixup draw from a generator that is set anew each step, so a resumed run draws the same.
        torch.manual_seed(((self.spec.train.seed << 32) + self.step * 65_537 + self.team.rank) % 2**63)
        losses = [self._forward_backward(batch, step.size, last=batch is step.parts[-1]) for batch in step.parts]
        self.scaler.unscale_(self.optimizer)
        weights = [weight for weight in self.model.parameters() if weight.grad is not None]
        norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if not torch.isfinite(norm):
            self._on_non_finite(step, losses, lr)
        if self.spec.optim.clip_norm:
            nn.utils.clip_grads_with_norm_(weights, self.spec.optim.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        self.meter.lr = lr

    def _forward_backward(self, batch: Batch, size: int, *, last: bool) -> torch.Tensor:
        images, targets = self.to_device(batch)
        mixed: tuple[torch.Tensor, torch.Tensor] = self.mix(images, targets) if self.mix else (images, targets)
        sync = contextlib.nullcontext() if last or self.team.world == 1 else self.parallel.no_sync()
        with sync:
            with self.autocast():
                logits = self.parallel(mixed[0])
            losses = F.cross_entropy(
                logits.float(), mixed[1], label_smoothing=self.spec.optim.label_smoothing, reduction="none"
            )
            # DDP averages over ranks; times the world size, that is the sum over the global batch.
            loss = losses.sum() * (self.team.world / size)
            scaled: Any = self.scaler.scale(loss)
            scaled.backward(gradient=guards.poison(scaled))
        self.meter.add(losses.detach(), logits.detach(), targets)
        return losses.detach()

    def _on_non_finite(self, step: Step, losses: list[torch.Tensor], lr: float) -> None:
        flat = torch.cat(losses).tolist()
        overflow = self.scaler.is_enabled() and all(np.isfinite(self.team.gather(float(sum(flat)))))
        # With fp16 a gradient may overflow: the scaler skips this step and lowers its scale. Only a scale that
        # has sunk below 1 says that the numbers themselves are too large.
        if overflow and self.scaler.get_scale() >= 1:
            return
        rows = np.concatenate([batch.rows.numpy() for batch in step.parts])
        keys = self.index.table["key"].take(rows).to_pylist()
        raise guards.non_finite(self.team, flat, keys, self.step, lr)

    def end_epoch(self, epoch: int) -> None:
        """Evaluates, records the epoch, and saves if it is due."""
        train_loss, train_top1 = self.meter.epoch(self.team)
        began = time.monotonic()
        self.average_norms()
        tally = self.evaluate("val")
        self.seconds["eval"] += time.monotonic() - began
        summary = tally.summary()
        best = all(_better(summary, past["val"]) for past in self.epochs)
        record = {
            "epoch": epoch + 1, "step": self.step, "lr": self.meter.lr, "train_loss": train_loss,
            "train_top1": train_top1, "val": summary, "seconds": self.meter.seconds,
            "eval_seconds": time.monotonic() - began, "images_per_second": self.meter.rate(),
            "data_wait": self.meter.wait_share(), "data": total(self.team.gather(self.loader.counts.take())),
            "best": best, "parameters": self.parameters,
        }  # fmt: skip
        self.epochs.append(record)
        log.info("epoch %d: loss %.4f, val top-1 %.4f", epoch + 1, train_loss, summary["top1"])
        self.meter.next_epoch()
        if best or self.complete() or (epoch + 1) % self.spec.checkpoint.every_epochs == 0:
            self.save()
        bad = self.bad_images()
        if self.progress:
            self.progress.epoch(record, self.epochs)
            self.run.write_json("data_report.json", {"images": len(self.index.table), "bad": bad})

    def bad_images(self) -> list[dict[str, str]]:
        """Key and reason of every image that no rank could read so far, in this attempt or before; on every rank."""
        for bad in self.team.gather(dict(self.loader.bad)):
            self.bad |= bad
        # Each rank stops at the limit by itself; here what they met together counts.
        if len(self.bad) > self.spec.data.max_bad_fraction * len(self.index.table):
            raise too_many_bad(self.index, self.bad)
        return [{"key": key, "reason": reason} for key, reason in sorted(self.bad.items())]

    # -- what it calls

    @torch.inference_mode()
    def evaluate(self, split: str, each: Any = None) -> Tally:
        """Counts over a split, summed over all ranks. `each(batch, logits, losses)` sees this rank's batches."""
        model = self.evaluated().eval()
        tally = Tally(len(self.index.classes))
        for batch in self.loader.evaluate(split, max(2 * (self.spec.train.batch_size or 1) // self.team.world, 8)):
            images, targets = self.to_device(batch)
            with self.autocast():
                logits = model(images)
            losses = tally.update(logits, targets)
            if each is not None:
                each(batch, logits.float(), losses)
            if self.progress:
                self.progress.evaluating(split)
        tally.reduce(self.team.group)
        return tally

    def evaluated(self) -> nn.Module:
        """The model whose figures count: the moving average where there is one."""
        module: nn.Module = self.ema.module if self.ema is not None else self.model
        return module

    def to_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised float images in the model's layout, and targets, on the device."""
        images = batch.images.to(self.device, non_blocking=True)
        if batch.changes is not None:
            images = batch.changes.to(self.device).apply(images)
        images = images.float().sub_(self.mean).div_(self.std)
        return images.contiguous(memory_format=self.layout), batch.targets.to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """The forward pass's arithmetic."""
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        kind = kinds.get(self.spec.train.precision or "fp32")
        return torch.autocast(self.device.type, kind, enabled=kind is not None)

    def average_norms(self) -> None:
        """Makes the running statistics of batch norm the same on all ranks, as evaluation needs it."""
        self.team.mean_(list(self.norm_buffers().values()))

    def norm_buffers(self) -> dict[str, torch.Tensor]:
        """The running statistics of batch norm, by name; those of the moving average begin with `ema.`."""
        named = dict(self.model.named_buffers())
        if self.ema is not None:
            named |= {f"ema.{key}": buffer for key, buffer in self.ema.module.named_buffers()}
        return {key: buffer for key, buffer in named.items() if buffer.is_floating_point()}

    # -- checkpoints

    def save(self) -> None:
        """Hands the state of all ranks to the writer; training goes on at once."""
        snapshot = resume.capture(self)
        if self.saver is not None and snapshot is not None:
            best = [past["step"] for past in self.epochs if past["best"]]
            self.saver.save(snapshot, best[-1] if best else None)
        self.control.saved()

    def _saved(self, step: int, seconds: float) -> None:
        if self.progress:
            self.progress.saved(step, seconds)

    def timing(self) -> dict[str, float]:
        """Where the time went, in seconds; `data_wait` is a share of the training time."""
        train = self.seconds["train"]
        return {
            "total_seconds": time.time() - self.began, "start_seconds": self.first_step - self.began,
            "train_seconds": train, "eval_seconds": self.seconds["eval"],
            "checkpoint_seconds": self.saver.seconds if self.saver else 0.0,
            "data_wait": self.seconds["wait"] / train if train else 0.0,
        }  # fmt: skip

    # -- setting up

    def _arithmetic(self) -> None:
        if self.device.type == "cpu":
            torch.set_num_threads(self.spec.resources.cpus_per_worker or 1)
        if self.spec.train.deterministic:
            # cuBLAS is deterministic only with a workspace of fixed size, and reads this when it is first used.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(self.spec.train.deterministic)
        torch.backends.cudnn.benchmark = not self.spec.train.deterministic
        torch.set_float32_matmul_precision("high")

    def _parallel(self) -> Any:
        model: Any = self.model
        if self.team.world > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            # Every rank has loaded the same checkpoint, and its own statistics of batch norm, which are averaged before
            # each evaluation instead of being sent before each step.
            model = DistributedDataParallel(
                model, device_ids=devices, gradient_as_bucket_view=True, forward_sync_buffers=False, init_sync=False
            )
        return torch.compile(model) if self.spec.train.compile else model

    def _watched(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps, with the time spent waiting for each, and progress reported after each."""
        while True:
            began = time.monotonic()
            step = next(steps, None)
            if step is None:
                return
            waited = time.monotonic() - began
            yield step
            self.meter.step(step.size, waited, time.monotonic() - began)
            self.seconds["wait"] += waited
            self.seconds["train"] += time.monotonic() - began
            if self.progress:
                self.progress.step(len(self.epochs) + 1, self.step, self.loader.steps, step.size, self.meter,
                                   self.loader.counts.so_far())  # fmt: skip

    def _out_of_patience(self) -> bool:
        patience = self.spec.train.early_stop
        best = max((past["epoch"] for past in self.epochs if past["best"]), default=0)
        return bool(patience) and len(self.epochs) - best >= patience

    def close(self) -> None:
        """Waits for the last checkpoint and ends the background work."""
        self.stop.close()
        if self.saver is not None:
            self.saver.finish()
        if self.progress:
            self.progress.close()


def _device(spec: Spec, world: int) -> torch.device:
    if not spec.resources.gpus_per_worker:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SiteError("torch sees no GPU", where="resources.gpus_per_worker",
                        hint="check nvidia-smi; --set resources.gpus_per_worker=0 trains on the CPU")  # fmt: skip
    from ray.train.torch import get_device

    # One alone sees only its own GPU; a trial's actor, which is no worker of Ray Train, could not ask either.
    device: torch.device = get_device() if world > 1 else torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


def _better(one: dict[str, float], other: dict[str, float]) -> bool:
    """By top-1; among equals by loss, which tells more than a coin does."""
    return (one["top1"], -one["loss"]) > (other["top1"], -other["loss"])


def _ema(model: nn.Module, decay: float) -> Any:
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True) if decay else None
