"""`python -m trainers.driver RUN_URI`: one attempt of a run, the same on a laptop and in a cluster.

It prepares what all workers share (index, first weights), runs Ray Train's `TorchTrainer`, tries again after a lost
worker, and writes how the attempt ended to the run directory. It never trains in itself and never prints for a user.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import replace
from typing import Any

from launcher.errors import BadImagesError, Exit, FencedError, InfrastructureError, LaunchError, UserError, from_record
from launcher.journal import Journal
from launcher.runs import STRIKES, Run, Status, checkpoint_steps
from launcher.spec import Spec
from launcher.storage import cache_folder
from trainers.lease import NOT_BEGUN, Lease, wait_for_others
from trainers.ranklog import UtcFormatter, process_log

log = logging.getLogger(__name__)

RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Relative paths in a spec mean the folder where the user stood.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


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
        step = self.run.latest_step()
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
        self.prepare(spec)
        if (spec.resources.workers or 1) > 1 or os.environ.get("RAY_ADDRESS"):
            _start_ray(spec)
        strikes = 0
        while True:
            before = run.latest_step()
            try:
                return self._fit(spec)
            except InfrastructureError as error:
                strikes = 0 if run.latest_step() > before else strikes + 1
                if strikes >= STRIKES:
                    raise InfrastructureError(
                        f"{error.what}; {STRIKES} times in a row without a new checkpoint", where=error.where,
                        hint=f"see launch logs {run.name}, then launch resume {run.name}",
                    ) from error  # fmt: skip
                self.events.write("retry", error=error.to_record(), step=run.latest_step())
                run.update(status=Status.RECOVERING, reason=error.what)
                time.sleep(strikes)

    def prepare(self, spec: Spec) -> None:
        """Makes what all workers share: the index, and a checkpoint of step 0."""
        from trainers import checkpoint, model
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
        if checkpoint_steps(run.store):
            return
        network = model.initial(spec, len(index.classes))
        model.freeze(network, spec.model.freeze)
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        checkpoint.save(run.store, checkpoint.Snapshot(0, spec.fingerprint(), {"weights": weights}, {}))

    def _fit(self, spec: Spec) -> str:
        """One worker group from start to end."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.config import LoggingConfig

        from trainers.guards import classify
        from trainers.worker import work

        for entry in list(self.run.store.list("failures/")):
            self.run.store.delete(entry.key)
        workers, gpus = spec.resources.workers or 1, spec.resources.gpus_per_worker or 0
        # 0 is Ray Train's local mode: one worker in this process, without the 10 to 20 s that a local Ray takes.
        number = workers if workers > 1 or os.environ.get("RAY_ADDRESS") else 0
        resources = {"CPU": float(spec.resources.cpus_per_worker or 1)} | ({"GPU": float(gpus)} if gpus else {})
        trainer = TorchTrainer(
            work,
            train_loop_config={"run": self.run.uri, "began": str(self.began), "attempt": str(self.number)},
            scaling_config=ScalingConfig(num_workers=number, use_gpu=gpus > 0, resources_per_worker=resources),
            run_config=RunConfig(
                name=f"{self.run.name}-{secrets.token_hex(4)}",
                storage_path=str(cache_folder() / "ray"),
                # Ray takes a typo for a dead GPU; what is tried again is decided here.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            return str(trainer.fit().return_value)
        except TrainingFailedError as error:
            raise self._cause(spec, error) from error
        except Exception as error:
            raise self._cause(spec, classify(error)) from error

    def _cause(self, spec: Spec, error: BaseException) -> LaunchError:
        """The error of the rank that failed first in earnest: a rank that only lost its peer counts last."""
        mine = f"failures/{self.number:04d}-"
        records = [self.run.read_json(entry.key) for entry in self.run.store.list(mine)]
        causes = [from_record(record) for record in records]
        causes.sort(key=lambda cause: isinstance(cause, InfrastructureError))
        if causes:
            cause = causes[0]
        elif isinstance(error, LaunchError):
            cause = error
        else:
            cause = InfrastructureError("a worker process was lost", hint="the run goes on from its last checkpoint")
        if isinstance(cause, BadImagesError):
            return self._all_bad(spec)
        return cause

    def _all_bad(self, spec: Spec) -> LaunchError:
        """Too many images cannot be read: looks at all, so that they can be mended in one go."""
        from trainers.data.index import Index
        from trainers.data.loader import scan
        from trainers.data.source import Source

        index = Index.load(self.run.store)
        bad = scan(index, Source(index), os.cpu_count() or 1)
        images = len(index.table)
        listed = [{"key": key, "reason": reason} for key, reason in sorted(bad.items())]
        self.run.write_json("data_report.json", {"images": images, "bad": listed})
        named = ", ".join(f"{key} ({reason})" for key, reason in sorted(bad.items())[:3])
        return BadImagesError(
            f"{len(bad):,} of {images:,} images cannot be read ({len(bad) / images:.1%}, "
            f"more than {spec.data.max_bad_fraction:.1%}): {named}{', ...' if len(bad) > 3 else ''}",
            where=f"{self.run.uri}/data_report.json",
            hint="mend or remove the images listed there, or --set data.max_bad_fraction=0.1 to go on without them",
        )

    def _finish(self, ended: Status, error: LaunchError | None) -> None:
        run = self.run
        final = run.metrics().get("final", {})
        keys = ("split", "epoch", "count", "top1", "top5", "macro_f1", "loss")
        result: dict[str, Any] = {key: final[key] for key in keys if key in final}
        told = error.to_record() if error else None
        state = replace(run.state(), status=ended, reason="", error=told, result=result, ended=time.time())
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


def _start_ray(spec: Spec) -> None:
    os.environ.update(RAY_SETTINGS)
    # A token of its own keeps Ray from writing one that others on the machine can read.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address:
        ray.init(address=address, **quiet)
        return
    workers, each = spec.resources.workers or 1, spec.resources
    ray.init(
        address="local", num_cpus=workers * (each.cpus_per_worker or 1), num_gpus=workers * (each.gpus_per_worker or 0),
        include_dashboard=False, **quiet,
    )  # fmt: skip


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
