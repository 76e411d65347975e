"""The policies the training loop calls: which ranks agree on what, when to stop, and what an error means."""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from launcher.errors import BugError, InfrastructureError, LaunchError, NonFiniteLossError, SiteError, UserError

CONTROL_SECONDS = 1.0
"""About how often the ranks agree on whether to save or stop."""


@dataclass(frozen=True)
class Team:
    """The ranks of a run. `group` is a gloo group for small agreements on the CPU, None for a single rank."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def join(cls) -> Team:
        """The team of the process group that is set up, or of this process alone."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        group: Any = dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces each tensor by its mean over the ranks."""
        if self.group is None or not tensors:
            return
        flat = torch.cat([tensor.detach().float().flatten().cpu() for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        flat /= self.world
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step."""

    save: bool = False
    stop: bool = False


class Control:
    """Lets rank 0 decide, by its clock and its view of the run, and all ranks do the same at the same step.

    The ranks meet once in about `CONTROL_SECONDS`; at each meeting rank 0 also says how many steps to the next.
    """

    def __init__(self, team: Team, stop: Callable[[], bool], save_seconds: float) -> None:
        self._team = team
        self._stop = stop
        self._save_seconds = save_seconds
        self._saved = self._met = time.monotonic()
        self._next = 1
        self._interval = 1

    def saved(self) -> None:
        """A checkpoint was made for another reason: the clock starts anew."""
        self._saved = time.monotonic()

    def after_step(self) -> Decision:
        """Called by every rank after every step."""
        self._next -= 1
        if self._next > 0:
            return Decision()
        message = torch.zeros(3, dtype=torch.int64)
        if self._team.rank == 0:
            now = time.monotonic()
            per_step = max((now - self._met) / self._interval, 1e-6)
            save = bool(self._save_seconds) and now - self._saved >= self._save_seconds
            self._met = now
            message = torch.tensor([save, self._stop(), min(max(int(CONTROL_SECONDS / per_step), 1), 1000)])
        if self._team.group is not None:
            dist.broadcast(message, src=0, group=self._team.group)
        saving, stopping, self._interval = (int(value) for value in message)
        self._next = self._interval
        return Decision(bool(saving), bool(stopping))


class StopWatcher:
    """Looks in the background whether the run should stop, so that the training loop never waits for storage."""

    def __init__(self, requested: Callable[[], bool], every: float) -> None:
        self._stopped = threading.Event()
        self._closed = threading.Event()
        self._requested = requested
        self._every = every
        threading.Thread(target=self._watch, daemon=True, name="stop-watcher").start()

    def __call__(self) -> bool:
        return self._stopped.is_set()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.is_set() and not self._stopped.is_set():
            try:
                if self._requested():
                    self._stopped.set()
            except LaunchError:  # the storage may be away for a while; the training need not care
                pass
            self._closed.wait(self._every)


def poison(loss: torch.Tensor) -> torch.Tensor:
    """The gradient to start `loss.backward` with: 1, or NaN if the loss is not finite.

    A NaN spreads to every gradient and, through DDP's sum, to every rank: so all ranks see the same non-finite
    gradient norm before the step, without another collective and without waiting for the device.
    """
    return torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)


def non_finite(team: Team, losses: Sequence[float], keys: Sequence[str], step: int, lr: float) -> LaunchError:
    """The error for a step whose gradient is not finite; every rank calls it, with its own losses and sample keys.

    `losses` are the rank's per-sample losses in the order of `keys`.
    """
    pairs = [(key, loss) for key, loss in zip(keys, losses, strict=True) if not math.isfinite(loss)]
    named = [pair for pairs in team.gather(pairs[:8]) for pair in pairs]
    samples = (
        ", ".join(f"{key} (loss {loss})" for key, loss in named[:8]) or "the loss was finite, the gradient was not"
    )
    return NonFiniteLossError(
        f"the loss is not finite at step {step}, learning rate {lr:.4g}: {samples}",
        where="optim.lr",
        hint="no step was made with it: lower --lr, clip (--set optim.clip_norm=1), or look at those images",
    )


_LOST_PEER = ("gloo", "nccl", "connection closed by peer", "connection reset", "connection refused", "broken pipe",
              "timed out waiting", "process group")  # fmt: skip


def classify(error: BaseException) -> LaunchError:
    """The error in terms of who has to act."""
    text = f"{type(error).__name__}: {error}".strip()
    brief = text.splitlines()[0][:300]
    if isinstance(error, LaunchError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return SiteError("the GPU has too little memory for this batch", where="train.batch_size",
                         hint="--set train.accumulate=2 halves what is needed at once")  # fmt: skip
    if isinstance(error, MemoryError):
        return SiteError("the machine has too little memory", where="train.batch_size",
                         hint="fewer workers, or a smaller batch")  # fmt: skip
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SiteError("no space left on the disk", where=str(error.filename or ""), hint="free some, then resume")
    if "Expected more than 1 value per channel" in text:
        return UserError("batch norm needs at least two images on each worker", where="train.batch_size",
                         hint="a larger --batch-size, a larger --image-size, or fewer --workers")  # fmt: skip
    if isinstance(error, RuntimeError) and any(sign in text.lower() for sign in _LOST_PEER):
        return InfrastructureError(f"a worker was lost ({brief})", hint="the run goes on from its last checkpoint")
    return BugError(brief, where="the worker", hint="the log of the worker has the traceback")
