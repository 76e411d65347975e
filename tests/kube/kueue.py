"""A stand-in for Kueue v0.19: RayJobs with a queue name wait, suspended, until their GPUs fit the quota.

One ClusterQueue with one flavor, first come first served. Only GPUs count.
"""

from __future__ import annotations

import zlib

from tests.kube.cluster import Cluster, Objects, owner_reference
from tests.kube.errors import ApiError
from tests.kube.podstatus import condition_true, set_condition
from tests.kube.quantities import GPU, requests
from tests.kube.raycluster import desired_replicas
from tests.kube.resources import KUEUE, RESOURCES, Resource, crd_manifest
from tests.kube.schema import Object

QUEUE_LABEL = f"{KUEUE}/queue-name"
FLAVOR = "default-flavor"
_COMPONENT = "kueue-admission"


class Kueue:
    """Holds RayJobs back while the quota is used up."""

    def __init__(self, cluster: Cluster, quota_gpus: int, *, namespace: str, queue: str) -> None:
        self.quota_gpus = quota_gpus
        self._cluster = cluster
        self._order: dict[str, int] = {}
        cluster.kueue_installed = True
        cluster.webhooks.append(self._suspend)
        for resource in RESOURCES:
            if resource.group == KUEUE:
                cluster.create("customresourcedefinitions", crd_manifest(resource))
        quota = {"name": GPU, "nominalQuota": quota_gpus}
        groups = [{"coveredResources": [GPU], "flavors": [{"name": FLAVOR, "resources": [quota]}]}]
        spec = {"namespaceSelector": {}, "queueingStrategy": "BestEffortFIFO", "resourceGroups": groups}
        active = set_condition([], type="Active", status="True", reason="Ready", message="Can admit new workloads")
        cluster.create("resourceflavors", {"metadata": {"name": FLAVOR}, "spec": {}})
        status = {"conditions": active}
        cluster.create("clusterqueues", {"metadata": {"name": "cluster-queue"}, "spec": spec, "status": status})
        cluster.add_namespace(namespace)
        local = {"metadata": {"name": queue, "namespace": namespace}, "spec": {"clusterQueue": "cluster-queue"}}
        cluster.create("localqueues", {**local, "status": status})

    def step(self) -> None:
        """One look at all RayJobs with a queue."""
        for job in self._jobs():
            if self._workload(job) is None and "deletionTimestamp" not in job["metadata"]:
                self._create_workload(job)
        used = sum(gpus(job) for job in self._jobs() if self._holds_quota(job))
        waiting = 0
        for job in self._jobs():
            workload = self._workload(job)
            if workload is None or "deletionTimestamp" in job["metadata"]:
                continue
            if _state(job) in ("Complete", "Failed", "ValidationFailed"):
                self._finish(workload, job)
            elif not condition_true(workload, "QuotaReserved") and not condition_true(workload, "Finished"):
                admitted = self._try_admit(workload, job, used)
                used += gpus(job) if admitted else 0
                waiting += not admitted
        self._count(waiting)

    def evict(self, namespace: str, name: str, *, reason: str = "Preempted", message: str = "Preempted") -> None:
        """Takes the quota back from a running RayJob: it is suspended and waits again."""
        job = self._cluster.get("rayjobs", namespace, name)
        workload = self._workload(job) if job else None
        if workload is None:
            raise LookupError(name)
        self._cluster.patch("rayjobs", namespace, name, {"spec": {"suspend": True}})
        self._condition(workload, "Evicted", "True", reason, message)
        self._condition(workload, "QuotaReserved", "False", "PendingEvaluation", "The workload was evicted")
        self._condition(workload, "Admitted", "False", "NoReservation", "The workload has no reservation")

    def _suspend(self, resource: Resource, operation: str, thing: Object) -> None:
        """The webhook: what has a queue starts suspended, and must be fit for suspension."""
        labels = thing["metadata"].get("labels") or {}
        if resource.plural != "rayjobs" or operation != "CREATE" or QUEUE_LABEL not in labels:
            return
        if not thing["spec"].get("shutdownAfterJobFinishes"):
            why = "spec.shutdownAfterJobFinishes: Invalid value: false: a kueue managed job should delete the cluster"
            denied = 'admission webhook "vrayjob.kb.io" denied the request'
            raise ApiError(403, f"{denied}: {why} after finishing", reason="Forbidden")
        thing["spec"]["suspend"] = True

    def _jobs(self) -> Objects:
        """RayJobs with a queue, the oldest first."""
        for job in self._cluster.list("rayjobs", labels=QUEUE_LABEL):
            self._order.setdefault(job["metadata"]["uid"], len(self._order))
        jobs = self._cluster.list("rayjobs", labels=QUEUE_LABEL)
        return sorted(jobs, key=lambda job: self._order.get(job["metadata"]["uid"], len(self._order)))

    def _workload(self, job: Object) -> Object | None:
        return self._cluster.get("workloads", job["metadata"]["namespace"], workload_name(job))

    def _create_workload(self, job: Object) -> None:
        spec = job["spec"]["rayClusterSpec"]
        sets = [{"name": "head", "count": 1, "template": spec["headGroupSpec"]["template"]}]
        for group in spec.get("workerGroupSpecs") or []:
            sets.append({"name": group["groupName"], "count": desired_replicas(group), "template": group["template"]})
        if job["spec"].get("submitterPodTemplate"):
            sets.append({"name": "submitter", "count": 1, "template": job["spec"]["submitterPodTemplate"]})
        labels = job["metadata"].get("labels") or {}
        metadata = {"name": workload_name(job), "namespace": job["metadata"]["namespace"]}
        metadata |= {"labels": {f"{KUEUE}/job-uid": job["metadata"]["uid"]}, "ownerReferences": [owner_reference(job)]}
        body: Object = {"queueName": labels[QUEUE_LABEL], "podSets": sets, "active": True}
        if labels.get(f"{KUEUE}/priority-class"):
            kind = {"group": KUEUE, "kind": "WorkloadPriorityClass", "name": labels[f"{KUEUE}/priority-class"]}
            body |= {"priorityClassRef": kind, "priority": 0}
        self._cluster.create("workloads", {"metadata": metadata, "spec": body})

    def _holds_quota(self, job: Object) -> bool:
        """Whether a RayJob uses quota: it is admitted, or evicted and not yet stopped."""
        workload = self._workload(job)
        if workload is None or condition_true(workload, "Finished"):
            return False
        return condition_true(workload, "QuotaReserved") or _state(job) in ("Running", "Suspending")

    def _try_admit(self, workload: Object, job: Object, used: int) -> bool:
        queue = workload["spec"]["queueName"]
        wanted, name = gpus(job), job["metadata"]["name"]
        if _state(job) not in ("", "Suspended"):
            return False
        if self._cluster.get("localqueues", job["metadata"]["namespace"], queue) is None:
            self._refuse(workload, "Misconfigured", f"LocalQueue {queue} doesn't exist")
        elif wanted > self.quota_gpus:
            why = f"request > maximum capacity ({wanted} > {self.quota_gpus})"
            why = f"insufficient quota for {GPU} in flavor {FLAVOR}, {why}"
            self._refuse(workload, "ExceedsMaxQuota", f"couldn't assign flavors to pod set gpu: {why}")
        elif used + wanted > self.quota_gpus:
            more = used + wanted - self.quota_gpus
            why = f"insufficient unused quota for {GPU} in flavor {FLAVOR}, {more} more needed"
            self._refuse(workload, "WaitingForQuota", f"couldn't assign flavors to pod set gpu: {why}")
        else:
            text = "Quota reserved in ClusterQueue cluster-queue"
            self._condition(workload, "QuotaReserved", "True", "QuotaReserved", text)
            self._condition(workload, "Admitted", "True", "Admitted", "The workload is admitted")
            self._cluster.patch("rayjobs", job["metadata"]["namespace"], name, {"spec": {"suspend": False}})
            self._cluster.event(
                workload, "QuotaReserved", f"{text}, wait time since queued was 0s", component=_COMPONENT
            )
            return True
        return False

    def _refuse(self, workload: Object, reason: str, message: str) -> None:
        self._condition(workload, "QuotaReserved", "False", reason, message)
        self._cluster.event(workload, "Pending", message, component=_COMPONENT)

    def _finish(self, workload: Object, job: Object) -> None:
        if not condition_true(workload, "Finished"):
            good = (job.get("status") or {}).get("jobStatus") == "SUCCEEDED"
            self._condition(workload, "Finished", "True", "Succeeded" if good else "Failed", "Job finished")

    def _condition(self, workload: Object, kind: str, truth: str, reason: str, message: str) -> None:
        namespace, name = workload["metadata"]["namespace"], workload["metadata"]["name"]
        present = self._cluster.get("workloads", namespace, name)
        if present is not None:
            old = (present.get("status") or {}).get("conditions") or []
            new = set_condition(old, type=kind, status=truth, reason=reason, message=message)
            self._cluster.update_status("workloads", namespace, name, {"conditions": new})

    def _count(self, waiting: int) -> None:
        holding = sum(self._holds_quota(job) for job in self._jobs())
        numbers = {"pendingWorkloads": waiting, "admittedWorkloads": holding, "reservingWorkloads": holding}
        for queue in self._cluster.list("localqueues"):
            self._cluster.update_status(
                "localqueues", queue["metadata"]["namespace"], queue["metadata"]["name"], numbers
            )
        self._cluster.update_status("clusterqueues", None, "cluster-queue", numbers)


def _state(job: Object) -> str:
    return str((job.get("status") or {}).get("jobDeploymentStatus", ""))


def workload_name(job: Object) -> str:
    """The name Kueue derives for the Workload of a RayJob."""
    digest = zlib.crc32(job["metadata"]["uid"].encode()) & 0xFFFFF
    return f"rayjob-{job['metadata']['name']}-{digest:05x}"


def gpus(job: Object) -> int:
    """The GPUs a RayJob will hold."""
    spec = job["spec"]["rayClusterSpec"]
    total = requests(spec["headGroupSpec"]["template"]).get(GPU, 0)
    for group in spec.get("workerGroupSpecs") or []:
        total += requests(group["template"]).get(GPU, 0) * desired_replicas(group)
    return int(total)
