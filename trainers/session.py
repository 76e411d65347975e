"""The driver's own Ray: its settings, and room for the workers and trials of its run."""

from __future__ import annotations

import os
import secrets
from typing import Any

from launcher.spec import Spec

SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Relative paths in a spec mean the folder where the user stood.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A trial that failed has no figures.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Tune's own record of a sweep is never read.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    # Time for the last checkpoint of a trial that is asked to stop.
    "TUNE_FORCE_TRIAL_CLEANUP_S": "180",
}


def settle() -> None:
    """Sets what Ray reads when it is imported; call it before."""
    os.environ.update(SETTINGS)
    # A token of its own keeps Ray from writing one that others on the machine can read.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def start(spec: Spec) -> None:
    """Connects to the cluster this driver is in, or starts a Ray of its own; `settle` was called."""
    import ray

    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address:
        ray.init(address=address, **quiet)
        return
    at_once, sharing = (spec.sweep.concurrent or 1, spec.sweep.trials_per_gpu) if spec.sweep else (1, 1)
    workers, each = (spec.resources.workers or 1) * at_once, spec.resources
    ray.init(
        address="local", num_cpus=workers * (each.cpus_per_worker or 1),
        num_gpus=-(-workers * (each.gpus_per_worker or 0) // sharing), resources={"trial": at_once},
        include_dashboard=False, **quiet,
    )  # fmt: skip
