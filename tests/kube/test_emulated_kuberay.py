"""The emulated operator, queue and kubelets take RayJobs through the states of KubeRay v1.7.0, and give GPUs back."""

from __future__ import annotations

import base64
import json
import signal
import textwrap
import urllib.request
from collections.abc import Iterator

import psutil
import pytest

from tests.kube.apiserver import ApiServer
from tests.kube.controllers import Controllers
from tests.kube.kubelet import ScriptedKubelet, crash_loop, ended, image_pull_failure, unschedulable_pod
from tests.kube.manifests import QUEUE, rayjob
from tests.kube.patience import ENOUGH, until
from tests.kube.podstatus import condition_true
from tests.kube.processes import ProcessKubelet
from tests.kube.scheduler import Node
from tests.kube.schema import Object

SPEED = 100.0


def status_of(api: ApiServer, name: str = "run") -> Object:
    """The status of a RayJob."""
    status: Object = (api.get("rayjobs", "default", name) or {}).get("status", {})
    return status


class World:
    """A cluster with one run in it."""

    def __init__(self, api: ApiServer, kubelet: ScriptedKubelet, controllers: Controllers) -> None:
        self.api, self.kubelet, self.controllers = api, kubelet, controllers

    def submit(self, name: str = "run", **arguments: object) -> None:
        """Creates a RayJob."""
        self.api.create("rayjobs", rayjob(name, **arguments))  # type: ignore[arg-type]

    def status(self, name: str = "run") -> Object:
        """The status of a RayJob."""
        return status_of(self.api, name)

    def reaches(self, deployment: str, job: str | None = None, name: str = "run") -> None:
        """Waits for a state."""
        until(lambda: self.status(name).get("jobDeploymentStatus") == deployment)
        if job is not None:
            until(lambda: self.status(name).get("jobStatus") == job)

    def gives_its_gpus_back(self) -> None:
        """Waits until no pod holds a GPU."""
        until(lambda: self.kubelet.gpus_in_use() == 0)


@pytest.fixture
def world() -> Iterator[World]:
    """A cluster with an operator and pods on paper, a hundred times as fast as life."""
    with ApiServer() as api:
        kubelet = ScriptedKubelet(api)
        with Controllers(api, kubelet, speed=SPEED) as controllers:
            yield World(api, kubelet, controllers)


def test_a_run_succeeds_and_only_its_logs_stay(world: World) -> None:
    world.submit(labels={"team": "a"})
    world.reaches("Running")
    assert world.kubelet.gpus_in_use() == 2
    cluster = world.api.list("rayclusters", labels="team=a,ray.io/originated-from-cr-name=run")[0]
    assert cluster["status"]["state"] == "ready"
    pods = world.api.list("pods", labels="ray.io/is-ray-node=yes")
    token = {"secretKeyRef": {"name": cluster["metadata"]["name"], "key": "auth_token"}}
    for pod in pods:
        env = {entry["name"]: entry for entry in pod["spec"]["containers"][0]["env"]}
        assert (env["RAY_AUTH_MODE"]["value"], env["RAY_AUTH_TOKEN"]["valueFrom"]) == ("token", token)
    world.kubelet.set_job("RUNNING")
    world.reaches("Running", "RUNNING")
    world.kubelet.set_job("SUCCEEDED")
    world.reaches("Complete", "SUCCEEDED")
    world.gives_its_gpus_back()
    until(lambda: len(world.api.list("pods")) == 1)
    assert world.api.list("pods")[0]["status"]["phase"] == "Succeeded"
    assert world.status()["succeeded"] == 1


def test_an_error_of_the_application_fails_the_run(world: World) -> None:
    world.submit()
    world.kubelet.set_job("FAILED", "Job failed: ValueError")
    world.reaches("Failed", "FAILED")
    assert (world.status()["reason"], world.status()["message"]) == ("AppFailed", "Job failed: ValueError")
    world.gives_its_gpus_back()


def test_a_failed_run_is_tried_again_in_a_new_cluster(world: World) -> None:
    world.submit(backoffLimit=1)
    world.reaches("Running")
    first = world.status()["rayClusterName"]
    world.kubelet.set_job("FAILED")
    until(lambda: world.status().get("failed") == 1 and world.status().get("rayClusterName") not in (None, "", first))
    world.reaches("Failed")
    assert world.status()["failed"] == 2
    world.gives_its_gpus_back()


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("x" * 48, {}, "no more than 47 characters"),
        (
            "run",
            {"ttlSecondsAfterFinished": 5, "shutdownAfterJobFinishes": False},
            "cannot have TTLSecondsAfterFinished",
        ),
        ("run", {"backoffLimit": -1}, "backoffLimit must be a positive integer"),
    ],
)
def test_a_spec_the_operator_refuses_gets_no_pods(world: World, name: str, spec: Object, message: str) -> None:
    world.submit(name, **spec)
    world.reaches("ValidationFailed", name=name)
    assert message in world.status(name)["message"]
    assert world.api.list("pods") == []
    world.api.delete("rayjobs", "default", name)
    until(lambda: world.api.list("rayjobs") == [])


def test_what_never_runs_ends_at_its_deadline(world: World) -> None:
    world.kubelet.play("worker", unschedulable_pod())
    world.submit(preRunningDeadlineSeconds=60)
    world.reaches("Failed")
    assert world.status()["reason"] == "PreRunningDeadlineExceeded"
    world.gives_its_gpus_back()
    reasons = [event["message"] for event in world.api.list("events") if event["reason"] == "FailedScheduling"]
    assert set(reasons) == {"0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}


def test_what_runs_too_long_ends_at_its_deadline_and_is_not_tried_again(world: World) -> None:
    world.kubelet.set_job("RUNNING")
    world.submit(activeDeadlineSeconds=1000, backoffLimit=3)
    world.reaches("Running", "RUNNING")
    world.controllers.clock.speed *= 10
    world.reaches("Failed")
    assert (world.status()["reason"], world.status()["jobStatus"]) == ("DeadlineExceeded", "RUNNING")
    world.gives_its_gpus_back()


def test_a_submitter_that_keeps_failing_fails_the_run(world: World) -> None:
    world.kubelet.set_job("RUNNING")
    world.kubelet.finish_submitter(1)
    world.submit(submitterConfig={"backoffLimit": 1})
    world.reaches("Failed")
    assert world.status()["reason"] == "SubmissionFailed"
    assert "BackoffLimitExceeded" in world.status()["message"]
    world.gives_its_gpus_back()


def test_a_submitter_that_submits_nothing_fails_the_run(world: World) -> None:
    world.kubelet.finish_submitter(0)
    world.submit()
    world.reaches("Failed")
    assert world.status()["message"] == "Submitter completed but Ray job not found in RayCluster."
    world.gives_its_gpus_back()


def test_a_submitter_that_hangs_does_not_keep_the_gpus(world: World) -> None:
    world.kubelet.submitter_follows = False
    world.kubelet.set_job("SUCCEEDED")
    world.submit()
    world.reaches("Running", "SUCCEEDED")
    world.controllers.clock.speed *= 10
    world.reaches("Complete")
    assert world.status()["reason"] == "JobDeploymentStatusTransitionGracePeriodExceeded"
    world.gives_its_gpus_back()


def test_a_dashboard_that_stays_silent_fails_the_run(world: World) -> None:
    world.kubelet.set_job("RUNNING")
    world.submit()
    world.reaches("Running", "RUNNING")
    world.kubelet.dashboard_down = True
    world.controllers.clock.speed *= 10
    world.reaches("Failed")
    assert world.status()["reason"] == "JobStatusCheckTimeoutExceeded"
    world.gives_its_gpus_back()


def test_a_queued_run_waits_for_quota_and_the_next_for_its_end(world: World) -> None:
    world.controllers.enable_kueue(2)
    world.submit("first", labels=QUEUE)
    world.submit("second", labels=QUEUE)
    world.submit("huge", labels=QUEUE, workers=3)
    world.reaches("Running", name="first")

    def reasons() -> set[str]:
        conditions = [one["status"]["conditions"] for one in world.api.list("workloads") if "status" in one]
        return {entry["reason"] for found in conditions for entry in found if entry["type"] == "QuotaReserved"}

    until(lambda: reasons() == {"QuotaReserved", "WaitingForQuota", "ExceedsMaxQuota"})
    assert world.kubelet.gpus_in_use() == 2
    world.kubelet.set_job("SUCCEEDED", submission_id="first")
    world.reaches("Complete", name="first")
    world.reaches("Running", name="second")
    assert world.controllers.kueue is not None
    world.controllers.kueue.evict("default", "second")
    until(lambda: world.status("second").get("jobDeploymentStatus") != "Running")
    world.kubelet.set_job("SUCCEEDED", submission_id="second")
    world.reaches("Complete", name="second")
    world.gives_its_gpus_back()


def test_a_run_deleted_while_it_runs_is_stopped_and_leaves_nothing(world: World) -> None:
    world.kubelet.set_job("RUNNING")
    world.submit()
    world.reaches("Running", "RUNNING")
    world.api.delete("rayjobs", "default", "run")
    for kind in ("rayjobs", "rayclusters", "jobs", "pods", "services", "secrets"):
        until(lambda kind=kind: world.api.list(kind) == [])  # type: ignore[misc]
    assert world.kubelet.stop_requests == ["run"]


def test_without_its_operator_nothing_moves(world: World) -> None:
    world.controllers.paused = True
    world.submit()
    world.api.create("configmaps", {"metadata": {"name": "something"}})
    assert world.status() == {}
    world.controllers.paused = False
    world.reaches("Running")
    world.controllers.paused = True
    world.api.delete("rayjobs", "default", "run")
    assert world.api.get("rayjobs", "default", "run") is not None
    world.controllers.paused = False
    until(lambda: world.api.list("pods") == [])


def test_a_head_that_ended_is_replaced(world: World) -> None:
    world.submit()
    world.reaches("Running")
    head = world.api.list("pods", labels="ray.io/node-type=head")[0]["metadata"]["name"]
    world.kubelet.play(head, ended(137, reason="OOMKilled"))
    until(lambda: {pod["metadata"]["name"] for pod in world.api.list("pods", labels="ray.io/node-type=head")} - {head})
    until(lambda: len(world.api.list("pods", labels="ray.io/node-type=head")) == 1)


@pytest.mark.parametrize(
    ("play", "reason"), [(image_pull_failure(), "ImagePullBackOff"), (crash_loop(), "CrashLoopBackOff")]
)
def test_why_a_pod_does_not_run_stands_in_its_status(world: World, play: object, reason: str) -> None:
    world.kubelet.play("head", play)  # type: ignore[arg-type]
    world.submit()
    until(lambda: world.api.list("pods", labels="ray.io/node-type=head"))

    def head_condition() -> str:
        conditions = world.api.list("rayclusters")[0].get("status", {}).get("conditions") or []
        return next((str(entry["reason"]) for entry in conditions if entry["type"] == "HeadPodReady"), "")

    until(lambda: head_condition() == reason)


def test_a_quota_keeps_pods_from_being_made(world: World) -> None:
    hard = {"requests.nvidia.com/gpu": "1"}
    world.api.create("resourcequotas", {"metadata": {"name": "gpus"}, "spec": {"hard": hard}})
    world.submit()
    until(lambda: any(condition_true(one, "ReplicaFailure") for one in world.api.list("rayclusters")))
    conditions = world.api.list("rayclusters")[0]["status"]["conditions"]
    message = next(entry["message"] for entry in conditions if entry["type"] == "ReplicaFailure")
    assert "exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=1" in message


SUBMITTER = textwrap.dedent("""
    import os, time
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient("http://" + os.environ["RAY_DASHBOARD_ADDRESS"])
    print("code in", os.path.isdir(os.environ["CODE"]), flush=True)
    job = client.submit_job(entrypoint="python -c 'print(1)'", submission_id=os.environ["RAY_JOB_SUBMISSION_ID"])
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)
    print(client.get_job_logs(job), flush=True)
""")
NODES = [Node("cpu-0"), Node("gpu-0", gpus=1, tainted=True)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_processes_run_a_job_and_nothing_is_left() -> None:
    with ApiServer() as api:
        kubelet = ProcessKubelet(api, NODES)
        # At the pace of real life: a faster clock would also shorten what the operator grants the processes.
        with Controllers(api, kubelet):
            api.create("configmaps", {"metadata": {"name": "code"}, "data": {"submit.py": SUBMITTER}})
            api.create("rayjobs", rayjob("run", workers=1, ttlSecondsAfterFinished=1))

            until(lambda: status_of(api).get("jobDeploymentStatus") in ("Complete", "Failed"), ENOUGH)
            submitter = api.list("pods", labels="job-name=run")[0]["metadata"]["name"]
            log = [line for _, line in api.lives("default", submitter, "ray-job-submitter")[-1].lines]
            assert (status_of(api)["jobDeploymentStatus"], status_of(api)["jobStatus"]) == ("Complete", "SUCCEEDED"), (
                log
            )
            assert log[0] == "code in True"
            assert "1" in log
            until(lambda: kubelet.gpus_in_use() == 0 and len(api.list("pods")) == 1, ENOUGH)
    assert [one for one in psutil.process_iter() if str(kubelet.folder) in " ".join(_words(one))] == []
    assert not kubelet.folder.exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_new_head_gets_the_address_and_the_workers_of_the_old_one() -> None:
    with ApiServer() as api:
        kubelet = ProcessKubelet(api, NODES)
        with Controllers(api, kubelet):
            api.create(
                "configmaps", {"metadata": {"name": "code"}, "data": {"submit.py": "import time; time.sleep(3600)"}}
            )
            api.create("rayjobs", rayjob("run", workers=1))
            until(lambda: status_of(api).get("jobDeploymentStatus") == "Running", ENOUGH)
            old = api.list("pods", labels="ray.io/node-type=head")[0]["metadata"]["name"]
            kubelet.kill(old, signal.SIGKILL)
            until(lambda: old not in [pod["metadata"]["name"] for pod in api.list("pods")], ENOUGH)
            until(lambda: _ray_nodes(api) == 2, ENOUGH)
            worker = api.list("pods", labels="ray.io/node-type=worker")[0]
            assert worker["status"]["containerStatuses"][0]["restartCount"] >= 1


def _ray_nodes(api: ApiServer) -> int:
    """How many nodes are alive, says the dashboard behind the head service."""
    cluster = api.list("rayclusters")[0]["metadata"]["name"]
    address = api.service_backends.get(("default", f"{cluster}-head-svc"), {}).get(8265)
    secret = api.get("secrets", "default", cluster)
    assert secret is not None
    token = base64.b64decode(secret["data"]["auth_token"]).decode()
    try:
        request = urllib.request.Request(f"{address}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=5) as response:
            nodes = json.load(response)["data"]["result"]["result"]
    except (OSError, ValueError):
        return 0
    return sum(node["state"] == "ALIVE" for node in nodes)


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
