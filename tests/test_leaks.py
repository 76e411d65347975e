"""What a run should have given back is found from the cluster alone, and nothing else is ever touched.

The API server is emulated, without controllers: nothing moves unless a test says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import CONFIG_MAPS, PODS, RAY_CLUSTERS, RAY_JOBS, Cluster
from launcher.labels import RUN_LABEL, STORAGE_NOTE
from launcher.leaks import PATIENCE_SECONDS, Leak, find_leaks, remove
from launcher.manifest import TTL_SECONDS
from launcher.runs import Run, Status
from tests.kube.apiserver import ApiServer
from tests.pools import config_map
from tests.pools.manifests import Object, objects
from tests.tiny import new_run

GPU = "nvidia.com/gpu"
NAME = "flowers-1123"
LATER = 10 * PATIENCE_SECONDS
"""Long enough for everything that goes away by itself to be gone."""


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


@pytest.fixture
def cluster(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path, namespace="vision")))
    return Cluster.connect()


def submit(api: ApiServer, storage: str = "/nowhere", **status: Any) -> Object:
    """The objects of a run as they are while its pods run; its RayJob."""
    config, job = objects("spot_queue")
    job["metadata"]["annotations"][STORAGE_NOTE] = storage
    made = api.create("rayjobs", job)
    own(config, made)
    api.create("configmaps", config)
    own_cluster = api.create("rayclusters", own(ray_cluster(job), made))
    for role in ("head", "worker", "worker"):
        api.create("pods", own(pod(role), own_cluster))
    if status:
        api.update_status("rayjobs", "vision", NAME, status)
    return made


def own(thing: Object, owner: Object) -> Object:
    reference = {key: owner[key] for key in ("apiVersion", "kind")}
    reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
    thing["metadata"]["ownerReferences"] = [reference]
    return thing


def ray_cluster(job: Object) -> Object:
    metadata = {"name": f"{NAME}-abcde", "namespace": "vision", "labels": {RUN_LABEL: NAME}}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata,
            "spec": job["spec"]["rayClusterSpec"]}  # fmt: skip


def pod(role: str, run: str = NAME, phase: str = "Running", **labels: str) -> Object:
    asks = {"cpu": "1"} | ({GPU: "8"} if role == "worker" else {})
    container = {"name": "ray", "image": "image", "resources": {"requests": asks, "limits": asks}}
    labels = {RUN_LABEL: run} if run else labels
    metadata = {"generateName": f"{role}-", "namespace": "vision", "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container]},
            "status": {"phase": phase}}  # fmt: skip


def leaks(cluster: Cluster, after: float = LATER) -> list[Leak]:
    return find_leaks(cluster, GPU, time.time() + after)


def at(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))


# -- RayJobs


NOW = "now"
"""Stands for the time at which the test runs, which is not that at which it is collected."""
ENDED = {"endTime": NOW}
REFUSED = "KubeRay refused it, and then does not clean up"
STAYS = "it has ended, its pods are still there"
LATE = "it is past its deadline; the KubeRay operator does not act"
DEADLINE = 36_645.0
"""`activeDeadlineSeconds` of the run."""


@pytest.mark.parametrize(
    ("status", "after", "why"),
    [
        ({}, LATER, ""),
        ({"jobDeploymentStatus": "Initializing"}, LATER, ""),
        ({"jobDeploymentStatus": "Running", "startTime": NOW}, DEADLINE + PATIENCE_SECONDS - 60, ""),
        ({"jobDeploymentStatus": "Running", "startTime": NOW}, DEADLINE + PATIENCE_SECONDS + 60, LATE),
        ({"jobDeploymentStatus": "Initializing", "startTime": NOW}, DEADLINE + PATIENCE_SECONDS + 60, LATE),
        ({"jobDeploymentStatus": "Complete", **ENDED}, TTL_SECONDS + PATIENCE_SECONDS - 60, ""),
        ({"jobDeploymentStatus": "Complete", **ENDED}, TTL_SECONDS + PATIENCE_SECONDS + 60, STAYS),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED", **ENDED}, LATER, STAYS),
        ({"jobDeploymentStatus": "Failed", **ENDED}, LATER, STAYS),
        ({"jobDeploymentStatus": "Failed"}, LATER, STAYS),
        ({"jobDeploymentStatus": "ValidationFailed"}, 0.0, REFUSED),
    ],
)
def test_a_ray_job_that_holds_pods_when_it_should_not_is_a_leak(
    api: ApiServer, cluster: Cluster, status: dict[str, Any], after: float, why: str
) -> None:
    job = submit(api, **{key: at(0) if value == NOW else value for key, value in status.items()})
    found = leaks(cluster, after)
    assert found == ([Leak(RAY_JOBS, NAME, job["metadata"]["uid"], NAME, why, gpus=16)] if why else [])


def test_without_a_living_pod_nothing_is_held(api: ApiServer, cluster: Cluster) -> None:
    submit(api, jobDeploymentStatus="ValidationFailed")
    for item in api.list("pods", "vision"):
        api.update_status("pods", "vision", item["metadata"]["name"], {"phase": "Succeeded"})
    assert leaks(cluster) == []


@pytest.mark.parametrize(
    ("status", "ended", "why"),
    [
        (Status.SUCCEEDED, 0.0, "the run is succeeded, its pods are still there"),
        (Status.CANCELLED, 0.0, "the run is cancelled, its pods are still there"),
        (Status.SUCCEEDED, LATER - 60, ""),
        (Status.RUNNING, None, ""),
        (Status.RECOVERING, 0.0, ""),
    ],
)
def test_the_word_of_the_run_directory_counts_too(
    api: ApiServer, cluster: Cluster, tmp_path: Path, status: Status, ended: float | None, why: str
) -> None:
    """A driver may have recorded the end, and the submitter that would leave then is stuck."""
    run = new_run(tmp_path / "runs", NAME)
    run.update(status=status, ended=None if ended is None else time.time() + ended)
    submit(api, run.storage, jobDeploymentStatus="Running", startTime=at(0))
    assert [leak.why for leak in leaks(cluster)] == ([why] if why else [])


@pytest.mark.parametrize("state", [None, b"{", b""])
def test_a_run_directory_that_cannot_be_read_accuses_nobody(
    api: ApiServer, cluster: Cluster, tmp_path: Path, state: bytes | None
) -> None:
    run = Run(str(tmp_path / "runs"), NAME)
    if state is not None:
        run.store.write("state.json", state)
    submit(api, run.storage, jobDeploymentStatus="Running", startTime=at(0))
    assert leaks(cluster) == []


# -- what lost its owner


def test_what_lost_its_ray_job_is_a_leak(api: ApiServer, cluster: Cluster) -> None:
    submit(api)
    api.delete("rayjobs", "vision", NAME, policy="Orphan")
    patch_out(api, "rayjobs", NAME)
    # The garbage collector has its time.
    assert leaks(cluster, 2 * PATIENCE_SECONDS - 60) == []
    found = leaks(cluster)
    assert [(leak.kind, leak.run, leak.why, leak.gpus) for leak in found] == [
        (RAY_CLUSTERS, NAME, "its RayJob is gone", 16), (CONFIG_MAPS, NAME, "no RayJob owns it", 0),
    ]  # fmt: skip


def patch_out(api: ApiServer, plural: str, name: str) -> None:
    """Takes away the finalizer that a controller would."""
    if api.get(plural, "vision", name):
        api.patch(plural, "vision", name, {"metadata": {"finalizers": None}})


def test_a_config_map_of_a_client_that_was_lost_is_a_leak(api: ApiServer, cluster: Cluster) -> None:
    """It makes the ConfigMap first, the RayJob then, and the owner reference last."""
    config, _ = objects("spot_queue")
    api.create("configmaps", config)
    assert leaks(cluster, 0) == []
    (leak,) = leaks(cluster)
    assert (leak.kind, leak.name) == (CONFIG_MAPS, config["metadata"]["name"])


def test_an_owner_of_the_same_name_is_not_the_owner(api: ApiServer, cluster: Cluster) -> None:
    """A run that was submitted again: its old RayCluster is not the new RayJob's; what that one reads is in use."""
    old = submit(api)
    api.delete("rayjobs", "vision", NAME)
    patch_out(api, "rayjobs", NAME)
    _, job = objects("spot_queue")
    job["metadata"]["annotations"][STORAGE_NOTE] = "/nowhere"
    new = api.create("rayjobs", job)
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    assert [leak.kind for leak in leaks(cluster)] == [RAY_CLUSTERS]
    job["spec"]["submitterPodTemplate"]["spec"]["volumes"] = []
    api.patch("rayjobs", "vision", NAME, {"spec": job["spec"]})
    assert [leak.kind for leak in leaks(cluster)] == [RAY_CLUSTERS, CONFIG_MAPS]


# -- removing


def test_only_what_leaks_is_removed(api: ApiServer, cluster: Cluster) -> None:
    submit(api, jobDeploymentStatus="Running", startTime=at(0))
    described = config_map("gpu-pool")
    described["metadata"]["namespace"] = "vision"
    others: list[tuple[str, Object]] = [
        ("configmaps", described),
        ("configmaps", {"metadata": {"name": "kube-root-ca.crt", "namespace": "vision"}}),
        ("pods", pod("worker", run="", app="somebody-elses")),
    ]  # fmt: skip
    for plural, thing in others:
        api.create(plural, thing)
    stray, _ = objects("spot_queue")
    stray["metadata"]["name"] += "-stray"
    api.create("configmaps", stray)
    before = {item["metadata"]["name"] for plural in ("configmaps", "pods") for item in api.list(plural, "vision")}
    (leak,) = leaks(cluster)
    assert leak.name == stray["metadata"]["name"]
    remove(cluster, leak)
    after = {item["metadata"]["name"] for plural in ("configmaps", "pods") for item in api.list(plural, "vision")}
    assert before - after == {leak.name}
    assert cluster.get(RAY_JOBS, NAME) is not None
    assert leaks(cluster) == []


def test_what_took_the_name_of_a_leak_stays(api: ApiServer, cluster: Cluster) -> None:
    stray, _ = objects("spot_queue")
    api.create("configmaps", stray)
    (leak,) = leaks(cluster)
    name = stray["metadata"]["name"]
    api.delete("configmaps", "vision", name)
    new = api.create("configmaps", stray)
    remove(cluster, leak)
    found = cluster.get(CONFIG_MAPS, name)
    assert found is not None
    assert found["metadata"]["uid"] == new["metadata"]["uid"]
    api.delete("configmaps", "vision", name)
    remove(cluster, leak)


def test_a_removed_ray_job_takes_its_objects_along(api: ApiServer, cluster: Cluster) -> None:
    submit(api, jobDeploymentStatus="ValidationFailed")
    (leak,) = leaks(cluster, 0)
    api.requests.clear()
    remove(cluster, leak)
    asked = [item.path.partition("/namespaces/")[2] for item in api.requests if item.verb == "delete"]
    assert asked == [f"vision/rayjobs/{NAME}", f"vision/rayclusters/{NAME}-abcde"]
    assert cluster.objects(PODS), "the garbage collector's, in the background"
