"""A stand-in for KubeRay v1.7.0's RayCluster controller: pods, service, secret, and the status RayJobs wait for."""

from __future__ import annotations

from tests.kube.clock import Clock
from tests.kube.cluster import Cluster, Objects
from tests.kube.errors import ApiError
from tests.kube.podstatus import condition_true, is_ready, set_condition
from tests.kube.quantities import amount, check_quota, requests, shown
from tests.kube.raypods import auth_secret, head_pod, head_service, head_service_name, worker_pod
from tests.kube.schema import Object
from tests.kube.store import timestamp

COMPONENT = "raycluster-controller"
REQUEUE = 2


class ReplicaFailure(Exception):
    """Pods could not be made or removed; `reason` goes into the ReplicaFailure condition (empty: into none)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}\n{message}" if reason else message)
        self.reason = reason


class RayClusterController:
    """Brings the pods of each RayCluster to what its spec says."""

    def __init__(self, cluster: Cluster, clock: Clock) -> None:
        self._cluster = cluster
        self._clock = clock

    def reconcile(self, ray_cluster: Object) -> None:
        """One look at one RayCluster."""
        if "deletionTimestamp" in ray_cluster["metadata"]:
            return
        failure: ReplicaFailure | None = None
        self._ensure("secrets", auth_secret(ray_cluster))
        self._ensure("services", head_service(ray_cluster, head_service_name(ray_cluster), ray_cluster))
        try:
            self._reconcile_pods(ray_cluster)
        except ReplicaFailure as error:
            failure = error
        self._write_status(ray_cluster, failure)

    def _pods(self, ray_cluster: Object, selector: str = "") -> Objects:
        metadata = ray_cluster["metadata"]
        labels = f"ray.io/cluster={metadata['name']}" + (f",{selector}" if selector else "")
        return self._cluster.list("pods", metadata["namespace"], labels)

    def _ensure(self, plural: str, thing: Object | None) -> None:
        if thing and self._cluster.get(plural, thing["metadata"]["namespace"], thing["metadata"]["name"]) is None:
            self._cluster.create(plural, thing)

    def _reconcile_pods(self, ray_cluster: Object) -> None:
        heads = self._pods(ray_cluster, "ray.io/node-type=head")
        if not heads:
            self._create(ray_cluster, head_pod(ray_cluster), "Head")
        else:
            self._remove_broken(ray_cluster, heads, "Head")
        for group in ray_cluster["spec"].get("workerGroupSpecs") or []:
            pods = self._pods(ray_cluster, f"ray.io/node-type=worker,ray.io/group={group['groupName']}")
            if group.get("suspend"):
                for pod in pods:
                    self._cluster.delete("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
                continue
            self._remove_broken(ray_cluster, pods, "Worker")
            taken = {pod["metadata"]["labels"]["ray.io/worker-group-replica-index"] for pod in pods}
            free = (index for index in range(10_000) if str(index) not in taken)
            for _ in range(desired_replicas(group) - len(pods)):
                self._create(ray_cluster, worker_pod(ray_cluster, group, next(free)), "Worker")

    def _create(self, ray_cluster: Object, pod: Object, role: str) -> None:
        """Creates a pod; after a refusal (a quota) not again for a while, as the real work queue backs off."""
        uid = ray_cluster["metadata"]["uid"]
        if not self._clock.ready(uid, "pods"):
            raise ReplicaFailure("", "pods were deleted just now")
        if not self._clock.ready(uid, f"create {role}"):
            raise ReplicaFailure(f"FailedCreate{role}Pod", self._clock.note(uid, f"create {role}"))
        where = f"{pod['metadata']['namespace']}/{pod['metadata']['generateName']}"
        try:
            pod["metadata"]["name"] = self._cluster.store.unused_name(pod["metadata"]["generateName"])
            check_quota(self._cluster, pod)
            created = self._cluster.create("pods", pod)
        except ApiError as error:
            self._clock.postpone(uid, f"create {role}", 5, str(error))
            text = f"Failed to create {role.lower()} Pod {where}, {error}"
            self._event(ray_cluster, f"FailedToCreate{role}Pod", text, kind="Warning")
            raise ReplicaFailure(f"FailedCreate{role}Pod", str(error)) from error
        place = f"{created['metadata']['namespace']}/{created['metadata']['name']}"
        self._event(ray_cluster, f"Created{role}Pod", f"Created {role.lower()} Pod {place}")

    def _remove_broken(self, ray_cluster: Object, pods: Objects, role: str) -> None:
        """Deletes pods that ended for good (`shouldDeletePod`); their successors come at the next look."""
        gone = [pod for pod in pods if _should_delete(pod) and "deletionTimestamp" not in pod["metadata"]]
        for pod in gone:
            metadata, status = pod["metadata"], pod["status"]
            self._cluster.delete("pods", metadata["namespace"], metadata["name"])
            text = (
                f"Deleted {role.lower()} Pod {metadata['namespace']}/{metadata['name']}; Pod status: {status['phase']}"
            )
            text += f"; Pod restart policy: {pod['spec'].get('restartPolicy')}"
            self._event(ray_cluster, f"Deleted{role}Pod", text)
        if gone:
            self._clock.postpone(ray_cluster["metadata"]["uid"], "pods", REQUEUE)
            raise ReplicaFailure("", f"delete {len(gone)} unhealthy {role.lower()} Pods")

    def _write_status(self, ray_cluster: Object, failure: ReplicaFailure | None) -> None:
        metadata, spec = ray_cluster["metadata"], ray_cluster["spec"]
        pods = self._pods(ray_cluster)
        workers = [pod for pod in pods if pod["metadata"]["labels"]["ray.io/node-type"] == "worker"]
        head = next((pod for pod in pods if pod not in workers), None)
        groups = [group for group in spec.get("workerGroupSpecs") or [] if not group.get("suspend")]
        desired = sum(desired_replicas(group) for group in groups)
        old = ray_cluster.get("status") or {}
        status: Object = {
            **old,
            **_desired_resources(spec, groups),
            "observedGeneration": metadata.get("generation", 1),
            "desiredWorkerReplicas": desired,
            "minWorkerReplicas": sum(group.get("minReplicas") or 0 for group in groups),
            "maxWorkerReplicas": sum(group.get("maxReplicas") or 0 for group in groups),
            "readyWorkerReplicas": sum(is_ready(pod) for pod in workers),
            "availableWorkerReplicas": sum(pod.get("status", {}).get("phase") == "Running" for pod in workers),
            "endpoints": {"dashboard": "8265", "gcs-server": "6379", "client": "10001", "metrics": "8080"},
            "head": _head_info(ray_cluster, head),
        }
        all_ready = bool(pods) and all(is_ready(pod) for pod in pods)
        if failure is None and len(pods) == desired + 1 and all_ready:
            status |= {"state": "ready", "reason": ""}
        status["conditions"] = _conditions(ray_cluster, failure, head, all_ready)
        if status != old:
            status["lastUpdateTime"] = timestamp()
            if status.get("state") != old.get("state"):
                times = dict(old.get("stateTransitionTimes") or {})
                status["stateTransitionTimes"] = times | {status["state"]: timestamp()}
            self._cluster.update_status("rayclusters", metadata["namespace"], metadata["name"], status, replace=True)

    def _event(self, ray_cluster: Object, reason: str, message: str, *, kind: str = "Normal") -> None:
        self._cluster.event(ray_cluster, reason, message, kind=kind, component=COMPONENT, modern=True)


def desired_replicas(group: Object) -> int:
    """The number of pods a worker group should have."""
    replicas, hosts = group.get("replicas"), max(1, group.get("numOfHosts") or 1)
    least, most = group.get("minReplicas") or 0, group.get("maxReplicas")
    count = least if replicas is None else max(replicas, least)
    return hosts * (count if most is None else min(count, most))


def _should_delete(pod: Object) -> bool:
    status = pod.get("status", {})
    if status.get("phase") in ("Failed", "Succeeded"):
        return True
    name = pod["spec"]["containers"][0]["name"]
    main = next((entry for entry in status.get("containerStatuses") or [] if entry["name"] == name), None)
    ended = main is not None and "terminated" in main["state"]
    return status.get("phase") == "Running" and ended and pod["spec"].get("restartPolicy") == "Never"


def _head_info(ray_cluster: Object, head: Object | None) -> Object:
    service = head_service_name(ray_cluster)
    if head is None:
        return {"serviceName": service}
    address = head.get("status", {}).get("podIP", "")
    return {"podName": head["metadata"]["name"], "podIP": address, "serviceIP": address, "serviceName": service}


def _desired_resources(spec: Object, groups: Objects) -> Object:
    totals: dict[str, object] = {}
    for name, field in (("cpu", "desiredCPU"), ("memory", "desiredMemory"), ("nvidia.com/gpu", "desiredGPU")):
        total = requests(spec["headGroupSpec"]["template"]).get(name, amount(0))
        for group in groups:
            total += requests(group["template"]).get(name, amount(0)) * desired_replicas(group)
        totals[field] = shown(total)
    return totals | {"desiredTPU": "0"}


def _conditions(ray_cluster: Object, failure: ReplicaFailure | None, head: Object | None, all_ready: bool) -> Objects:
    conditions = list((ray_cluster.get("status") or {}).get("conditions") or [])
    if failure is None:
        conditions = [entry for entry in conditions if entry["type"] != "ReplicaFailure"]
    elif failure.reason:
        conditions = set_condition(
            conditions, type="ReplicaFailure", status="True", reason=failure.reason, message=str(failure)
        )
    conditions = set_condition(conditions, type="HeadPodReady", **_head_condition(head))
    if not condition_true(ray_cluster, "RayClusterProvisioned"):
        reason = "AllPodRunningAndReadyFirstTime" if all_ready else "RayClusterPodsProvisioning"
        first = "All Ray Pods are ready for the first time"
        message = first if all_ready else "RayCluster Pods are being provisioned for first time"
        truth = "True" if all_ready else "False"
        conditions = set_condition(
            conditions, type="RayClusterProvisioned", status=truth, reason=reason, message=message
        )
    for kind in ("RayClusterSuspended", "RayClusterSuspending"):
        conditions = set_condition(conditions, type=kind, status="False", reason=kind)
    return conditions


def _head_condition(head: Object | None) -> dict[str, str]:
    if head is None:
        return {"status": "False", "reason": "HeadPodNotFound", "message": "Head Pod not found"}
    status = head.get("status", {})
    ready = next((entry for entry in status.get("conditions") or [] if entry["type"] == "Ready"), None)
    if ready is None:
        return {"status": "False", "reason": "Unknown", "message": ""}
    reason, message = ready.get("reason") or "HeadPodRunningAndReady", ready.get("message") or ""
    if reason == "ContainersNotReady":
        for entry in status.get("containerStatuses") or []:
            state = entry["state"].get("waiting") or entry["state"].get("terminated")
            if state:
                message += f"; {entry['name']}: {state.get('message', '')}"
                return {"status": ready["status"], "reason": state["reason"], "message": message}
    return {"status": ready["status"], "reason": reason, "message": message}
