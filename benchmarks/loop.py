"""What the worker's loop costs over a bare PyTorch loop: same model, same batches in memory, same process.

    python benchmarks/loop.py [--model resnet18] [--size 32] [--batch 32] [--rounds 20]

Blocks of both loops take turns; each round gives a ratio of their times. Prints the median ratio and the spread, for
1 and for 2 workers (processes with one thread each, gloo, DDP). The bar is 1.03.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from launcher.pools import Pool
from launcher.preflight import prepare
from launcher.runs import Run
from launcher.specfile import Draft
from trainers.data.counts import Counts
from trainers.data.loader import Batch, Step
from trainers.driver import Driver
from trainers.guards import Team
from trainers.worker import Trainer

BLOCK = 4
"""Steps of a loop before the other has its turn."""


class InMemory:
    """Stands where the loader stands: one batch, already decoded, again and again."""

    steps = BLOCK
    counts = Counts()

    def __init__(self, batch: Batch, world: int) -> None:
        self._batch = batch
        self._size = len(batch.targets) * world

    def train(self, epoch: int, first: int = 0) -> Iterator[Step]:
        """The same step `BLOCK` times."""
        del epoch
        for number in range(first, BLOCK):
            yield Step(number, self._size, [self._batch])


def bare(model: Any, optimizer: torch.optim.Optimizer, images: torch.Tensor, targets: torch.Tensor) -> None:
    """`BLOCK` steps as a tutorial would write them."""
    model.train()
    for _ in range(BLOCK):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images), targets, label_smoothing=0.1)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def measure(team: Team, uri: str, rounds: int, batch_size: int, size: int) -> list[tuple[float, float]]:
    """Seconds of a block of the worker's loop and of the bare loop, for each round."""
    trainer = Trainer(Run.at(uri), team, time.time())
    layout = trainer.layout
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)
    targets = torch.randint(0, 10, (batch_size,))
    batch = Batch(images.contiguous(memory_format=torch.channels_last), targets, torch.arange(batch_size))
    trainer.loader = InMemory(batch, team.world)  # type: ignore[assignment]
    other = Trainer(Run.at(uri), team, time.time())
    model: Any = other.model
    if team.world > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(other.model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    floats = ((images.float() - 127) / 60).contiguous(memory_format=layout)
    found = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        trainer.train_epoch(0, 0)
        middle = time.perf_counter()
        bare(model, optimizer, floats, targets)
        found.append((middle - began, time.perf_counter() - middle))
        team.gather(None)
    trainer.close()
    other.close()
    return found[2:]


def _rank(rank: int, folder: str, uri: str, *settings: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = measure(Team.join(), uri, *settings)
    if rank == 0:
        Path(f"{folder}/found").write_text("\n".join(f"{ours} {theirs}" for ours, theirs in found))
    dist.destroy_process_group()


def prepared(storage: str, name: str, workers: int, options: argparse.Namespace) -> Run:
    """A run as the driver leaves it to its workers."""
    draft = Draft()
    for key, value in {
        "name": name, "storage": storage, "data.uri": "sample://digits", "model.name": options.model,
        "model.pretrained": "none", "data.image_size": options.size, "train.batch_size": options.batch * workers,
        "resources.workers": workers, "resources.cpus_per_worker": 1, "train.epochs": 1000,
    }.items():  # fmt: skip
        draft.put(key, value, "benchmark")
    plan, _ = prepare(draft, Pool("local", cpus=2, memory=0))
    run = Run(storage, name)
    run.create(plan.spec, plan.to_json())
    Driver(run).prepare(plan.spec)
    return run


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print(
        f"{options.model}, {options.size} px, {options.batch} images a worker, {options.rounds} rounds of {BLOCK} steps"
    )
    settings = (options.rounds, options.batch, options.size)
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        report(1, measure(Team(), prepared(folder, "alone", 1, options).uri, *settings))
        run = prepared(folder, "pair", 2, options)
        spawn(_rank, args=(folder, run.uri, *settings), nprocs=2)  # type: ignore[no-untyped-call]
        lines = Path(f"{folder}/found").read_text().splitlines()
        report(2, [(float(line.split()[0]), float(line.split()[1])) for line in lines])


def report(workers: int, found: list[tuple[float, float]]) -> None:
    """One line: milliseconds a step, and the ratio."""
    ours, theirs = (statistics.median(column) / BLOCK * 1000 for column in zip(*found, strict=True))
    ratios = sorted(one / other for one, other in found)
    quarter = len(ratios) // 4
    print(f"{workers} worker(s)   ours {ours:7.1f} ms   bare {theirs:7.1f} ms   ratio {statistics.median(ratios):.3f}"
          f"   (middle half {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}; bar 1.03)")  # fmt: skip


if __name__ == "__main__":
    main()
