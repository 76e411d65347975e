"""`python -m trainers.submitter RUN_URI --config FOLDER …`: keeps one run going on its Ray cluster until it has ended.

What the supervisor is on a laptop, this is in a cluster, in a pod of its own beside Ray's head. It submits the driver
once, however often it is restarted itself; submits it again, to go on from the last checkpoint, where the head or the
driver was lost; ends a run that shows no sign of progress. It leaves only when the run's end is on record: until then
KubeRay keeps the cluster, and with it the GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from launcher.errors import BugError, Exit, InfrastructureError, LaunchError, NeverStartedError, SiteError
from launcher.journal import Journal, open_journal
from launcher.runs import STRIKES, Run, State, Status, driver_command
from launcher.spec import Spec
from trainers.lease import NOT_BEGUN

POLL_SECONDS = 2.0
ANSWER_SECONDS = 30.0
"""A node that is lost never closes a connection: a request without an answer is given up after this long."""
LOOK_SECONDS = 30.0
"""How often the run directory is looked at for signs of progress."""
SIGNS = ("progress.jsonl", "events.jsonl", "index.parquet", "checkpoints/", "sweep.json", "trials/")


class Jobs(Protocol):
    """The part of Ray's `JobSubmissionClient` that is used."""

    def get_job_info(self, job_id: str) -> Any: ...
    def submit_job(self, *, entrypoint: str, submission_id: str) -> str: ...
    def stop_job(self, job_id: str) -> bool: ...
    def delete_job(self, job_id: str) -> bool: ...


def main() -> None:
    """Entry point; exits with 0 once the run's end is on record, whatever it was."""
    parser = argparse.ArgumentParser(prog="trainers.submitter")
    parser.add_argument("run_uri")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--submission", required=True)
    parser.add_argument("--start-seconds", type=float, required=True)
    parser.add_argument("--idle-seconds", type=float, required=True)
    given = parser.parse_args()
    run = Run.at(given.run_uri)
    make_directory(run, given.config)
    out = open_journal(run.store, "logs/submitter.log")

    def tell(line: str) -> None:
        stamped = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}"
        print(stamped, flush=True)
        out.write(stamped.encode() + b"\n")
        out.flush()

    try:
        Submitter(
            run, connect, tell, submission=given.submission, start_seconds=given.start_seconds,
            idle_seconds=given.idle_seconds,
        ).supervise()  # fmt: skip
    finally:
        out.close()


def make_directory(run: Run, config: Path) -> None:
    """Makes the run directory if the client has not: `kubectl apply` of a printed manifest is enough to start a run."""
    if not run.exists():
        spec = Spec.model_validate_json((config / "spec.json").read_text())
        try:
            run.create(spec, json.loads((config / "plan.json").read_text()))
        except LaunchError:  # another submitter of the same run was faster
            if not run.exists():
                raise


def connect() -> Jobs:
    """The jobs of the cluster at `$RAY_DASHBOARD_ADDRESS`; Ray takes the token from the environment."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=ANSWER_SECONDS, **more)

    address = os.environ["RAY_DASHBOARD_ADDRESS"]
    jobs: Jobs = Client(address if "://" in address else f"http://{address}")
    return jobs


class Submitter:
    """`job` is the id under which KubeRay watches the run's job.

    `submission` tells this RayJob from earlier ones of the run. What a submitter that replaces this one has to know
    is kept in submission.json.
    """

    def __init__(
        self, run: Run, connect: Callable[[], Jobs], tell: Callable[[str], None], *, submission: str,
        start_seconds: float, idle_seconds: float, sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.run, self.connect, self.tell = run, connect, tell
        self.start_seconds, self.idle_seconds = start_seconds, idle_seconds
        self.sleep, self.clock = sleep, clock
        self.job = os.environ.get("RAY_JOB_SUBMISSION_ID") or run.name
        self.entrypoint = driver_command(run.uri)
        self.jobs: Jobs | None = None
        self.began = clock()
        known = run.read_json("submission.json") or {}
        mine: dict[str, Any] = {"id": submission, "began": time.time(), "times": 0, "strikes": 0, "step": -1}
        self.memory = known if known.get("id") == submission else mine
        if self.memory is mine:
            # Before there is a driver, which reads when its cluster was up.
            run.write_json("submission.json", mine)
        self.due: dict[str, int] | None = None
        self.reached = bool(self.memory["times"])
        self.sign: Any = None
        self.signed = self.looked = clock()
        self.told = ""
        self.announced = -1

    def supervise(self) -> None:
        """Returns when the run's end is on record."""
        while not self._once():
            self.sleep(POLL_SECONDS)

    def _once(self) -> bool:
        """Looks once and does what is due; whether the end is on record."""
        try:
            return self._look()
        except (InfrastructureError, ConnectionError) as error:
            return self._unreachable(str(error))
        except SiteError as error:
            # Credentials that expired may be renewed; a bucket that never let us in will not begin to.
            if not self.memory["times"] or self.clock() - self.signed > self.idle_seconds:
                raise
            return self._unreachable(str(error))

    def _look(self) -> bool:
        state = self.run.state()
        if state.status.final:
            self.tell(f"the run is over: {state.status.lower()}")
            return self._wait_for_driver()
        info = self._info()
        self.reached = True
        if info is None:
            return self._submit("the head was replaced" if self.memory["times"] else "")
        if self.due or not self.memory["times"]:
            self._remember()  # the answer to the submission was lost, or the submitter that made it
        self._tell_once(f"job {self.job}: {info.status.value}")
        if info.status.is_terminal():
            return self._ended_without_record(info)
        return self._idle()

    def _ask(self, question: Callable[[Jobs], Any]) -> Any:
        """What the head answers; `ConnectionError` if that is nothing, or a refusal."""
        from ray.exceptions import AuthenticationError

        try:
            if self.jobs is None:
                self.jobs = self.connect()
            return question(self.jobs)
        except (RuntimeError, AuthenticationError) as error:
            raise ConnectionError(str(error)) from error
        except OSError as error:
            raise ConnectionError(f"the head does not answer ({type(error).__name__})") from error

    def _info(self) -> Any:
        """What Ray knows of the job, or None if it knows of none."""
        try:
            return self._ask(lambda jobs: jobs.get_job_info(self.job))
        except ConnectionError as error:
            if "status code 404" in str(error) and self.jobs is not None:
                return None
            raise

    def _submit(self, lost: str) -> bool:
        """Submits the driver; `lost` says what became of the one before."""
        run = self.run
        if run.cancel_requested():
            return self._end(Status.CANCELLED, None, lost or "it was cancelled before it began")
        step = run.milestone()
        strikes = self.memory["strikes"] + 1 if lost and step <= self.memory["step"] else 0
        if lost:
            if strikes >= STRIKES:
                return self._end(Status.FAILED, InfrastructureError(
                    f"{lost}; {STRIKES} times in a row without a new checkpoint", where="the cluster",
                    hint=f"launch logs {run.name}, then launch resume {run.name}"))  # fmt: skip
            self._announce(lost, step)
        self.due = {"times": self.memory["times"] + 1, "strikes": strikes, "step": step}
        try:
            self._ask(lambda jobs: jobs.submit_job(entrypoint=self.entrypoint, submission_id=self.job))
        except ConnectionError as error:
            # Submitted just now by a submitter that was then lost: Ray's id keeps it from being done twice.
            if "already exists" not in str(error):
                raise
        self.tell(f"submitted {self.entrypoint}")
        self._remember()
        return False

    def _announce(self, lost: str, step: int) -> None:
        """Says once for each loss, not for each try to make it good, that the run goes on."""
        if self.announced == self.memory["times"]:
            return
        self.tell(f"{lost}; going on from step {max(step, 0):,}")
        self.run.update(status=Status.RECOVERING, reason=lost, hint="")
        journal = Journal(self.run.store, "events.jsonl")
        journal.write("retry", error={"what": lost}, step=step)
        journal.close()
        self.announced = self.memory["times"]

    def _remember(self) -> None:
        """Notes a submission for whoever replaces this submitter."""
        memory = self.memory | (self.due or {"times": 1, "strikes": 0, "step": self.run.milestone()})
        self.run.write_json("submission.json", memory)
        self.memory, self.due = memory, None
        self.sign, self.signed = None, self.clock()

    def _ended_without_record(self, info: Any) -> bool:
        """The driver's process is gone, and it has not said why: killed, or it never got so far."""
        state = self.run.state()
        if state.status.final:
            return False
        code = info.driver_exit_code
        said = str(info.message or "").strip()
        if code == Exit.NOT_FINISHED:
            self.tell("another attempt of the run has taken over: it is no longer ours")
            return True
        if code == NOT_BEGUN:
            self._ask(lambda jobs: jobs.delete_job(self.job))
            return self._submit("the driver could not begin")
        if code is not None and 0 <= code < 128:
            # A driver ends by itself only after it has recorded why.
            last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
            self.tell(said)
            return self._end(Status.FAILED, BugError(
                f"the driver ended with exit code {code} before it could say why: {last[:300]}", where="driver",
                hint=f"launch logs {self.run.name}"))  # fmt: skip
        self._ask(lambda jobs: jobs.delete_job(self.job))
        return self._submit("the driver was killed" if code is None else f"the driver was killed (exit code {code})")

    def _idle(self) -> bool:
        """Ends a run of which the run directory shows nothing new for too long."""
        now = self.clock()
        if now - self.looked < LOOK_SECONDS:
            return False
        self.looked = now
        sign = [entry for prefix in SIGNS for entry in self.run.store.list(prefix)]
        if sign != self.sign:
            self.sign, self.signed = sign, now
        if now - self.signed < self.idle_seconds:
            return False
        error = InfrastructureError(
            f"no sign of progress for {self.idle_seconds / 60:.0f} minutes, so the GPUs are given back",
            where="limits.idle_minutes", hint=f"launch logs {self.run.name}, then launch resume {self.run.name}",
        )  # fmt: skip
        ended = self._end(Status.FAILED, error)
        self._ask(lambda jobs: jobs.stop_job(self.job))
        return ended

    def _unreachable(self, reason: str) -> bool:
        """Waits for the head; gives up only if it never answered. A head that is gone is KubeRay's to replace."""
        self.jobs = None
        self._tell_once(reason)
        if not self.reached and self.clock() - self.began > self.start_seconds:
            with suppress(InfrastructureError):
                return self._end(Status.FAILED, NeverStartedError(
                    f"Ray's head did not answer for {self.start_seconds / 60:.0f} minutes ({reason})", where="the head",
                    hint=f"kubectl logs -l ray.io/node-type=head,raylaunch.dev/run={self.run.name}"))  # fmt: skip
        return False

    def _wait_for_driver(self) -> bool:
        """A recorded end is shown by the driver's own before the cluster may go; one that hangs is not waited for."""
        deadline = self.clock() + 60.0
        while self.clock() < deadline:
            try:
                info = self._info()
            except ConnectionError:
                break
            if info is None or info.status.is_terminal():
                break
            self.sleep(POLL_SECONDS)
        return True

    def _end(self, status: Status, error: LaunchError | None, reason: str = "") -> bool:
        """Records an end that no driver can record any more."""
        told = error.to_record() if error else None
        state: State = self.run.update(status=status, reason=reason, hint="", error=told, ended=time.time())
        self.run.clear_cancel()
        self.tell(f"{state.status.lower()}: {error or reason}")
        return True

    def _tell_once(self, line: str) -> None:
        if line != self.told:
            self.told = line
            self.tell(line)


if __name__ == "__main__":
    main()
    sys.exit(0)
