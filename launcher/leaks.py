"""What a run left behind on a cluster though it should not have: found by looking at the cluster alone.

By design nothing is left; this is for what no design foresees, such as an operator that was down. Only objects with
the label of a run are ever looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from launcher.cluster import CONFIG_MAPS, PODS, RAY_CLUSTERS, RAY_JOBS, Cluster, Kind
from launcher.diagnose.scheduling import requests
from launcher.errors import LaunchError
from launcher.labels import RUN_LABEL, STORAGE_NOTE
from launcher.manifest import TTL_SECONDS
from launcher.runs import Run

PATIENCE_SECONDS = 300.0
"""What is gone by itself within this time is no leak."""


@dataclass(frozen=True)
class Leak:
    """An object to delete, why, and the GPUs that its pods hold."""

    kind: Kind
    name: str
    uid: str
    run: str
    why: str
    gpus: int = 0


def find_leaks(cluster: Cluster, gpu_resource: str, now: float) -> list[Leak]:
    """Everything of runs that holds what it should have given back."""
    jobs = {item["metadata"]["name"]: item for item in cluster.objects(RAY_JOBS, labels=RUN_LABEL)}
    clusters = cluster.objects(RAY_CLUSTERS, labels=RUN_LABEL)
    pods = [pod for pod in cluster.objects(PODS, labels=RUN_LABEL) if _alive(pod)]
    maps = cluster.objects(CONFIG_MAPS, labels=RUN_LABEL)
    held: dict[str, int] = {}
    for pod in pods:
        run = pod["metadata"]["labels"][RUN_LABEL]
        held[run] = held.get(run, 0) + round(requests(pod).get(gpu_resource, 0))
    uids = {item["metadata"]["uid"] for item in jobs.values()}
    # One that was applied by hand has no owner, and is read all the same.
    read = {name for job in jobs.values() for name in _config_maps(job)}
    unread = [item for item in maps if item["metadata"]["name"] not in read]
    living = {run for run in (pod["metadata"]["labels"][RUN_LABEL] for pod in pods)}
    return [
        *_jobs(jobs, living, held, now),
        *_orphans(RAY_CLUSTERS, clusters, uids, "its RayJob is gone", held, now),
        *_orphans(CONFIG_MAPS, unread, uids, "no RayJob owns it", {}, now),
    ]


def remove(cluster: Cluster, leak: Leak) -> None:
    """Deletes it, and with it what it owns; not if another has taken its name meanwhile."""
    cluster.delete(leak.kind, leak.name, uid=leak.uid)
    if leak.kind is RAY_JOBS:
        # Without the operator the RayJob's finalizer keeps it, and so the cluster, which has the GPUs.
        for item in cluster.objects(RAY_CLUSTERS, labels=f"{RUN_LABEL}={leak.run}"):
            if leak.uid in _owners(item):
                cluster.delete(RAY_CLUSTERS, item["metadata"]["name"], uid=item["metadata"]["uid"])


def _jobs(jobs: dict[str, dict[str, Any]], living: set[str], held: dict[str, int], now: float) -> Iterator[Leak]:
    for name, job in jobs.items():
        why = _overdue(job, now) or _over(job, now)
        if why and name in living:
            yield Leak(RAY_JOBS, name, job["metadata"]["uid"], name, why, held.get(name, 0))


def _overdue(job: dict[str, Any], now: float) -> str:
    """What the cluster itself says of a RayJob whose pods should have gone."""
    status, spec = job.get("status") or {}, job["spec"]
    state, deleted = status.get("jobDeploymentStatus"), _time(job["metadata"].get("deletionTimestamp"))
    if deleted and now - deleted > PATIENCE_SECONDS:
        return "it was deleted; the KubeRay operator does not act"
    if state == "ValidationFailed":
        return "KubeRay refused it, and then does not clean up"
    if state in ("Complete", "Failed"):
        ended = _time(status.get("endTime")) or _time(job["metadata"]["creationTimestamp"])
        return "it has ended, its pods are still there" if now - ended > TTL_SECONDS + PATIENCE_SECONDS else ""
    began, limit = _time(status.get("startTime")), spec.get("activeDeadlineSeconds")
    if began and limit and now - began > limit + PATIENCE_SECONDS:
        return "it is past its deadline; the KubeRay operator does not act"
    return ""


def _over(job: dict[str, Any], now: float) -> str:
    """What the run directory says of a RayJob that goes on."""
    storage = (job["metadata"].get("annotations") or {}).get(STORAGE_NOTE)
    if not storage:
        return ""
    try:
        state = Run(storage, job["metadata"]["name"]).state()
    except LaunchError:
        return ""
    late = state.ended is not None and now - state.ended > PATIENCE_SECONDS
    return f"the run is {state.status.lower()}, its pods are still there" if state.status.final and late else ""


def _config_maps(job: dict[str, Any]) -> Iterator[str]:
    """The ConfigMaps that the RayJob's submitter mounts."""
    pod = (job["spec"].get("submitterPodTemplate") or {}).get("spec") or {}
    for volume in pod.get("volumes") or []:
        if "configMap" in volume:
            yield volume["configMap"]["name"]


def _orphans(
    kind: Kind, items: list[dict[str, Any]], uids: set[str], why: str, held: dict[str, int], now: float
) -> Iterator[Leak]:
    for item in items:
        metadata = item["metadata"]
        young = now - _time(metadata["creationTimestamp"]) < 2 * PATIENCE_SECONDS
        if not _owners(item) & uids and not young:
            run = metadata["labels"][RUN_LABEL]
            yield Leak(kind, metadata["name"], metadata["uid"], run, why, held.get(run, 0))


def _owners(item: dict[str, Any]) -> set[str]:
    return {owner["uid"] for owner in item["metadata"].get("ownerReferences") or []}


def _alive(pod: dict[str, Any]) -> bool:
    return (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")


def _time(text: str | None) -> float:
    return datetime.fromisoformat(text).timestamp() if text else 0.0
