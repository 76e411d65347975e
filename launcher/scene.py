"""Collects what a cluster says of one run: once by asking, or again and again by watching. Judges nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress

from launcher.cluster import EVENTS, NODES, PODS, RAY_CLUSTERS, RAY_JOBS, WORKLOADS, Cluster, Object
from launcher.diagnose import Scene
from launcher.errors import InfrastructureError, LaunchError, SiteError
from launcher.labels import JOB_UID_LABEL, QUEUE_LABEL, RUN_LABEL
from launcher.mirror import Mirror

NODES_SECONDS = 60.0
"""Nodes change seldom, and only why a run waits for one depends on them."""


def look(cluster: Cluster, name: str) -> Scene:
    """The scene of the run of that name, by a few requests."""
    rayjob = cluster.get(RAY_JOBS, name)
    if rayjob is None:
        return Scene()
    label = f"{RUN_LABEL}={name}"
    clusters, pods = cluster.objects(RAY_CLUSTERS, labels=label), cluster.objects(PODS, labels=label)
    if _settled(rayjob):
        return _scene(name, rayjob, clusters, pods, [], [], None)
    workloads = cluster.objects(WORKLOADS, labels=_job_uid(rayjob)) if _queued(rayjob) else []
    return _scene(name, rayjob, clusters, pods, cluster.objects(EVENTS), workloads, nodes(cluster))


def nodes(cluster: Cluster) -> list[Object] | None:
    """The cluster's nodes, or None if this user may not read them."""
    try:
        return cluster.objects(NODES)
    except SiteError:
        return None


def crashed(scene: Scene) -> Iterator[tuple[Object, Object]]:
    """The containers that crash again and again, each as (pod, container status)."""
    for pod in scene.pods:
        for status in (pod.get("status") or {}).get("containerStatuses") or []:
            if ((status.get("state") or {}).get("waiting") or {}).get("reason") == "CrashLoopBackOff":
                yield pod, status


class Watcher:
    """The scene of a run, kept current by watches; it asks for nothing else but nodes, once a minute while it waits."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster, self._name = cluster, name
        self.changed = threading.Condition()
        label = f"{RUN_LABEL}={name}"
        self._jobs = Mirror(cluster, RAY_JOBS, fields=f"metadata.name={name}", trim=_trimmed, changed=self.changed)
        self._clusters = Mirror(cluster, RAY_CLUSTERS, labels=label, trim=_trimmed, changed=self.changed)
        self._pods = Mirror(cluster, PODS, labels=label, trim=_trimmed, changed=self.changed)
        self._events: Mirror | None = None
        self._workloads: Mirror | None = None
        self._nodes: list[Object] | None = None
        self._asked = float("-inf")
        self._mirrors = [self._jobs, self._clusters, self._pods]

    def scene(self, seconds: float = 10.0) -> Scene:
        """The scene as last seen; raises what keeps it from being current, if nothing was seen for so many seconds."""
        for mirror in self._mirrors:
            if not mirror.ready(seconds):  # what was not seen is not gone
                raise mirror.trouble or InfrastructureError("the API server is slow to answer",
                                                            where=self._cluster.where, hint="try again")  # fmt: skip
        trouble = next((mirror.trouble for mirror in self._mirrors if mirror.trouble), None)
        if trouble is not None:
            raise trouble
        rayjob = next(iter(self._jobs.objects()), None)
        if rayjob is None:
            return Scene()
        clusters, pods = list(self._clusters.objects()), list(self._pods.objects())
        if _settled(rayjob):
            self._rest()
            return _scene(self._name, rayjob, clusters, pods, [], [], None)
        return self._waiting(rayjob, clusters, pods)

    def close(self) -> None:
        """Ends the watches."""
        for mirror in [*self._mirrors, self._events, self._workloads]:
            if mirror is not None:
                mirror.close()

    def _waiting(self, rayjob: Object, clusters: list[Object], pods: list[Object]) -> Scene:
        if self._events is None:
            self._events = Mirror(self._cluster, EVENTS, trim=_trimmed, changed=self.changed)
            self._events.ready(5.0)
        if self._workloads is None and _queued(rayjob):
            self._workloads = Mirror(self._cluster, WORKLOADS, labels=_job_uid(rayjob), trim=_trimmed,
                                     changed=self.changed)  # fmt: skip
            self._workloads.ready(5.0)
        if time.monotonic() - self._asked > NODES_SECONDS:
            self._asked = time.monotonic()
            with suppress(LaunchError):  # what was seen a minute ago will do
                self._nodes = nodes(self._cluster)
        workloads = list(self._workloads.objects()) if self._workloads else []
        return _scene(self._name, rayjob, clusters, pods, list(self._events.objects()), workloads, self._nodes)

    def _rest(self) -> None:
        """A run that runs needs neither the events of a whole namespace nor its workload."""
        for mirror in (self._events, self._workloads):
            if mirror is not None:
                mirror.close()
        self._events = self._workloads = None


def _settled(rayjob: Object) -> bool:
    status = rayjob.get("status") or {}
    return status.get("jobDeploymentStatus") in ("Complete", "ValidationFailed") or (
        status.get("jobDeploymentStatus") == "Running" and status.get("jobStatus") == "RUNNING"
    )


def _queued(rayjob: Object) -> bool:
    return QUEUE_LABEL in (rayjob["metadata"].get("labels") or {})


def _job_uid(rayjob: Object) -> str:
    return f"{JOB_UID_LABEL}={rayjob['metadata']['uid']}"


def _scene(
    name: str, rayjob: Object, clusters: list[Object], pods: list[Object], events: list[Object],
    workloads: list[Object], seen: list[Object] | None,
) -> Scene:  # fmt: skip
    wanted = (rayjob.get("status") or {}).get("rayClusterName")
    current = next((item for item in clusters if item["metadata"]["name"] == wanted), None)
    workload = next(iter(workloads), None)
    mine = {name, *(item["metadata"]["name"] for item in [*clusters, *pods, *workloads])}
    mine |= {pod["spec"]["nodeName"] for pod in pods if pod["spec"].get("nodeName")}
    about = (item for item in events if (item.get("involvedObject") or item.get("regarding") or {}).get("name") in mine)
    return Scene(rayjob, current, tuple(pods), tuple(about), workload, None if seen is None else tuple(seen))


def _trimmed(item: Object) -> Object:
    """The object without what nobody reads, which is most of it."""
    metadata = {key: value for key, value in item["metadata"].items() if key not in ("managedFields", "annotations")}
    return {**item, "metadata": metadata}
