"""Runs on this machine: each under a supervisor process of its own, which outlives the terminal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

from launcher.backends import runs_of, stored_logs
from launcher.errors import BugError, NotFinishedError, SiteError, UserError
from launcher.runs import Run, State, Status
from launcher.storage import cache_folder

START_SECONDS = 30.0
"""A supervisor that does not hold the run by then has failed."""


class LocalBackend:
    """See `Backend`."""

    def submit(self, run: Run) -> None:
        if run.owner() is not None:
            raise UserError(f"{run.name} is running already", where=run.uri, hint=f"launch attach {run.name}")
        if find_spec("ray") is None or find_spec("timm") is None:
            raise SiteError("training on this machine needs torch, timm and ray", where="local",
                            hint="pip install 'raylaunch[train]'")  # fmt: skip
        run.clear_cancel()
        run.update(status=Status.PENDING, reason="", error=None, ended=None)
        log = cache_folder() / "supervisors" / f"{run.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # The driver starts its own Ray; one that happens to be named in the environment is not asked.
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with open(log, "wb") as out:
            begun = subprocess.run(
                [sys.executable, "-m", "launcher.backends.supervisor", run.uri],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, check=False,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while run.owner() is None and not run.state().status.final:
            if begun.returncode or time.monotonic() > deadline:
                raise BugError("the supervisor did not start", where=str(log), hint=f"launch resume {run.name}")
            time.sleep(0.05)

    def status(self, run: Run) -> State:
        state = run.state()
        if state.status.final:
            return state
        if run.owner() is not None:
            return replace(state, status=Status.CANCELLING) if run.cancel_requested() else state
        # The end is written before the lease is given back: with no owner left, what it says now is the last word.
        state = run.state()
        if state.status.final:
            return state
        return replace(state, status=Status.INTERRUPTED, reason="nothing drives it any more")

    def logs(self, run: Run, only: str = "") -> Iterator[tuple[str, str]]:
        return stored_logs(run, lambda: self.status(run).status.final, only)

    def cancel(self, run: Run, *, force: bool = False) -> None:
        if run.owner() is not None:
            run.request_cancel(force=force)

    def list(self, storage: str) -> Iterator[tuple[Run, State]]:
        for run in runs_of("local", storage):
            try:
                yield run, self.status(run)
            except SiteError as error:
                # A damaged file costs its own run the status, not the others the list.
                yield run, State(Status.INTERRUPTED, reason=str(error))

    def delete(self, run: Run) -> None:
        if run.owner() is not None:
            raise NotFinishedError(f"{run.name} is still running", where=run.uri, hint=f"launch cancel {run.name}")
        run.delete()
