"""Runs on an emulated cluster on which pods do what the test says: what is submitted, seen, settled and given back.

The client, its connection and the objects are real; operator, scheduler and kubelet are imitated (`tests/kube`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher.backends import kuberay
from launcher.backends.kuberay import KubeRayBackend
from launcher.errors import InfrastructureError, LaunchError, SiteError, UserError
from launcher.labels import RUN_LABEL
from launcher.runs import Owner, Run, State, Status
from tests.contract.grounds import until
from tests.kube.kubelet import crash_loop, image_pull_failure, unschedulable_pod
from tests.kube.site import NAMESPACE, Site
from tests.tiny import new_run

SPEED = 60.0
"""Timers of the imitated operator run so many times faster."""
GPU_RUN = {"resources__node_type": "a10g", "resources__workers": 8}


@pytest.fixture
def site(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(tmp_path, f"{bucket}/runs", speed=SPEED) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        monkeypatch.setattr(kuberay, "NEW_SECONDS", 60.0 / SPEED)
        yield made


def engine(site: Site) -> KubeRayBackend:
    """A client that knows nothing yet."""
    return KubeRayBackend(site.pool(), site.cluster())


def planned(site: Site, name: str = "run", **settings: Any) -> Run:
    return new_run(site.storage, name, site.pool(), **{**GPU_RUN, "resources__cpus_per_worker": None, **settings})


def submitted(site: Site, name: str = "run", **settings: Any) -> Run:
    run = planned(site, name, **settings)
    engine(site).submit(run)
    return run


def status(site: Site, run: Run) -> State:
    return engine(site).status(run)


def gpus(site: Site) -> int:
    held: int = site.kubelet.gpus_in_use(RUN_LABEL)
    return held


def drives(run: Run, *, ago: float = 0.0) -> None:
    """What a driver in a pod leaves: a state, and a lease of another machine."""
    run.hold(Owner("head", "boot", 1, 0.0))
    if ago:
        document = json.loads(run.store.read("lease.json"))
        run.write_json("lease.json", {**document, "confirmed": time.time() - ago})
    run.update(status=Status.RUNNING, attempt=1)


def starts(site: Site, run: Run) -> None:
    """The pods come up, and the driver in them."""
    site.kubelet.set_job("RUNNING")
    until(lambda: _deployment(site, run) == "Running")
    drives(run)
    until(lambda: status(site, run).status is Status.RUNNING)


def _deployment(site: Site, run: Run) -> str:
    job = site.api.get("rayjobs", NAMESPACE, run.name) or {}
    return str((job.get("status") or {}).get("jobDeploymentStatus"))


# -- submitting


def test_what_is_submitted_belongs_to_the_rayjob_and_goes_with_it(site: Site) -> None:
    run = submitted(site)
    (config,) = site.api.list("configmaps", NAMESPACE, f"{RUN_LABEL}=run")
    job = site.api.get("rayjobs", NAMESPACE, "run")
    assert job is not None
    assert config["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    assert json.loads(config["data"]["spec.json"]) == json.loads(run.store.read("spec.json"))
    starts(site, run)
    assert gpus(site) == 8
    engine(site).cancel(run, force=True)
    until(lambda: not site.pods("run") and not site.api.list("configmaps", NAMESPACE, f"{RUN_LABEL}=run"))
    assert gpus(site) == 0


def test_the_server_says_what_it_makes_of_an_object_before_anything_exists(site: Site) -> None:
    site.api.denied.add(("create", "rayjobs"))
    run = planned(site)
    with pytest.raises(SiteError, match="forbidden"):
        engine(site).submit(run)
    assert site.api.list("configmaps", NAMESPACE, RUN_LABEL) == []


def test_of_many_clients_that_submit_one_run_one_wins(site: Site) -> None:
    run = planned(site)

    def attempt(_: int) -> str:
        try:
            engine(site).submit(run)
        except UserError as error:
            return error.what
        return "won"

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(attempt, range(8)))
    assert outcomes.count("won") == 1
    assert {outcome for outcome in outcomes if outcome != "won"} == {"run is running already"}
    assert len(site.api.list("rayjobs", NAMESPACE)) == 1
    assert len(site.api.list("configmaps", NAMESPACE, f"{RUN_LABEL}=run")) == 1


def test_a_create_whose_answer_was_lost_is_found_and_not_repeated(site: Site) -> None:
    run = planned(site)
    site.api.crash_after("create", "rayjobs", lambda: True)  # the dry run
    site.api.crash_after("create", "rayjobs", lambda: False)
    engine(site).submit(run)
    assert len(site.api.list("rayjobs", NAMESPACE)) == 1
    assert len(site.api.list("configmaps", NAMESPACE, f"{RUN_LABEL}=run")) == 1


def test_a_throttled_or_failing_server_is_asked_again(site: Site) -> None:
    run = planned(site)
    site.api.fail_next(2, 429, "create .*rayjobs")
    site.api.fail_next(2, 503, "get .*rayjobs")
    engine(site).submit(run)
    assert len(site.api.list("rayjobs", NAMESPACE)) == 1


def test_another_runs_rayjob_of_that_name_is_left_alone(site: Site, bucket: str) -> None:
    submitted(site)
    other = new_run(f"{bucket}/elsewhere", "run", site.pool(), **GPU_RUN, resources__cpus_per_worker=None)
    with pytest.raises(UserError, match="not of this run"):
        engine(site).submit(other)
    engine(site).cancel(other, force=True)
    assert site.api.get("rayjobs", NAMESPACE, "run") is not None


# -- a client that dies between any two of its requests


def _submit_and_die(deadly: int, storage: str, kubeconfig: str) -> None:
    """Submits in a process of its own that ends right after its n-th request to the API server."""
    import launcher.cluster as module
    from launcher.pools import find_pool

    os.environ["KUBECONFIG"] = kubeconfig
    pool = find_pool("gpu-pool")
    backend = KubeRayBackend(pool, module.Cluster.connect())
    count, real = 0, module.Cluster._request

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        answer = real(self, *args, **kwargs)
        count += 1
        if count == deadly:
            os._exit(9)
        return answer

    module.Cluster._request = counted  # type: ignore[method-assign]
    backend.submit(Run(storage, "run"))
    os._exit(0)


@pytest.mark.parametrize("deadly", range(1, 6))
def test_a_client_killed_between_any_two_requests_leaves_a_run_or_nothing(site: Site, deadly: int) -> None:
    run = planned(site)
    child = multiprocessing.get_context("fork").Process(
        target=_submit_and_die, args=(deadly, site.storage, str(site.kubeconfig))
    )
    child.start()
    child.join(60)
    made = site.api.get("rayjobs", NAMESPACE, "run") is not None
    assert child.exitcode == (9 if deadly <= 5 else 0)
    if made:
        starts(site, run)
        run.update(status=Status.SUCCEEDED, ended=1.0)
        site.kubelet.set_job("SUCCEEDED")
        until(lambda: gpus(site) == 0)
    else:
        # Another client goes on as if nothing had been.
        engine(site).submit(run)
        starts(site, run)
        engine(site).cancel(run, force=True)
    until(lambda: gpus(site) == 0)


# -- what is seen


def test_a_waiting_run_says_why_and_what_to_do_to_a_fresh_client_and_to_one_that_watches(site: Site) -> None:
    site.kubelet.play("worker", unschedulable_pod("0/8 nodes are available: 8 Insufficient nvidia.com/gpu."))
    run = submitted(site)
    watching = engine(site)
    until(lambda: "workers: no node has 4 free GPUs" in status(site, run).reason)
    state = status(site, run)
    assert (state.status, bool(state.hint)) == (Status.PENDING, True)
    until(lambda: watching.status(run).reason == state.reason)
    site.kubelet.play("worker", image_pull_failure())
    until(lambda: "cannot be pulled" in watching.status(run).reason)
    assert watching.status(run).status is Status.STARTING


def test_a_crashing_container_is_told_with_its_last_words(site: Site) -> None:
    site.kubelet.play("head", crash_loop())
    run = submitted(site)
    until(lambda: bool(site.pods("run", "head")))
    head = site.pods("run", "head")[0]
    site.api.log(NAMESPACE, head, "Traceback\nModuleNotFoundError: No module named 'ray'\n")
    site.api.open_log(NAMESPACE, head, "ray-head")  # the next life: what was said is of the previous one
    watching = engine(site)
    until(lambda: "ModuleNotFoundError: No module named 'ray'" in watching.status(run).reason)
    asked = [request.path for request in site.api.requests if request.path.endswith("/log")]
    watching.status(run)
    assert [request.path for request in site.api.requests if request.path.endswith("/log")] == asked


def test_a_run_whose_head_was_lost_recovers_and_one_whose_driver_is_silent_too(site: Site) -> None:
    run = submitted(site)
    starts(site, run)
    site.kubelet.play("head", unschedulable_pod())
    site.api.delete("pods", NAMESPACE, site.pods("run", "head")[0], grace=0)
    until(lambda: status(site, run).status is Status.RECOVERING)
    drives(run, ago=600)
    assert status(site, run).status is Status.RECOVERING


def test_a_run_behind_others_in_a_queue_is_seen_there_and_starts_when_they_end(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Site(tmp_path, f"{bucket}/runs", speed=SPEED, queue="gpu-queue") as site:
        site.controllers.enable_kueue(8, namespace=NAMESPACE)
        monkeypatch.setenv("KUBECONFIG", str(site.kubeconfig))
        first, second = submitted(site, "first"), planned(site, "second")
        starts(site, first)
        engine(site).submit(second)
        watching = engine(site)
        until(lambda: watching.status(second).status is Status.QUEUED and "quota" in watching.status(second).reason)
        assert "launch cancel second" in watching.status(second).hint
        assert not site.pods("second")
        engine(site).cancel(first, force=True)
        starts(site, second)
        assert gpus(site) == 8


def test_following_a_run_takes_a_handful_of_requests_and_survives_what_api_servers_do(site: Site) -> None:
    run = submitted(site)
    starts(site, run)
    watching = engine(site)
    watching.status(run)
    until(lambda: watching.status(run).status is Status.RUNNING)
    before = len(site.api.requests)
    for _ in range(200):
        assert watching.status(run).status is Status.RUNNING
    assert len(site.api.requests) == before, "who watches asks for nothing"
    for trouble in (site.api.compact, site.api.drop_connections, site.api.stop):
        trouble()
    with pytest.raises(InfrastructureError, match="does not answer"):
        until(lambda: watching.status(run) is None, 20)
    site.api.start()
    site.kubelet.play("head", unschedulable_pod())
    site.api.delete("pods", NAMESPACE, site.pods("run", "head")[0], grace=0)

    def recovering() -> bool:
        try:
            return watching.status(run).status is Status.RECOVERING
        except LaunchError:
            return False

    until(recovering, 60)


# -- how it ends


def _succeeds(site: Site, run: Run) -> None:
    starts(site, run)
    run.update(status=Status.SUCCEEDED, ended=1.0)
    run.release()
    site.kubelet.set_job("SUCCEEDED")


def _fails(site: Site, run: Run) -> None:
    starts(site, run)
    run.update(status=Status.FAILED, error=SiteError("no space", hint="free some").to_record(), ended=1.0)
    run.release()
    site.kubelet.set_job("FAILED", "exit code 100")


def _is_cancelled_while_it_waits(site: Site, run: Run) -> None:
    site.kubelet.play("worker", unschedulable_pod())
    until(lambda: status(site, run).status is Status.PENDING)
    engine(site).cancel(run)


def _is_cancelled_while_it_trains(site: Site, run: Run) -> None:
    starts(site, run)
    engine(site).cancel(run)
    assert status(site, run).status is Status.CANCELLING
    assert run.cancel_requested()
    run.update(status=Status.CANCELLED, ended=1.0)  # the driver saves, and says so
    run.release()
    site.kubelet.set_job("FAILED", "exit code 103")


def _is_killed(site: Site, run: Run) -> None:
    starts(site, run)
    engine(site).cancel(run, force=True)


def _is_stopped_by_ray(site: Site, run: Run) -> None:
    starts(site, run)
    run.release()
    site.kubelet.set_job("STOPPED")


def _reaches_its_deadline(site: Site, run: Run) -> None:
    starts(site, run)
    run.release()


def _never_starts(site: Site, run: Run) -> None:
    site.kubelet.play("worker", unschedulable_pod("0/8 nodes are available: 8 Insufficient nvidia.com/gpu."))
    assert run.exists()


def _loses_its_submitter(site: Site, run: Run) -> None:
    starts(site, run)
    run.release()
    site.kubelet.finish_submitter(1)


def _loses_its_head_for_good(site: Site, run: Run) -> None:
    starts(site, run)
    run.release()
    site.kubelet.dashboard_down = True


def _is_deleted_by_somebody(site: Site, run: Run) -> None:
    starts(site, run)
    run.release()
    site.api.delete("rayjobs", NAMESPACE, run.name)


ENDS: dict[Callable[[Site, Run], None], tuple[Status, str]] = {
    _succeeds: (Status.SUCCEEDED, ""),
    _fails: (Status.FAILED, "no space"),
    _is_cancelled_while_it_waits: (Status.CANCELLED, ""),
    _is_cancelled_while_it_trains: (Status.CANCELLED, ""),
    _is_killed: (Status.CANCELLED, ""),
    _is_stopped_by_ray: (Status.CANCELLED, ""),
    _reaches_its_deadline: (Status.FAILED, "limit"),
    _never_starts: (Status.FAILED, "did not start"),
    _loses_its_submitter: (Status.FAILED, "submitter"),
    _loses_its_head_for_good: (Status.FAILED, "head"),
    _is_deleted_by_somebody: (Status.INTERRUPTED, "its RayJob is gone"),
}


@pytest.mark.parametrize("ends", ENDS, ids=lambda ends: ends.__name__.strip("_"))
def test_however_a_run_ends_its_gpus_are_given_back_and_its_end_is_told(
    site: Site, ends: Callable[[Site, Run], None]
) -> None:
    clocks: dict[str, Any] = {"limits__max_hours": 0.1} if ends is _reaches_its_deadline else {}
    clocks |= {"limits__start_minutes": 1.0} if ends is _never_starts else {}
    run = submitted(site, **clocks)
    ends(site, run)
    wanted, words = ENDS[ends]
    until(lambda: status(site, run).status.final, 60)
    state = status(site, run)
    assert state.status is wanted
    assert words in f"{state.reason} {state.error}"
    until(lambda: gpus(site) == 0, 60)
    until(lambda: not site.pods("run", "head") and not site.pods("run", "worker"), 60)
    assert run.state() == state, "the end is on record, whoever sees it"
    site.kubelet.dashboard_down = False
    site.kubelet.play("worker", unschedulable_pod())
    engine(site).submit(run)  # and the run can go on
    assert not status(site, run).status.final
