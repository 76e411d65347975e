"""What a sweep costs and saves, with real sweeps of timm's smallest ResNet on this machine.

    python benchmarks/sweep.py asha [SEEDS] [FOLDER]  # epochs that ASHA takes to reach what random search reaches
    python benchmarks/sweep.py overhead               # a trial of about a minute over the same run by itself
    python benchmarks/sweep.py many [TRIALS]          # memory and time per trial, over 200 tiny trials

`asha` takes Fashion-MNIST from Debian's package dataset-fashion-mnist, the others the sample digits. With a FOLDER the
sweeps stay there, and those that had ended before are not run again. Epochs do not depend on what else the machine
does; times do, so the load is printed beside them.
"""

from __future__ import annotations

import gzip
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from launcher.backends import backend
from launcher.journal import Lines
from launcher.pools import Pool, find_pool
from launcher.preflight import prepare
from launcher.runs import Run, Status
from launcher.specfile import Draft
from launcher.sweeps import Ledger

COMMON = {
    "data.uri": "sample://digits", "model.name": "test_resnet", "model.pretrained": "none",
    "resources.cpus_per_worker": 1,
}  # fmt: skip


def trained(storage: str, name: str, settings: dict[str, Any]) -> Run:
    """A run or a sweep, carried out to its end as `launch` does it; one that was cut off goes on."""
    run = Run(storage, name)
    if run.exists() and run.state().status is Status.SUCCEEDED:
        return run
    if not run.exists():
        draft = Draft()
        for key, value in {**COMMON, "name": name, "storage": storage, **settings}.items():
            draft.put(key, value, "benchmark")
        plan, index = prepare(draft, Pool("local", cpus=2, memory=8 << 30))
        run.create(plan.spec, plan.to_json())
        if index is not None:
            index.save(run.store)
    local = backend(find_pool("local"))
    local.submit(run)
    while run.owner() is not None:
        time.sleep(0.5)
    state = local.status(run)
    assert state.status is Status.SUCCEEDED, state
    return run


def told(run: Run, event: str) -> list[dict[str, Any]]:
    """The lines of a run's journal about one kind of event."""
    return [line for line in Lines(run.store, "progress.jsonl").events() if line["event"] == event]


def load() -> str:
    """What else the machine does."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"


# -- asha

FASHION = Path("/usr/share/datasets/fashion-mnist")
IMAGES = 2000
SEARCHES = {"random search": "none", "ASHA": "asha"}
HARD = {
    "data.val_fraction": 0.5, "data.image_size": 32, "train.batch_size": 32, "train.epochs": 18,
    "sweep.search": "random", "sweep.trials": 32, "sweep.concurrent": 2,
}  # fmt: skip
"""Half of the images are held out, so that one of them is a small share."""


def fashion(folder: Path) -> Path:
    """The first training images of Fashion-MNIST as PNG, in a folder for each class."""
    pixels, labels = (gzip.decompress((FASHION / f"train-{part}-ubyte.gz").read_bytes())
                      for part in ("images-idx3", "labels-idx1"))  # fmt: skip
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
    for number, label in enumerate(labels[8 : 8 + IMAGES]):
        file = folder / str(label) / f"{number:05}.png"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number]).save(file)
    return folder


def asha(storage: str, seeds: int = 3) -> None:
    """The same settings, each trained to the end, and as ASHA spends epochs on them."""
    data = fashion(Path(storage) / "images")
    shares, lost = [], []
    for seed in range(seeds):
        found: dict[str, tuple[int, list[float]]] = {}
        for name, scheduler in SEARCHES.items():
            settings = {**HARD, "data.uri": str(data), "train.seed": seed, "sweep.scheduler": scheduler}
            sweep = trained(storage, f"s{seed}-{scheduler}", settings)
            # Every epoch in the order in which it was trained, whichever trial it belongs to.
            values = [line["value"] for line in told(sweep, "trial_epoch")]
            assert len(values) == Ledger.load(sweep).epochs()
            images = sweep.state().result["count"]
            found[name] = round(max(values) * images), values
            print(f"seed {seed}: {name:<13} {max(values):.2%} of {images} images in {len(values)} epochs "
                  f"({load()})", flush=True)  # fmt: skip
        (goal, whole), (best, values) = found.values()
        shares.append(f"{len(values) / len(whole):.3f}")
        lost.append(str(goal - best))
        reached = next((at for at, value in enumerate(values, 1) if round(value * images) >= goal), None)
        after = f"after {reached} epochs, {reached / len(whole):.3f} of them" if reached else "never"
        early = round(max(whole[: len(values)]) * images)
        print(f"        {shares[-1]} of the epochs; {lost[-1]} images less than random search has at its end, which is "
              f"reached {after}; random search has {early} images after as many epochs", flush=True)  # fmt: skip
    print(f"epochs of ASHA over those of random search: {', '.join(shares)}    (bar 0.5)")
    print(f"images less than its best: {', '.join(lost)} of {images}    (bar 0)")


# -- overhead

MINUTE = {"train.batch_size": 64, "train.epochs": 40}
ROUNDS = 2
ALIKE = {
    "sweep.trials": 3, "sweep.concurrent": 1, "sweep.search": "grid", "sweep.scheduler": "none",
    "sweep.space": {"train.seed": {"grid": [1, 2, 3]}},
}  # fmt: skip


@dataclass
class Clock:
    """Where the seconds of a training went: before its first step, in steps and evaluations, between them, after."""

    before: float
    work: float
    between: float
    after: float

    @classmethod
    def of(cls, run: Run, began: float, ended: float | None) -> Clock:
        epochs = told(run, "epoch")
        first, last = told(run, "start")[0]["time"], epochs[-1]["time"]
        work = sum(epoch["seconds"] + epoch["eval_seconds"] for epoch in epochs)
        return cls(first - began, work, last - first - work, (ended or last) - last)

    @property
    def whole(self) -> float:
        return self.before + self.work + self.between + self.after

    def __str__(self) -> str:
        return f"{self.whole:6.1f} s = {self.before:5.2f} + {self.work:6.2f} + {self.between:5.2f} + {self.after:5.2f}"


def overhead(storage: str) -> None:
    """Runs and sweeps take turns; the seconds of a run without those of its export."""
    alone, cold, warm = [], [], []
    print("whole = before the first step + steps and evaluations + between them + after the last")
    for number in range(ROUNDS + 1):
        run = trained(storage, f"alone-{number}", {**MINUTE, "train.seed": 1})
        alone.append(Clock.of(run, run.read_json("attempts/0001.json")["began"], None))
        print(f"  run by itself           {alone[-1]}   {load()}", flush=True)
        if number == ROUNDS:
            break
        sweep = trained(storage, f"sweep-{number}", {**MINUTE, **ALIKE})
        # A trial has what is between it and the trial before, the first all from the start of the sweep.
        ends = [sweep.read_json("attempts/0001.json")["began"], *(line["time"] for line in told(sweep, "trial_end"))]
        clocks = [Clock.of(sweep.trial(at), *span) for at, span in enumerate(pairwise(ends), 1)]
        cold.append(clocks[0])
        warm += clocks[1:]
        for at, clock in enumerate(clocks, 1):
            print(f"  trial {at}, {'warm' if at > 1 else 'cold'} process   {clock}   {load()}", flush=True)
    whole, work = statistics.median(one.whole for one in alone), statistics.median(one.work for one in alone)
    for name, clocks in (("cold", cold), ("warm", warm)):
        mine = statistics.median(clock.whole for clock in clocks)
        beside = statistics.median(1 + (clock.whole - clock.work) / clock.work for clock in clocks)
        print(f"{name}: {mine:.1f} s, {mine / whole:.3f} of the run's {whole:.1f} s, {mine / work:.3f} of the run's "
              f"{work:.1f} s of work, {beside:.3f} of the trial's own work    (bar 1.10)")  # fmt: skip


# -- many

TINY = {"data.classes": ("0", "1"), "train.epochs": 1, "train.batch_size": 64, "sweep.concurrent": 1}


@dataclass
class Sample:
    """A process at some moment: memory in bytes, threads, open files, CPU seconds so far."""

    time: float
    process: int
    actor: bool
    memory: int
    threads: int
    files: int
    cpu: float


class Watch(threading.Thread):
    """Looks at a sweep's driver and its trials' processes every half second."""

    def __init__(self, uri: str) -> None:
        super().__init__(daemon=True)
        self.samples: list[Sample] = []
        self._uri = uri
        self._over = threading.Event()

    def run(self) -> None:
        driver: psutil.Process | None = None
        while not self._over.wait(0.5):
            with suppress(psutil.Error):
                driver = driver or next((one for one in psutil.process_iter(["cmdline"]) if self._drives(one)), None)
                if driver is not None:
                    self._look(driver, actor=False)
                    for child in driver.children(recursive=True):
                        if "TrialActor" in " ".join(child.cmdline()):
                            self._look(child, actor=True)

    def _drives(self, process: psutil.Process) -> bool:
        # A process that has just ended has no command.
        return (process.info["cmdline"] or [])[1:] == ["-m", "trainers.driver", self._uri]

    def _look(self, process: psutil.Process, *, actor: bool) -> None:
        self.samples.append(Sample(
            time.time(), process.pid, actor, process.memory_info().rss, process.num_threads(), process.num_fds(),
            sum(process.cpu_times()[:2]),
        ))  # fmt: skip

    def close(self) -> None:
        self._over.set()
        self.join()


def many(storage: str, trials: int = 200) -> None:
    """One sweep of many trials, a second or so each."""
    watch = Watch(f"{storage}/many")
    watch.start()
    sweep = trained(storage, "many", {**TINY, "sweep.trials": trials})
    watch.close()
    ends = [line["time"] for line in told(sweep, "trial_end")]
    spans = [later - earlier for earlier, later in pairwise(ends)]
    fifty = min(50, trials // 4)
    first, last = spans[1 : 1 + fifty], spans[-fifty:]
    print(f"{trials} trials in {ends[-1] - ends[0]:.0f} s, {load()}; "
          f"sweep.json has {len(sweep.store.read('sweep.json')):,} bytes")  # fmt: skip
    print(f"seconds a trial: the first {fifty} {statistics.median(first):.3f}, the last {fifty} "
          f"{statistics.median(last):.3f}, ratio {statistics.median(last) / statistics.median(first):.3f}")  # fmt: skip
    for name, actor in (("driver", False), ("trials", True)):
        _growth(name, [sample for sample in watch.samples if sample.actor == actor], ends, fifty)


def _growth(name: str, samples: list[Sample], ends: list[float], fifty: int) -> None:
    """A table of one kind of process by trial, and what it grows by."""
    searching = [sample for sample in samples if ends[0] <= sample.time <= ends[-1]]
    print(f"{name}: {len({sample.process for sample in searching})} process(es)\n  trial    MB  threads  files  CPU s")
    numbers = np.searchsorted(ends, [sample.time for sample in searching])
    for wanted in np.linspace(fifty, len(ends), 4).astype(int):
        sample = searching[int(np.abs(numbers - wanted).argmin())]
        print(f"  {wanted:5}{sample.memory / 1e6:6.0f}{sample.threads:9}{sample.files:7}{sample.cpu:7.1f}")
    late = numbers >= fifty
    memory = np.array([sample.memory for sample in searching])
    slope = np.polyfit(numbers[late], memory[late] / 1e3, 1)[0]
    print(f"  grows by {slope:.1f} kB a trial from trial {fifty} on", flush=True)


COMMANDS = {"asha": asha, "overhead": overhead, "many": many}


def main(words: Iterable[str]) -> None:
    """Measures and prints."""
    command, *rest = words
    kept = next((word for word in rest if not word.isdigit()), None)
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory() as folder:
        COMMANDS[command](folder, *(int(word) for word in rest if word.isdigit()))


if __name__ == "__main__":
    main(sys.argv[1:] or ["--help"])
