"""`python -m launcher.backends.supervisor RUN_URI`: keeps one run going on this machine until it has ended.

It starts the driver, and starts it again if it was killed; it confirms the lease, stores the driver's output, ends
what a cancelled driver leaves behind. It imports nothing heavy, and never decides how a run ended if the driver did.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from typing import IO

import psutil

from launcher.errors import BugError, InfrastructureError, LaunchError
from launcher.journal import Journal, open_journal
from launcher.runs import STRIKES, Owner, Run, Status

GRACE_SECONDS = 60.0
"""Time a cancelled run has for its last checkpoint."""
LEASE_EVERY = 15.0
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Entry point."""
    # The caller gets its process back at once; this one belongs to nobody, and no terminal's end reaches it.
    if os.fork():
        os._exit(0)
    os.setsid()
    run = Run.at(sys.argv[1])
    if run.owner() is not None:
        sys.exit(f"{run.uri} is driven by another process")
    Supervisor(run).supervise()


class Supervisor:
    """Holds the lease of a run while it lives."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.driver: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()

    def supervise(self) -> None:
        """Returns when the run has ended, and nothing of it is left on this machine."""
        _adopt_orphans()
        signal.signal(signal.SIGTERM, self._terminated)
        owner = Owner.me()
        self.run.hold(owner)
        threading.Thread(target=self._confirm, args=(owner,), daemon=True).start()
        try:
            self._attempts()
        finally:
            self._over.set()
            _kill_descendants()
            self.run.release()

    def _attempts(self) -> None:
        strikes = 0
        while True:
            before = self.run.milestone()
            code = self._attempt()
            _kill_descendants()
            if self.run.state().status.final:
                return
            if self.run.cancel_requested():
                self.run.clear_cancel()
                self.run.update(
                    status=Status.CANCELLED, reason="it did not stop in time and was killed", ended=time.time()
                )
                return
            strikes = 0 if self.run.milestone() > before else strikes + 1
            died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            # A driver ends by itself only after it has recorded why; an exit code here means it never got so far.
            if code >= 0:
                self._fail(BugError(f"the driver ended with {died} before it could say why", where="driver",
                                    hint=f"launch logs {self.run.name}"))  # fmt: skip
                return
            if strikes >= STRIKES:
                self._fail(InfrastructureError(
                    f"the driver was killed ({died}) {STRIKES} times without a new checkpoint", where="driver",
                    hint=f"dmesg tells if memory ran out; launch resume {self.run.name}"))  # fmt: skip
                return
            self.run.update(status=Status.RECOVERING, reason=f"the driver was killed ({died})")
            journal = Journal(self.run.store, "events.jsonl")
            journal.write("retry", error={"what": f"the driver was killed ({died})"}, step=self.run.milestone())
            journal.close()

    def _attempt(self) -> int:
        """One life of the driver; its exit code, negative for a signal."""
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "trainers.driver", self.run.uri],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"RAYLAUNCH_SUPERVISOR": str(os.getpid()), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert self.driver.stdout is not None
        pump = threading.Thread(target=self._store_output, args=(self.driver.stdout,), daemon=True)
        pump.start()
        asked: float | None = None
        while True:
            try:
                code = self.driver.wait(timeout=1.0)
                break
            except subprocess.TimeoutExpired:
                pass
            request = self._cancel()
            if request is not None:
                asked = asked or time.monotonic()
                if request.get("force") or time.monotonic() - asked > GRACE_SECONDS:
                    self.driver.kill()
        # What the driver started may still hold its end of the pipe.
        _kill_descendants()
        pump.join(timeout=10)
        return code

    def _cancel(self) -> dict[str, object] | None:
        try:
            request: dict[str, object] | None = self.run.read_json("cancel.json")
            return request
        except LaunchError:
            return None

    def _store_output(self, stream: IO[bytes]) -> None:
        out = open_journal(self.run.store, "logs/driver.log")
        for line in stream:
            out.write(line)
            out.flush()
        out.close()

    def _confirm(self, owner: Owner) -> None:
        while not self._over.wait(LEASE_EVERY):
            try:
                self.run.hold(owner)
            except LaunchError as error:
                print(error, flush=True)

    def _fail(self, error: LaunchError) -> None:
        self.run.update(status=Status.FAILED, reason="", error=error.to_record(), ended=time.time())

    def _terminated(self, *_: object) -> None:
        """The machine shuts down, or somebody wants this run gone: leave it to `resume`."""
        _kill_descendants()
        self.run.update(status=Status.INTERRUPTED, reason="it was terminated", ended=time.time())
        self.run.release()
        os._exit(128 + signal.SIGTERM)


def _adopt_orphans() -> None:
    """Makes processes whose parent dies children of this one, so that none can outlive the run (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_descendants() -> None:
    """Kills every process below this one, and those they start meanwhile."""
    while children := [child for child in psutil.Process().children(recursive=True) if child.is_running()]:
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        _, alive = psutil.wait_procs(children, timeout=5)
        if not alive:
            break


if __name__ == "__main__":
    main()
