"""Things that are measured against one another: each a process of its own, and each does an epoch when it has its turn.

The one who measures starts them, gives turns and counts the CPU time of each and all its children. It needs nothing
but the standard library and psutil, for peers run where this project is not installed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

SIDE, BATCH, WORKERS = 224, 64, 2
"""What all of them do: random resized crops of this many pixels, uint8, in batches, with threads or processes."""


def take_turns(epoch: Callable[[], int]) -> None:
    """In the process that is measured: does an epoch for each line of the input, and answers how many images it had."""
    # What packages print is not an answer, nor what their children do.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        print(epoch(), file=answers, flush=True)


@dataclass(frozen=True)
class Turn:
    """What one turn took.

    Attributes:
        images: in its batches.
        cpu: seconds of the process and all its children.
        wall: seconds.
        memory: most bytes, at any time, that no file backs: of the process alone, whose children do not count.
    """

    images: int
    cpu: float
    wall: float
    memory: int

    @property
    def rate(self) -> float:
        """Images per CPU second."""
        return self.images / self.cpu


class Failed(Exception):
    """A process that is measured has ended; the message is the end of what it said."""


class Contender:
    """A process that takes turns.

    Args:
        command: what to start; its input and output are those of `take_turns`.
        log: a file for whatever else it says.
        environment: variables to add.
    """

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as sink:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True,
                env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip
        self._began = time.monotonic()

    def ready(self) -> None:
        """Waits until it is ready for its first turn. Raises `Failed`."""
        self._answer()

    def turn(self, epochs: int = 1, whole: bool = False) -> Turn:
        """Lets it do some epochs; with `whole`, all that it did since it was started counts. Raises `Failed`."""
        if whole:
            self.ready()
        began, cpu = (self._began, 0.0) if whole else (time.monotonic(), self._cpu())
        images, memory = 0, [0]
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(memory, done))
        watch.start()
        try:
            for _ in range(epochs):
                assert self._process.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.write("\n")
                    self._process.stdin.flush()
                images += int(self._answer())
            return Turn(images, self._cpu() - cpu, time.monotonic() - began, memory[0])
        finally:
            done.set()
            watch.join()

    def close(self) -> None:
        """Ends it, and whatever it left behind."""
        import signal

        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            self.close()
            raise Failed("\n".join(self._log.read_text().strip().splitlines()[-3:]) or "it said nothing")
        return line

    def _cpu(self) -> float:
        """Seconds that the process and all its children have taken."""
        import psutil

        total = 0.0
        first = psutil.Process(self._process.pid)
        for process in (first, *first.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def _watch(self, memory: list[int], done: threading.Event) -> None:
        while not done.wait(0.1):
            with contextlib.suppress(OSError):
                memory[0] = max(memory[0], resident(self._process.pid))


def resident(process: int) -> int:
    """Bytes in memory that no file backs: what remains when the page cache is left out."""
    kinds = ("RssAnon:", "RssShmem:")
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(kinds))
