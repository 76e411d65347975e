"""Small real runs for tests: the digits, timm's smallest ResNet, a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.pools import Pool
from launcher.preflight import prepare
from launcher.runs import Run
from launcher.specfile import Draft
from trainers.driver import Driver

POOL = Pool("local", cpus=2, memory=8 * 1024**3)
SETTINGS: dict[str, Any] = {
    "data.uri": "sample://digits",
    "model.name": "test_resnet",
    "model.pretrained": "none",
    "optim.lr": 0.05,
    "train.epochs": 2,
    "train.batch_size": 64,
    "resources.cpus_per_worker": 1,
}


def new_run(storage: Path | str, name: str = "run", pool: Pool = POOL, **settings: Any) -> Run:
    """A run that is planned and recorded, not started; settings are spec fields with `__` for the dot."""
    draft = Draft()
    chosen = {key.replace("__", "."): value for key, value in settings.items()}
    for key, value in {**SETTINGS, "name": name, "storage": str(storage), **chosen}.items():
        draft.put(key, value, "test")
    plan, index = prepare(draft, pool)
    run = Run(str(storage), name)
    run.create(plan.spec, plan.to_json())
    if index is not None:
        index.save(run.store)
    return run


def drive(run: Run) -> int:
    """One attempt in this process, with Ray Train's local mode; the exit code."""
    return Driver(run).drive()


def weights(run: Run) -> bytes:
    """The exported weights, byte for byte."""
    return run.store.read("model/weights.safetensors")
