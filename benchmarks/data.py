"""The data engine against its bars and its peers, on 3,000 JPEGs of about 100 KB (`images.py`), with two cores.

    python -m benchmarks.data [--only warm,cold,once,memory,store] [--peers NAMES] [--rounds 3] [--folder FOLDER]

All do the same: random resized crops of 224 pixels, half of them mirrored, uint8 batches of 64. Figures are images per
CPU second of the process and all its children, and ratios of turns that follow one another, so that whatever else the
machine does slows both. Peers are installed into an environment of their own in the folder, from `peers.txt`; what
cannot be installed is left out. Needs nginx with its echo module for all that concerns S3 (`s3.py`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from benchmarks.s3 import Server, exactly_once
from benchmarks.turns import Contender, Failed, Turn

HERE = Path(__file__).parent
WARM = (
    "torchvision v2", "torchvision v1", "timm", "webdataset", "mosaicml-streaming", "litdata", "FFCV jpg", "FFCV raw",
    "DALI", "SPDL", "turboloader tar", "turboloader tbl",
)  # fmt: skip
COLD = ("webdataset", "mosaicml-streaming", "litdata", "s3torchconnector", "boto3")
FOLDERS, SHARDS = "s3://bench/files", "s3://bench/tar"
OURS = {
    "ours, class folders": ("pixels", FOLDERS),
    "ours, class folders, only files kept": ("jpeg", FOLDERS),
    "ours, tar shards, only files kept": ("jpeg", SHARDS),
    "ours, tar shards": ("pixels", SHARDS),
}
"""The last one next to the peers that it is compared with."""
TOUCHED = 6 << 30
"""Bytes of memory that are made sure of before a first epoch: more than any contender asks for."""
SLOW = ("s3torchconnector", "boto3")
"""Those that get one round only."""
OURS_EPOCHS = 3
"""Epochs of a turn of ours: an epoch alone takes half a second."""


class Bench:
    """What is measured, where, and how often."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder: Path = options.folder
        self.rounds: int = options.rounds
        self.peers: list[str] = options.peers
        self.python = self.folder / "peers" / "bin" / "python"
        self._began = time.monotonic()
        self._work = self.folder / "work"
        shutil.rmtree(self._work, ignore_errors=True)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"{time.monotonic() - self._began:5.0f} s  {text}", flush=True)

    def prepare(self) -> None:
        """Installs the peers and makes the images, where that has not been done."""
        if not self.python.exists():
            self.say("installing the peers")
            subprocess.run([sys.executable, "-m", "venv", str(self.python.parents[1])], check=True)
            for package in (HERE / "peers.txt").read_text().split():
                # One by one: FFCV needs others to be there, and OpenCV's headers.
                done = subprocess.run([str(self.python), "-m", "pip", "install", "-q", package], check=False)
                if done.returncode:
                    self.say(f"{package} cannot be installed")
        if not (self.folder / "bench").exists():
            self.say("making the images")
            half = self.folder / "half"
            shutil.rmtree(half, ignore_errors=True)
            subprocess.run([str(self.python), str(HERE / "images.py"), str(half)], check=True)
            half.rename(self.folder / "bench")

    @property
    def files(self) -> Path:
        """The images as class folders."""
        return self.folder / "bench" / "files"

    @property
    def paths(self) -> list[Path]:
        """All images."""
        return sorted(self.files.glob("*/*.jpg"))

    def fresh(self) -> Path:
        """A new folder."""
        self._work.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self._work))

    @contextmanager
    def nothing_left(self) -> Iterator[None]:
        """Removes the folders that are made in it, for the next one is not to wait until they are on the disk."""
        before = set(self._work.iterdir())
        try:
            yield
        finally:
            for folder in set(self._work.iterdir()) - before:
                shutil.rmtree(folder)
            os.sync()

    def ours(self, what: str, uri: str | Path, cache: Path, server: Server | None = None) -> Contender:
        """The data engine, doing what `ours.py` calls so."""
        command = [sys.executable, "-m", "benchmarks.ours", what, str(cache), str(uri)]
        return Contender(command, self.fresh() / "log", server.environment if server else {})

    def first(self, name: str, server: Server) -> Contender:
        """One that has its first epoch from S3 before it."""
        if name not in OURS:
            return self.peer(name, server)
        what, uri = OURS[name]
        return self.ours(what, uri, self.fresh(), server)

    def peer(self, name: str, server: Server | None = None) -> Contender:
        """A peer, on files or on S3."""
        command = [
            str(self.python),
            "-m",
            "benchmarks.peers",
            name,
            str(self.folder),
            *([server.url] if server else []),
        ]
        return Contender(command, self.fresh() / "log", server.environment if server else {})


# -- what is measured


def warm(bench: Bench) -> None:
    """Epochs after the first."""
    found: dict[str, list[tuple[Turn, Turn, Turn]]] = {}
    with ExitStack() as stack:
        ours = stack.enter_context(closing(bench.ours("pixels", bench.files, bench.fresh())))
        kernel = stack.enter_context(closing(bench.ours("crops", bench.files, bench.fresh())))
        peers = {}
        for contender in (ours, kernel):
            contender.ready()
            contender.turn(2)
        for name in [name for name in WARM if name in bench.peers]:
            try:
                peers[name] = stack.enter_context(closing(bench.peer(name)))
                peers[name].ready()
                bench.say(f"{name}: first epoch {peers[name].turn().rate:.0f} images per CPU second")
            except Failed as error:
                del peers[name]
                bench.say(f"{name} is left out: {error}")
        for number in range(bench.rounds):
            for name, peer in list(peers.items()):
                try:
                    turns = ours.turn(OURS_EPOCHS), kernel.turn(OURS_EPOCHS), peer.turn()
                except Failed as error:
                    del peers[name]
                    bench.say(f"{name} is left out: {error}")
                    continue
                found.setdefault(name, []).append(turns)
                rates = ", ".join(f"{turn.rate:.0f}" for turn in turns)
                bench.say(f"round {number + 1}, ours, kernel, {name}: {rates} images per CPU second")
    every = [turns for turns_of in found.values() for turns in turns_of]
    if not every:
        return
    head("warm epochs")
    row("ours", [turn for turn, _, _ in every])
    row("crop-resize kernel alone", [turn for _, turn, _ in every], [(one, two) for one, two, _ in every])
    for name, turns_of in sorted(found.items(), key=lambda item: -median([turn for _, _, turn in item[1]])):
        row(name, [turn for _, _, turn in turns_of], [(one, three) for one, _, three in turns_of])
    print(f"\nmemory of ours without page cache: at most {max(turn.memory for turn, _, _ in every) / 1e6:.0f} MB\n")


def cold(bench: Bench) -> None:
    """The first epoch from S3, with all that a process does before it."""
    found: dict[str, list[Turn]] = {}
    peers = [name for name in COLD if name in bench.peers]
    with closing(Server(bench.folder / "bench", bench.fresh())) as server:
        speed = server.speed([path.relative_to(bench.folder / "bench").as_posix() for path in bench.paths])
        bench.say(f"the server sends {speed:.0f} objects a second to 48 connections of a client that does nothing else")
        for number in range(bench.rounds):
            for name in (*OURS, *(name for name in peers if not number or name not in SLOW)):
                server.requests()
                touch()
                try:
                    with bench.nothing_left(), closing(bench.first(name, server)) as contender:
                        turn = contender.turn(whole=True)
                except Failed as error:
                    bench.say(f"{name} is left out: {error}")
                    continue
                asked = len(server.requests())
                found.setdefault(name, []).append(turn)
                bench.say(f"round {number + 1}, {name}: {turn.rate:.0f} images per CPU second, {asked} requests, "
                          f"{asked / turn.wall:.0f} a second")  # fmt: skip
    head("first epoch from S3")
    for name, turns in sorted(found.items(), key=lambda item: -median(item[1])):
        row(name, turns, list(zip(found["ours, tar shards"], turns, strict=False)))
    print()


def touch() -> None:
    """Uses memory and gives it back.

    A virtual machine may have given its free memory to its host, and then waits ten times as long as otherwise for
    each page that it uses first. That would be counted as the CPU time of whoever keeps much of what it reads.
    """
    subprocess.run([sys.executable, "-c", f"import numpy; numpy.ones({TOUCHED} // 8)"], check=True)


def once(bench: Bench) -> None:
    """What S3 is asked for by four trials of two workers, three epochs each."""
    sizes = {path.relative_to(bench.folder / "bench").as_posix(): path.stat().st_size for path in bench.paths}
    with closing(Server(bench.folder / "bench", bench.fresh())) as server:
        for at_once in (True, False):
            cache = bench.fresh()
            trials = [4] if at_once else [1] * 4
            images = sum(together(bench, server, cache, number) for number in trials)
            requests = server.requests()
            wrong = exactly_once(requests, sizes) or "each was sent once"
            how = "at once" if at_once else "after each other"
            print(f"4 trials {how}, 2 workers, 3 epochs: {images} images ({4 * 3 * len(sizes)} expected), "
                  f"{len(requests)} requests for {len(sizes)} objects: {wrong}", flush=True)  # fmt: skip


def together(bench: Bench, server: Server, cache: Path, trials: int) -> int:
    """Runs trials of two workers at the same time on one cache; their images."""
    images = []
    with ExitStack() as stack:
        workers = [
            stack.enter_context(closing(bench.ours(f"{rank}/2", FOLDERS, cache, server)))
            for rank in range(2)
            for _ in range(trials)
        ]
        threads = [
            threading.Thread(target=lambda worker=worker: images.append(worker.turn(3, whole=True).images))
            for worker in workers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sum(images)


def memory(bench: Bench) -> None:
    """A worker's memory from its start to its third epoch, from S3; and that of an index as large as ImageNet's."""
    from tests.test_index import LARGE

    with closing(Server(bench.folder / "bench", bench.fresh())) as server:
        for name in OURS:
            with closing(bench.first(name, server)) as contender:
                turn = contender.turn(3, whole=True)
            print(f"{name}: a worker with its loader has {turn.memory / 1e6:.0f} MB without page cache", flush=True)
    done = subprocess.run([sys.executable, "-c", LARGE, str(bench.fresh())], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    print(f"index of 1.3 million images: loaded in {seconds:.2f} CPU s; the process that built it, too, "
          f"had at most {megabytes:.0f} MB", flush=True)  # fmt: skip


def store(bench: Bench) -> None:
    """Epochs when there is no room for pixels: each image is decoded each time."""
    with ExitStack() as stack:
        both = [
            stack.enter_context(closing(bench.ours(what, bench.files, bench.fresh()))) for what in ("jpeg", "decoding")
        ]
        for contender in both:
            contender.ready()
            contender.turn()
        found = []
        for _ in range(bench.rounds):
            found.append((both[0].turn(), both[1].turn()))
            bench.say(f"ours, simplejpeg alone: {found[-1][0].rate:.0f}, {found[-1][1].rate:.0f} images per CPU second")
    head("no room for pixels")
    row("ours", [ours for ours, _ in found])
    row("simplejpeg alone, no crop", [alone for _, alone in found], found)
    print()


def median(turns: Sequence[Turn]) -> float:
    """Of their rates."""
    return statistics.median(turn.rate for turn in turns)


def head(what: str) -> None:
    """The top of a table of `row`."""
    print(f"\n| {what} | images per CPU second | images per second | ours over it | least and most |")
    print("|---|---|---|---|---|")


def row(name: str, turns: Sequence[Turn], pairs: Sequence[tuple[Turn, Turn]] = ()) -> None:
    """Medians of some turns, and of the ratios of pairs of them."""
    wall = statistics.median(turn.images / turn.wall for turn in turns)
    ratios = sorted(one.rate / other.rate for one, other in pairs)
    over = [f"{statistics.median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"] if ratios else ["", ""]
    print(f"| {' | '.join([name, f'{median(turns):,.0f}', f'{wall:,.0f}', *over])} |")


PARTS = {"warm": warm, "cold": cold, "once": once, "memory": memory, "store": store}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({*WARM, *COLD})
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure")
    parser.add_argument("--peers", default=",".join(names), help="names with commas between them; empty for none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "raylaunch-bench-data")
    options = parser.parse_args()
    options.peers = [name for name in options.peers.split(",") if name]
    unknown = {*options.only.split(",")} - {*PARTS} | {*options.peers} - {*names}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}; peers: {', '.join(names)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    bench = Bench(options)
    bench.prepare()
    for part in options.only.split(","):
        PARTS[part](bench)


if __name__ == "__main__":
    main()
