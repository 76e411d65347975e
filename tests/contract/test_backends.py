"""The contract of `Backend`, the same on every place that carries runs out: real training, seen from outside.

With `RAYLAUNCH_TEST_CONTEXT=<kube context>` the cluster is a real one (docs/cluster.md), else the emulated one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.backends import Backend
from launcher.errors import NotFinishedError, UserError
from launcher.journal import Lines
from launcher.runs import Run, Status
from tests.contract.grounds import LONG, Ground, Here, OnCluster, ended, planned, real_cluster, training, until
from tests.kube.patience import ENOUGH
from tests.kube.site import Site, processes

pytestmark = pytest.mark.timeout(3000)


@pytest.fixture(params=["here", pytest.param("cluster", marks=pytest.mark.slow)])
def ground(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    if request.param == "here":
        yield Here(tmp_path)
    elif real := real_cluster():
        yield real
    else:
        with Site(tmp_path, f"{request.getfixturevalue('bucket')}/runs", processes) as site:
            monkeypatch.setenv("KUBECONFIG", str(site.kubeconfig))
            yield OnCluster(site.pool())


@pytest.fixture
def engine(ground: Ground) -> Backend:
    return ground.backend()


@pytest.fixture
def started(ground: Ground, engine: Backend) -> Iterator[Callable[..., Run]]:
    """Starts runs, and leaves nothing of them behind."""
    runs: list[Run] = []

    def start(name: str = "run", **settings: object) -> Run:
        run = planned(ground, name, **settings)
        runs.append(run)
        engine.submit(run)
        return run

    yield start
    for run in runs:
        if run.exists():
            engine.cancel(run, force=True)
    until(lambda: not any(ground.holds(run) for run in runs), ENOUGH)


def test_a_run_goes_on_by_itself_and_is_seen_to_its_end(
    ground: Ground, engine: Backend, started: Callable[..., Run]
) -> None:
    run = started(train__epochs=1)
    assert not engine.status(run).status.final
    state = ended(ground.backend(), run, ENOUGH)
    assert state.status is Status.SUCCEEDED
    assert state.result["top1"] > 0
    assert engine.status(run) == state, "every machine says the same"
    until(lambda: not ground.holds(run), ENOUGH)
    assert run.owner() is None
    sources = {source for source, _ in engine.logs(run)}
    assert {"driver", "rank-0"} <= sources
    assert {source for source, _ in engine.logs(run, "rank-0")} == {"rank-0"}
    assert [pair[0].name for pair in engine.list(ground.storage)] == ["run"]
    engine.cancel(run)
    assert engine.status(run).status is Status.SUCCEEDED, "what is over cannot be cancelled"
    engine.delete(run)
    assert not run.exists()
    assert list(engine.list(ground.storage)) == []


def test_a_cancelled_run_keeps_a_checkpoint_of_the_step_it_stopped_at_and_goes_on_from_there(
    ground: Ground, engine: Backend, started: Callable[..., Run]
) -> None:
    run = started(**LONG)
    until(training(run), ENOUGH)
    with pytest.raises(NotFinishedError):
        engine.delete(run)
    with pytest.raises(UserError, match="running already"):
        ground.backend().submit(run)
    engine.cancel(run)
    engine.cancel(run)
    state = ended(engine, run, ENOUGH)
    assert state.status is Status.CANCELLED
    step = run.latest_step()
    assert step > 0
    engine.cancel(run)
    until(lambda: not ground.holds(run), ENOUGH)
    engine.submit(run)
    assert not engine.status(run).status.final, "the old end is no longer its state"
    until(training(run, attempts=2), ENOUGH)
    starts = [event for event in Lines(run.store, "progress.jsonl").events() if event["event"] == "start"]
    assert starts[1]["step"] == step


def test_a_lost_driver_is_replaced_and_the_run_goes_on_from_its_last_checkpoint(
    ground: Ground, engine: Backend, started: Callable[..., Run]
) -> None:
    run = started(**LONG, checkpoint__every_minutes=0.01)
    until(training(run, step=20), ENOUGH)
    until(lambda: run.latest_step() > 0, ENOUGH)
    ground.lose_driver(run)
    until(training(run, attempts=2), ENOUGH)
    until(lambda: engine.status(run).status is Status.RUNNING, ENOUGH)
    assert engine.status(run).attempt == 2
    starts = [event for event in Lines(run.store, "progress.jsonl").events() if event["event"] == "start"]
    assert starts[1]["step"] > 0
    assert any(event["event"] == "retry" for event in Lines(run.store, "events.jsonl").events())


def test_a_forced_cancel_does_not_wait(ground: Ground, engine: Backend, started: Callable[..., Run]) -> None:
    run = started(**LONG)
    engine.cancel(run, force=True)
    state = ended(engine, run, ENOUGH)
    assert state.status is Status.CANCELLED
    until(lambda: not ground.holds(run), ENOUGH)
