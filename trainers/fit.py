"""One worker group from start to end: Ray Train's `TorchTrainer` around `work`, and why it failed if it did.

Used for a run by its driver, and for each trial of several workers by the trial's actor. It never tries again.
"""

from __future__ import annotations

import os
import secrets

from launcher.errors import BadImagesError, InfrastructureError, LaunchError, from_record
from launcher.runs import Run
from launcher.spec import Spec
from launcher.storage import cache_folder


def fit(run: Run, spec: Spec, attempt: int, began: float, *, part: str = "all") -> str:
    """Trains the run and exports it, or does only the `part` called `train` or `export`; `finished` or `cancelled`.

    Raises the error of the rank that failed first in earnest, in terms of who has to act.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from trainers.guards import classify
    from trainers.worker import work

    for entry in list(run.store.list("failures/")):
        run.store.delete(entry.key)
    workers, gpus = spec.resources.workers or 1, spec.resources.gpus_per_worker or 0
    # 0 is Ray Train's local mode: one worker in this process, without the 10 to 20 s that a local Ray takes.
    number = workers if workers > 1 or os.environ.get("RAY_ADDRESS") else 0
    resources = {"CPU": float(spec.resources.cpus_per_worker or 1)} | ({"GPU": float(gpus)} if gpus else {})
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "run": run.uri,
            "home": run.home.uri,
            "began": str(began),
            "attempt": str(attempt),
            "part": part,
        },
        scaling_config=ScalingConfig(num_workers=number, use_gpu=gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name=f"{run.name}-{secrets.token_hex(4)}",
            storage_path=str(cache_folder() / "ray"),
            # Ray takes a typo for a dead GPU; what is tried again is decided by the caller.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        return str(trainer.fit().return_value)
    except TrainingFailedError as error:
        raise _cause(run, spec, attempt, error) from error
    except Exception as error:
        raise _cause(run, spec, attempt, classify(error)) from error


def _cause(run: Run, spec: Spec, attempt: int, error: BaseException) -> LaunchError:
    """The error of the rank that failed first in earnest: a rank that only lost its peer counts last."""
    records = [run.read_json(entry.key) for entry in run.store.list(f"failures/{attempt:04d}-")]
    causes = [from_record(record) for record in records]
    causes.sort(key=lambda cause: isinstance(cause, InfrastructureError))
    if causes:
        cause = causes[0]
    elif isinstance(error, LaunchError):
        cause = error
    else:
        cause = InfrastructureError("a worker process was lost", hint="the run goes on from its last checkpoint")
    return all_bad(run.home, spec) if isinstance(cause, BadImagesError) else cause


def all_bad(run: Run, spec: Spec) -> LaunchError:
    """Too many images cannot be read: looks at all, so that they can be mended in one go."""
    from trainers.data.index import Index
    from trainers.data.loader import scan
    from trainers.data.source import Source

    index = Index.load(run.store)
    bad = scan(Source(index))
    images = len(index.table)
    listed = [{"key": key, "reason": reason} for key, reason in sorted(bad.items())]
    run.write_json("data_report.json", {"images": images, "bad": listed})
    named = ", ".join(f"{key} ({reason})" for key, reason in sorted(bad.items())[:3])
    return BadImagesError(
        f"{len(bad):,} of {images:,} images cannot be read ({len(bad) / images:.1%}, "
        f"more than {spec.data.max_bad_fraction:.1%}): {named}{', ...' if len(bad) > 3 else ''}",
        where=f"{run.uri}/data_report.json",
        hint="mend or remove the images listed there, or --set data.max_bad_fraction=0.1 to go on without them",
    )
