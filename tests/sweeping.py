"""Small real sweeps for tests: the digits, timm's smallest ResNet, a few short trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.backends import backend
from launcher.pools import find_pool
from launcher.runs import Run, State
from tests.contract.grounds import until
from tests.tiny import new_run

SPACE: dict[str, Any] = {
    "optim.lr": {"loguniform": [0.003, 0.3]},
    "augment.policy": {"choice": ["none", "randaugment"]},
    "augment.magnitude": {"randint": [3, 15], "when": {"augment.policy": "randaugment"}},
}


def new_sweep(storage: Path | str, name: str = "sweep", **settings: Any) -> Run:
    """A sweep that is planned and recorded, not started; settings as for `new_run`."""
    given = {"sweep__trials": 6, "sweep__concurrent": 2, "sweep__space": SPACE, "train__epochs": 3, **settings}
    return new_run(storage, name, **given)


def run_to_end(sweep: Run, seconds: float = 240) -> State:
    """Carries a sweep out on this machine, as `launch sweep` does; its last state."""
    local = backend(find_pool("local"))
    local.submit(sweep)
    until(lambda: local.status(sweep).status.final, seconds)
    until(lambda: sweep.owner() is None)
    return local.status(sweep)
