"""Whether a model learns as well from our batches as from torchvision's: same spec, same loop, same seeds.

    python benchmarks/fidelity.py DATA [--model resnet10t] [--size 64] [--epochs 8] [--seeds 3]

One run reads DATA through the data engine, the other by Pillow's full decode and torchvision's `RandomResizedCrop`,
`RandomHorizontalFlip`, `Resize` and `CenterCrop`. Prints the held-out top-1 of both for each seed, and the mean of the
differences beside what chance alone makes of it: the standard error of the difference of two such accuracies.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from launcher.pools import Pool
from launcher.preflight import prepare
from launcher.runs import Run
from launcher.specfile import Draft
from trainers.data.counts import Counts
from trainers.data.images import decode
from trainers.data.loader import Batch, Step
from trainers.data.order import step_samples, steps_per_epoch
from trainers.driver import Driver
from trainers.guards import Team
from trainers.worker import Trainer


class Reference:
    """Stands where the loader stands, and does what tutorials do."""

    def __init__(self, trainer: Trainer) -> None:
        spec, self._index, self._source = trainer.spec, trainer.index, trainer.feed.source
        side, pct = trainer.preprocess.image_size, trainer.preprocess.crop_pct
        assert spec.augment.crop_scale is not None
        kind = v2.InterpolationMode(trainer.preprocess.interpolation)
        self._training = v2.Compose([
            v2.RandomResizedCrop(side, spec.augment.crop_scale, spec.augment.crop_ratio),
            v2.RandomHorizontalFlip(0.5 if spec.augment.flip else 0.0),
        ])  # fmt: skip
        self._evaluation = v2.Compose([v2.Resize(round(side / pct), kind), v2.CenterCrop(side)])
        self._train_rows = self._index.rows("train")
        self._seed = spec.train.seed
        self.steps = steps_per_epoch(len(self._train_rows), spec.train.batch_size or 1)
        self.counts = Counts()
        self.bad: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(spec.resources.cpus_per_worker or 1)

    def train(self, epoch: int, first: int = 0) -> Iterator[Step]:
        """An epoch in an order of its own."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._train_rows))
        for number in range(first, self.steps):
            rows = self._train_rows[step_samples(order, number, self.steps)]
            # torchvision draws from the global generator, which the loop sets anew before each step: so here, too.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(hash((self._seed, epoch, number)))
                batch = self._batch(rows, self._training)
            yield Step(number, len(rows), [batch])

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """A split in order."""
        rows = self._index.rows(split)
        for start in range(0, len(rows), batch_size):
            yield self._batch(rows[start : start + batch_size], self._evaluation)

    def _batch(self, rows: np.ndarray, transform: Callable[[Image.Image], Image.Image]) -> Batch:
        images = [decode(data) for data in self._pool.map(self._source.read, rows.tolist())]
        pixels = np.stack([np.asarray(transform(image)) for image in images])
        return Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(self._index.targets[rows]),
                     torch.from_numpy(rows))  # fmt: skip


def accuracy(storage: str, seed: int, reference: bool, options: argparse.Namespace) -> tuple[float, int]:
    """Held-out top-1 after the last epoch, and of how many images."""
    draft = Draft()
    for key, value in {
        "name": f"{'reference' if reference else 'ours'}-{seed}", "storage": storage, "data.uri": options.data,
        "data.val_fraction": options.held_out, "model.name": options.model, "model.pretrained": "none",
        "data.image_size": options.size, "train.batch_size": options.batch, "train.epochs": options.epochs,
        "train.seed": seed, "augment.flip": True, "augment.crop_scale": (0.25, 1.0), "resources.workers": 1,
        "optim.lr": 0.1, "resources.cpus_per_worker": options.cores,
    }.items():  # fmt: skip
        draft.put(key, value, "benchmark")
    plan, _ = prepare(draft, Pool("local", cpus=options.cores, memory=0))
    run = Run(storage, plan.spec.name or "")
    run.create(plan.spec, plan.to_json())
    Driver(run).prepare(plan.spec)
    trainer = Trainer(run, Team(), time.time())
    if reference:
        trainer.loader = Reference(trainer)  # type: ignore[assignment]
    trainer.train("train")
    trainer.close()
    return trainer.epochs[-1]["val"]["top1"], len(trainer.index.rows("val"))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="resnet10t")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=float, default=0.5)
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    differences, variances = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            ours, count = accuracy(folder, seed, False, options)
            theirs, _ = accuracy(folder, seed, True, options)
            differences.append(ours - theirs)
            variances.append((ours * (1 - ours) + theirs * (1 - theirs)) / count)
            print(f"seed {seed}   ours {ours:.2%}   reference {theirs:.2%}   of {count:,} images", flush=True)
    error = math.sqrt(sum(variances)) / len(variances)
    print(f"mean difference {statistics.mean(differences):+.2%}, standard error of it by chance {error:.2%}")


if __name__ == "__main__":
    main()
