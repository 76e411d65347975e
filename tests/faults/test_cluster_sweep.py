"""Sweeps on the emulated cluster with real Ray: one RayJob, trials on its pods; what they fetch, lose and leave."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.backends import Backend
from launcher.cluster import RAY_JOBS
from launcher.journal import Lines
from launcher.runs import Run, State, Status
from launcher.storage import open_store
from launcher.sweeps import Ledger, Outcome
from tests.contract.grounds import OnCluster, ended, until
from tests.kube.patience import ENOUGH
from tests.kube.scheduler import Node
from tests.kube.site import NAMESPACE, POOL, Site
from tests.sweeping import SPACE, new_sweep
from tests.tiny import SETTINGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

IMAGES = 16
"""Of each of the ten digits."""


class Requests(logging.Handler):
    """What the S3 server was asked for: how often each object, by method."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r'"?(GET|PUT) (/[^ ?]*) HTTP', record.getMessage()):
            self.counts[found[1], found[2]] += 1

    def of(self, method: str, part: str) -> dict[str, int]:
        return {path: times for (how, path), times in list(self.counts.items()) if how == method and part in path}


@pytest.fixture
def requests(s3: str) -> Iterator[Requests]:
    assert s3
    server, handler = logging.getLogger("werkzeug"), Requests()
    level, propagate = server.level, server.propagate
    server.addHandler(handler)
    server.setLevel(logging.INFO)
    server.propagate = False
    yield handler
    server.setLevel(level)
    server.propagate = propagate
    server.removeHandler(handler)


@pytest.fixture
def digits(bucket: str) -> str:
    """Some of the digits, as a user's own images on S3."""
    from trainers.data.sample import materialise

    store = open_store(f"{bucket}/digits")
    for label in sorted(Path(materialise("digits")).iterdir()):
        for image in sorted(label.iterdir())[:IMAGES]:
            store.write(f"{label.name}/{image.name}", image.read_bytes())
    return store.uri


def small(ground: OnCluster, **settings: Any) -> Run:
    """Four short trials, two at once."""
    usual = {"sweep__trials": 4, "sweep__scheduler": "none", "train__batch_size": 128}
    return new_sweep(ground.storage, "s1", pool=ground.pool, **usual | settings)


def launch(*words: str) -> str:
    """What the command prints, in a process of its own."""
    command = [sys.executable, "-m", "launcher", *words]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True).stdout


KINDS = {"ResourceTrainable": "trial", "TrialActor": "trial", "RayTrainWorker": "worker"}
"""What Ray calls the processes of trials, and those of the workers of Ray Train."""


class Sightings:
    """Which kinds of processes a sweep was seen to have on its head and on its worker pods."""

    def __init__(self, site: Site, run: Run) -> None:
        self.site, self.run = site, run
        self.seen: set[tuple[str, str]] = set()

    def look(self) -> bool:
        for role in ("head", "worker"):
            for pod in self.site.pods(self.run.name, role):
                with contextlib.suppress(psutil.Error, StopIteration):
                    words = " ".join(" ".join(process.cmdline()) for process in self.site.kubelet.processes(pod))
                    self.seen |= {(role, kind) for name, kind in KINDS.items() if name in words}
        return True


def watched(engine: Backend, site: Site, run: Run) -> tuple[State, set[tuple[str, str]]]:
    """The sweep's last state, and which kinds of processes its head and its worker pods were seen to have."""
    seen = Sightings(site, run)
    until(lambda: seen.look() and engine.status(run).status.final, ENOUGH, every=0.2)
    return engine.status(run), seen.seen


def assert_gone(ground: OnCluster, run: Run) -> None:
    until(lambda: not ground.holds(run), ENOUGH)
    jobs = ground.cluster.objects(RAY_JOBS)
    assert [job["metadata"]["name"] for job in jobs] == [run.name], "one RayJob, however many trials"
    assert jobs[0]["status"]["jobDeploymentStatus"] == "Complete"


def begun(sweep: Run) -> set[int]:
    """The trials that the last driver began. What a lost one told may come to S3 after it, and says nothing of that."""
    numbers: set[int] = set()
    for event in Lines(sweep.store, "progress.jsonl").events():
        if event["event"] == "sweep":
            numbers.clear()
        elif event["event"] == "trial":
            numbers.add(event["number"])
    return numbers


def test_trials_of_one_worker_train_on_the_worker_pods_and_fetch_each_image_once_for_each_node(
    site: Site, ground: OnCluster, engine: Backend, digits: str, requests: Requests
) -> None:
    settings: dict[str, Any] = SETTINGS | {"train.epochs": 3, "train.batch_size": 32}
    flags = [f"--set={key}={value}" for key, value in settings.items() if key != "data.uri"]
    words = ["sweep", "--cluster", POOL, "--data", digits, "--name", "s1", "--trials", "4", "--concurrent", "2", *flags]
    client = subprocess.Popen(
        [sys.executable, "-m", "launcher", *words, f"--set=sweep.space={json.dumps(SPACE)}"],
        env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: site.api.get("rayjobs", NAMESPACE, "s1") is not None, ENOUGH, every=0.001)
    client.kill()
    client.wait()
    sweep = Run(site.storage, "s1")
    until(lambda: any(trial.epochs for trial in Ledger.load(sweep).trials), ENOUGH)
    assert json.loads(launch("status", "s1", "--cluster", POOL, "-o", "json"))["status"] == "RUNNING"
    board = json.loads(launch("trials", "s1", "--cluster", POOL, "-o", "json"))
    assert any(row["epochs"] for row in board)

    state, seen = watched(engine, site, sweep)
    assert state.status is Status.SUCCEEDED, state
    assert seen == {("worker", "trial"), ("worker", "worker")}, "the last is the export's"
    ledger = Ledger.load(sweep)
    assert [trial.number for trial in ledger.trials] == [1, 2, 3, 4]
    assert {trial.outcome for trial in ledger.trials} <= {Outcome.FINISHED, Outcome.STOPPED}
    assert (state.result["trial"], state.result["trials"]) == (ledger.best, 4)
    assert any(sweep.store.list("model/weights.safetensors"))
    assert b"<html" in sweep.store.read("report.html")

    images = requests.of("GET", "/digits/")
    assert len(images) == 10 * IMAGES
    assert max(images.values()) <= 2, "each of the two nodes fetches an image once, whatever the number of trials"
    assert list(requests.of("PUT", "index.parquet").values()) == [1]
    assert_gone(ground, sweep)


def test_trials_of_several_workers_are_driven_from_the_head_and_train_on_the_worker_pods(
    site: Site, ground: OnCluster, engine: Backend
) -> None:
    sweep = small(ground, sweep__trials=2, sweep__concurrent=1, resources__workers=2)
    engine.submit(sweep)
    state, seen = watched(engine, site, sweep)
    assert state.status is Status.SUCCEEDED, state
    assert seen == {("head", "trial"), ("worker", "worker")}
    ledger = Ledger.load(sweep)
    assert {trial.outcome for trial in ledger.trials} <= {Outcome.FINISHED, Outcome.STOPPED}
    assert state.result["trials"] == len(ledger.trials) == 2
    assert any(sweep.store.list("model/weights.safetensors"))
    assert_gone(ground, sweep)


def test_a_sweep_that_lost_a_node_and_then_its_head_begins_no_trial_again_that_had_ended(
    site: Site, ground: OnCluster, engine: Backend
) -> None:
    sweep = small(ground)
    engine.submit(sweep)
    until(lambda: Ledger.load(sweep).epochs() > 0, ENOUGH)
    site.kubelet.kill(site.pods(sweep.name, "worker")[0], signal.SIGKILL)
    until(lambda: any(trial.retries for trial in Ledger.load(sweep).trials), ENOUGH)
    until(lambda: len(Ledger.load(sweep).over()) >= 2, ENOUGH)
    site.kubelet.kill(site.pods(sweep.name, "head")[0], signal.SIGKILL)
    done = Ledger.load(sweep).over()
    assert ended(engine, sweep, ENOUGH).status is Status.SUCCEEDED
    assert sweep.attempts() == 2, "a lost node is the same attempt, a lost head another"
    assert begun(sweep).isdisjoint(trial.number for trial in done)
    ledger = Ledger.load(sweep)
    assert [trial.outcome for trial in ledger.trials] == [Outcome.FINISHED] * 4
    assert [ledger.trial(trial.number) for trial in done] == done
    assert all([epoch["epoch"] for epoch in trial.epochs] == [1, 2, 3] for trial in ledger.trials)
    assert_gone(ground, sweep)


def test_a_cancelled_sweep_gives_its_pods_back_and_goes_on_where_it_was(ground: OnCluster, engine: Backend) -> None:
    sweep = small(ground, train__epochs=4)
    engine.submit(sweep)
    until(lambda: Ledger.load(sweep).epochs() >= 3, ENOUGH)
    launch("cancel", sweep.name, "--cluster", POOL)
    assert ended(engine, sweep, ENOUGH).status is Status.CANCELLED
    until(lambda: not ground.holds(sweep), ENOUGH)
    before = Ledger.load(sweep)
    assert before.epochs() >= 3
    assert not before.having(Outcome.RUNNING, Outcome.WAITING)

    launch("resume", sweep.name, "--cluster", POOL, "--detach", "--yes")
    assert ended(engine, sweep, ENOUGH).status is Status.SUCCEEDED
    after = Ledger.load(sweep)
    assert [trial.outcome for trial in after.trials] == [Outcome.FINISHED] * 4
    for old, new in zip(before.trials, after.trials, strict=False):
        assert new.epochs[: len(old.epochs)] == old.epochs, "no epoch was trained again"
    assert begun(sweep) == {1, 2, 3, 4} - {trial.number for trial in before.over()}
    assert_gone(ground, sweep)


def test_trials_that_are_paused_keep_their_state_on_s3_until_the_sweep_ends(
    ground: OnCluster, engine: Backend, requests: Requests
) -> None:
    sweep = small(ground, sweep__scheduler="hyperband", sweep__trials=5)
    engine.submit(sweep)
    state = ended(engine, sweep, ENOUGH)
    assert state.status is Status.SUCCEEDED, state
    ledger = Ledger.load(sweep)
    assert {trial.outcome for trial in ledger.trials} <= {Outcome.FINISHED, Outcome.STOPPED}
    assert requests.of("GET", f"{sweep.name}/tune/"), "otherwise no trial was paused, and nothing was tried"
    assert list(sweep.store.list("tune/")) == []


def test_a_sweep_whose_trials_find_no_gpu_in_their_pod_ends_at_once_and_holds_none(
    site: Site, ground: OnCluster, engine: Backend
) -> None:
    labels = {"raylaunch.dev/kind": "a10g"}
    site.kubelet.add_node(Node("a10g-0", cpu="16", memory="64Gi", gpus=4, tainted=True, labels=labels))
    sweep = small(ground, resources__node_type="a10g", resources__gpus_per_worker=1)
    engine.submit(sweep)
    until(lambda: site.kubelet.gpus_in_use() == 2, ENOUGH)
    state = ended(engine, sweep, ENOUGH)
    assert (state.status, (state.error or {}).get("what")) == (Status.FAILED, "torch sees no GPU")
    assert len(Ledger.load(sweep).trials) <= 2, "it did not try them all"
    until(lambda: not ground.holds(sweep), ENOUGH)
    assert site.kubelet.gpus_in_use() == 0
