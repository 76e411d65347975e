"""What the training tells the world while it runs: sums of an epoch, and lines in the run directory.

`Meter` counts on the device and never waits for it; `Progress` writes, on rank 0 only, at most about once a second.
"""

from __future__ import annotations

import csv
import io
import time
from typing import Any

import psutil
import torch

from launcher.journal import Journal
from launcher.runs import Run, Status
from launcher.spec import Spec
from trainers.guards import Team


class Meter:
    """This rank's sums over the current epoch: loss, hits and samples; seconds, global images, and seconds waited."""

    def __init__(self) -> None:
        self.lr = 0.0
        self._sums: torch.Tensor | None = None
        self.seconds = 0.0
        self.images = 0
        self.waited = 0.0

    def add(self, losses: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Counts a batch: losses [b], logits [b, classes], targets [b]; nothing is copied to the host."""
        hits = (logits.argmax(1) == targets).sum()
        sums = torch.stack([losses.sum().double(), hits.double(), hits.new_tensor(len(targets)).double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def step(self, images: int, waited: float, seconds: float) -> None:
        """Counts the time of a step on `images` images over all ranks, of which `waited` was for data."""
        self.images += images
        self.waited += waited
        self.seconds += seconds

    def loss(self) -> float:
        """Mean loss of this rank's samples so far; waits for the device."""
        sums = self._host_sums()
        return sums[0] / max(sums[2], 1)

    def rate(self) -> float:
        """Images per second, over all ranks."""
        return self.images / self.seconds if self.seconds else 0.0

    def wait_share(self) -> float:
        """Share of the step time that went by waiting for data."""
        return self.waited / self.seconds if self.seconds else 0.0

    def epoch(self, team: Team) -> tuple[float, float]:
        """Mean loss and top-1 (share) of the epoch over all ranks' samples."""
        totals = [sum(column) for column in zip(*team.gather(self._host_sums()), strict=True)]
        return totals[0] / max(totals[2], 1), totals[1] / max(totals[2], 1)

    def next_epoch(self) -> None:
        """Begins anew."""
        lr = self.lr
        self.__init__()  # type: ignore[misc]
        self.lr = lr

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {"sums": self._host_sums(), "lr": self.lr, "seconds": self.seconds, "images": self.images,
                "waited": self.waited}  # fmt: skip

    def restore(self, states: list[dict[str, Any]], rank: int, *, same: bool) -> None:
        """Takes over a checkpoint's states, one for each rank of then; rank 0 adds up those of another world size."""
        mine = states[rank] if same else states[0]
        sums = (
            mine["sums"] if same else [sum(column) for column in zip(*(state["sums"] for state in states), strict=True)]
        )
        self._sums = torch.tensor(sums if same or rank == 0 else [0.0, 0.0, 0.0], dtype=torch.float64)
        self.lr, self.seconds, self.images, self.waited = mine["lr"], mine["seconds"], mine["images"], mine["waited"]

    def _host_sums(self) -> list[float]:
        return [0.0, 0.0, 0.0] if self._sums is None else self._sums.tolist()


class Progress:
    """Writes progress.jsonl, metrics.json and metrics.csv."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._journal = Journal(run.store, "progress.jsonl", every=1.0)
        self._process = psutil.Process()
        self._told = 0.0
        self._mark = (0.0, 0, 0.0)

    def start(self, step: int, steps: int, spec: Spec, world: int, device: str) -> None:
        """The training begins, or goes on, at a global step."""
        self._run.update(status=Status.RUNNING, reason="", started=self._run.state().started or time.time())
        self._journal.write("start", now=True, step=step, steps_per_epoch=steps, epochs=spec.train.epochs,
                            workers=world, device=device)  # fmt: skip

    def step(self, epoch: int, step: int, steps: int, batch: int, meter: Meter, counts: dict[str, float]) -> None:
        """A step was made; images/s and the share of waiting are those since the last line.

        `counts` is what this rank has read since the epoch began, evaluations before it included.
        """
        now = time.monotonic()
        if now - self._told < 1.0:
            return
        seconds, images, waited = self._mark if self._mark[0] <= meter.seconds else (0.0, 0, 0.0)
        span = max(meter.seconds - seconds, 1e-9)
        self._journal.write(
            "step", epoch=epoch, step=step, of=steps, at=step - (epoch - 1) * steps, batch=batch,
            loss=round(meter.loss(), 5), lr=meter.lr, images_per_second=round((meter.images - images) / span, 2),
            data_wait=round((meter.waited - waited) / span, 4),
            pixels_held=round(counts["pixels_held"] / max(counts["images"], 1), 4), s3_bytes=int(counts["bytes"]),
            memory=self._process.memory_info().rss,
            gpu_memory=torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
        )  # fmt: skip
        self._told = now
        self._mark = (meter.seconds, meter.images, meter.waited)

    def evaluating(self, split: str) -> None:
        """A batch of an evaluation is done."""
        if time.monotonic() - self._told >= 1.0:
            self._journal.write("evaluating", split=split)
            self._told = time.monotonic()

    def epoch(self, record: dict[str, Any], epochs: list[dict[str, Any]]) -> None:
        """An epoch is evaluated."""
        self._journal.write("epoch", now=True, **record)
        best = [past["epoch"] for past in epochs if past["best"]]
        self.metrics({"epochs": epochs, "best_epoch": best[-1] if best else None})

    def metrics(self, document: dict[str, Any]) -> None:
        """Writes metrics.json and metrics.csv anew."""
        self._run.write_json("metrics.json", {"schema": 1, **document})
        rows = [
            {key: value for key, value in epoch.items() if key not in ("val", "data")}
            | {f"{part}_{key}": value for part in ("val", "data") for key, value in epoch.get(part, {}).items()}
            for epoch in document["epochs"]
        ]
        if rows:
            text = io.StringIO()
            table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
            self._run.store.write("metrics.csv", text.getvalue().encode())

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint is sealed."""
        self._journal.write("checkpoint", now=True, step=step, seconds=round(seconds, 3))

    def close(self) -> None:
        """Makes the last lines readable."""
        self._journal.close()
