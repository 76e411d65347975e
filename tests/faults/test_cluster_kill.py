"""Kill -9 of a head, of a worker and of the client, on the emulated cluster with real Ray: nothing is lost or left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from launcher.backends import Backend
from launcher.journal import Lines
from launcher.runs import Run, Status
from tests.contract.grounds import OnCluster, ended, planned, training, until
from tests.kube.patience import ENOUGH
from tests.kube.site import NAMESPACE, POOL, Site
from tests.tiny import SETTINGS, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

LENGTH = {"train__epochs": 16, "train__batch_size": 32, "checkpoint__every_minutes": 0.02, "resources__workers": 2}


Result = tuple[bytes, Any]
_whole: list[Result] = []


def result(run: Run) -> Result:
    """The weights and the final figures."""
    return weights(run), run.metrics()["final"]


def undisturbed(ground: OnCluster, engine: Backend) -> Result:
    """What such a run comes to if nothing happens to it; found out once."""
    if not _whole:
        run = planned(ground, "whole", **LENGTH)
        engine.submit(run)
        assert ended(engine, run, ENOUGH).status is Status.SUCCEEDED
        until(lambda: not ground.holds(run), ENOUGH)
        _whole.append(result(run))
    return _whole[0]


def test_a_run_that_lost_a_worker_and_its_head_ends_as_if_nothing_had_happened(
    site: Site, ground: OnCluster, engine: Backend
) -> None:
    whole = undisturbed(ground, engine)
    broken = planned(ground, "broken", **LENGTH)
    engine.submit(broken)
    until(training(broken, step=10), ENOUGH)
    worker = site.pods("broken", "worker")[0]
    until(lambda: site.kubelet.kill(worker, signal.SIGKILL, match="RayTrainWorker") > 0, ENOUGH)
    again = training(broken, attempts=2)
    until(again, ENOUGH)
    site.kubelet.kill(site.pods("broken", "head")[0], signal.SIGKILL)
    until(training(broken, attempts=3), ENOUGH)
    assert ended(engine, broken, ENOUGH).status is Status.SUCCEEDED
    assert broken.attempts() == 2, "a lost worker is the same attempt, a lost head another"
    starts = [event["step"] for event in Lines(broken.store, "progress.jsonl").events() if event["event"] == "start"]
    assert starts[0] == 0 < starts[1] <= starts[2], "it went on each time from a later checkpoint"
    assert result(broken) == whole
    until(lambda: not ground.holds(broken), ENOUGH)
    assert [
        pod["metadata"]["name"] for pod in site.api.list("pods", NAMESPACE) if pod["status"]["phase"] == "Running"
    ] == []


def test_a_client_killed_right_after_it_submitted_is_not_missed(site: Site, ground: OnCluster, engine: Backend) -> None:
    whole = undisturbed(ground, engine)
    flags = [f"--set={key}={value}" for key, value in SETTINGS.items() if key != "data.uri"]
    flags += [f"--set={key.replace('__', '.')}={value}" for key, value in LENGTH.items()]
    words = ["--cluster", POOL, "--data", SETTINGS["data.uri"], "--name", "alone", *flags]
    client = subprocess.Popen(
        [sys.executable, "-m", "launcher", *words], env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until(lambda: site.api.get("rayjobs", NAMESPACE, "alone") is not None, ENOUGH, every=0.001)
    client.kill()
    client.wait()
    alone = Run(site.storage, "alone")
    assert ended(engine, alone, ENOUGH).status is Status.SUCCEEDED
    assert result(alone) == whole
    until(lambda: not ground.holds(alone), ENOUGH)
    assert site.kubelet.gpus_in_use() == 0
