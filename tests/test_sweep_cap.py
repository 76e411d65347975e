"""A sweep on a cluster ends its trials before the cluster ends the sweep: whose clock that is, and when it began."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher.backends import backend
from launcher.journal import Journal
from launcher.runs import Run
from tests.kube.site import NAMESPACE, Site
from tests.pools import pool
from tests.sweeping import new_sweep
from trainers.sweep import RESERVE, Search

HOUR = 3600.0


@pytest.fixture
def sweep(bucket: str) -> Run:
    """Of a pool that gives it 2 hours, and half an hour to start."""
    return new_sweep(bucket, pool=pool("cpu-pool"), limits__max_hours=2.0, limits__start_minutes=30.0)


def hours_left(sweep: Run, began: float) -> float:
    """What a driver that began then finds."""
    journal = Journal(sweep.store, "events.jsonl")
    left = Search(sweep, sweep.spec(), 1, began, journal)._hours_left()
    journal.close()
    return left


def recorded(sweep: Run, *, submitted: float, up: float) -> None:
    sweep.update(submitted=submitted)
    sweep.write_json("submission.json", {"id": "1", "began": up, "times": 1, "strikes": 0, "step": -1})


def test_a_share_of_the_cap_is_kept_for_the_best_trial(sweep: Run) -> None:
    now = time.time()
    recorded(sweep, submitted=now, up=now)
    assert hours_left(sweep, now) == pytest.approx(2 * (1 - RESERVE), abs=0.01)


def test_the_cap_runs_while_nodes_are_waited_for_and_while_a_lost_head_is_replaced(sweep: Run) -> None:
    now = time.time()
    recorded(sweep, submitted=now - 1.0 * HOUR, up=now - 0.8 * HOUR)
    assert hours_left(sweep, now - 0.1 * HOUR) == pytest.approx(2 * (1 - RESERVE) - 1.0, abs=0.01)


def test_time_in_a_queue_is_not_counted_but_for_what_the_nodes_may_have_taken(sweep: Run) -> None:
    now = time.time()
    recorded(sweep, submitted=now - 20 * HOUR, up=now)
    assert hours_left(sweep, now) == pytest.approx(2 * (1 - RESERVE) - 0.5, abs=0.01)


def test_a_client_whose_clock_is_ahead_gives_a_sweep_no_more_time(sweep: Run) -> None:
    now = time.time()
    recorded(sweep, submitted=now + 5 * HOUR, up=now - 0.2 * HOUR)
    assert hours_left(sweep, now) == pytest.approx(2 * (1 - RESERVE) - 0.2, abs=0.01)


def test_a_sweep_that_nobody_submitted_through_the_client_has_a_cap_too(sweep: Run) -> None:
    now = time.time()
    assert hours_left(sweep, now) == pytest.approx(2 * (1 - RESERVE) - 0.5, abs=0.01)


def test_what_earlier_attempts_cost_shortens_the_cap_of_the_next_and_its_plan_says_so(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Site(tmp_path, f"{bucket}/runs") as site:
        monkeypatch.setenv("KUBECONFIG", str(site.kubeconfig))
        sweep = new_sweep(site.storage, pool=site.pool(), limits__max_cost=2.0)
        sweep.write_json("attempts/0001.json", {"began": 0, "ended": 1800})
        backend(site.pool()).submit(sweep)
        job = site.api.get("rayjobs", NAMESPACE, sweep.name)
    layout = sweep.plan()["layout"]
    left = (2.0 - sweep.spent()) / layout["price_per_hour"]
    assert sweep.spent() > 0
    assert layout["max_hours"] == pytest.approx(left, abs=0.001)
    assert job is not None
    assert job["spec"]["activeDeadlineSeconds"] == pytest.approx(3600 * left, abs=1)
