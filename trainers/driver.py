"""`python -m trainers.driver RUN_URI`: one attempt of a run, the same on a laptop and in a cluster.

It prepares what all workers share (index, first weights), trains or searches, tries again after a lost worker, and
writes how the attempt ended to the run directory. It never trains in itself and never prints for a user.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from dataclasses import replace
from typing import Any

from launcher.errors import Exit, FencedError, InfrastructureError, LaunchError, UserError
from launcher.journal import Journal
from launcher.runs import STRIKES, Run, Status, checkpoint_steps
from launcher.spec import Spec
from launcher.storage import Store
from trainers import session
from trainers.fit import fit
from trainers.lease import NOT_BEGUN, Lease, wait_for_others
from trainers.ranklog import UtcFormatter, process_log

log = logging.getLogger(__name__)


def main() -> None:
    """Entry point; exits with the attempt's code."""
    # GNU OpenMP's threads spin for milliseconds at each barrier; with the loader's threads on the same cores that makes
    # a small model's step up to three times slower. Read when torch is loaded, which happens later.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    handler = logging.StreamHandler()
    handler.setFormatter(UtcFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    run = Run.at(sys.argv[1])
    if _supervised():
        _end_with_parent()
        code = Driver(run).drive()
    else:
        with process_log(run, "driver"):
            code = Driver(run).drive()
    sys.stdout.flush()
    sys.stderr.flush()
    # Ray's exit hooks abort the process when a worker was killed; all that matters is on disk.
    os._exit(code)


class Driver:
    """One attempt."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.began = time.time()

    def drive(self) -> int:
        """Runs the attempt to its end and records it; returns the exit code."""
        if _supervised():
            return self._attempt(self._begin())
        try:
            wait_for_others(self.run)
            record = self._begin()
        except LaunchError:
            log.exception("the attempt cannot begin now")
            return NOT_BEGUN
        try:
            with Lease(self.run, self.number, record):
                return self._attempt(record)
        except FencedError as error:
            log.warning("%s", error)
            return int(error.exit_code)

    def _begin(self) -> dict[str, Any]:
        """Takes the next attempt; its record."""
        step = self.run.milestone()
        record = {"began": self.began, "host": socket.gethostname(), "pid": os.getpid(), "from_step": step}
        self.number = self.run.begin_attempt(record)
        return record

    def _attempt(self, record: dict[str, Any]) -> int:
        run, number = self.run, self.number
        self.events = Journal(run.store, "events.jsonl")
        status = Status.RECOVERING if number > 1 else Status.STARTING
        run.update(status=status, attempt=number, reason="", hint="", error=None, ended=None)
        self.events.write("attempt", number=number, from_step=max(record["from_step"], 0), host=record["host"])
        error: LaunchError | None = None
        try:
            ended = Status.SUCCEEDED if self._train() == "finished" else Status.CANCELLED
        except BaseException as raised:
            from trainers.guards import classify

            log.exception("the attempt failed")
            error, ended = classify(raised), Status.FAILED
        run.check_attempt(number)
        run.write_json(f"attempts/{number:04d}.json", {**record, "ended": time.time(), "outcome": ended})
        self._finish(ended, error)
        return int(error.exit_code if error else ended.exit_code)

    def _train(self) -> str:
        run = self.run
        if run.cancel_requested():
            return "cancelled"
        spec = run.spec()
        session.settle()
        self.prepare(spec)
        if spec.sweep is not None:
            from trainers.sweep import Search

            return Search(run, spec, self.number, self.began, self.events).run_to_end()
        if (spec.resources.workers or 1) > 1 or os.environ.get("RAY_ADDRESS"):
            session.start(spec)
        strikes = 0
        while True:
            before = run.milestone()
            try:
                return fit(run, spec, self.number, self.began)
            except InfrastructureError as error:
                strikes = 0 if run.milestone() > before else strikes + 1
                if strikes >= STRIKES:
                    raise InfrastructureError(
                        f"{error.what}; {STRIKES} times in a row without a new checkpoint", where=error.where,
                        hint=f"see launch logs {run.name}, then launch resume {run.name}",
                    ) from error  # fmt: skip
                self.events.write("retry", error=error.to_record(), step=run.milestone())
                run.update(status=Status.RECOVERING, reason=error.what)
                time.sleep(strikes)

    def prepare(self, spec: Spec) -> None:
        """Makes what all workers, or all trials, share: the index, and the weights to begin with."""
        from trainers.data.index import Index, build_index

        run = self.run
        try:
            index = Index.load(run.store)
        except FileNotFoundError:
            index = build_index(spec.data)
            index.save(run.store)
        images = len(index.rows("train"))
        workers, batch = spec.resources.workers or 1, spec.train.batch_size or 1
        least = images // -(-images // batch)
        if least < workers:
            raise UserError(f"{workers} workers cannot share a batch of {least} images", where="train.batch_size",
                            hint="fewer --workers, or a larger --batch-size")  # fmt: skip
        if spec.sweep is None:
            _begin_with(spec, run.store, len(index.classes))
        else:
            from trainers.resume import first_weights
            from trainers.trial import starts

            for variant in starts(spec):
                _begin_with(variant, first_weights(run, variant), len(index.classes))

    def _finish(self, ended: Status, error: LaunchError | None) -> None:
        run = self.run
        told = error.to_record() if error else None
        state = replace(run.state(), status=ended, reason="", error=told, result=run.figures(), ended=time.time())
        try:
            from trainers import report

            # The page shows the end, which is recorded only when the page is there.
            report.write(run, state)
        except Exception:  # a run does not fail for its report, which can be made again
            log.exception("the report was not written; launch report makes it anew")
        self.events.write("end", status=ended)
        self.events.close()
        run.clear_cancel()
        run.set_state(state)


def _begin_with(spec: Spec, store: Store, classes: int) -> None:
    """Writes the checkpoint of step 0, unless there is one of any step."""
    from trainers import checkpoint, model

    if checkpoint_steps(store):
        return
    network = model.initial(spec, classes)
    model.freeze(network, spec.model.freeze)
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    checkpoint.save(store, checkpoint.Snapshot(0, spec.fingerprint(), {"weights": weights}, {}))


def _supervised() -> bool:
    """Whether a supervisor on this machine started the driver: it holds the lease and stores the output."""
    return os.environ.get("RAYLAUNCH_SUPERVISOR") == str(os.getppid())


def _end_with_parent() -> None:
    """A driver whose supervisor was killed must not train on beside the one that replaces it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(Exit.NOT_FINISHED)

    threading.Thread(target=watch, daemon=True, name="parent-watcher").start()


if __name__ == "__main__":
    main()
