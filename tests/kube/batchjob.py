"""A stand-in for the batch/v1 Job controller: one pod at a time, `backoffLimit`, conditions Complete and Failed."""

from __future__ import annotations

from tests.kube.clock import Clock
from tests.kube.cluster import Cluster, Objects, owner_reference
from tests.kube.errors import ApiError
from tests.kube.podstatus import condition_true, is_ready, set_condition
from tests.kube.quantities import check_quota
from tests.kube.schema import Object, duplicate
from tests.kube.store import timestamp

_COMPONENT = "job-controller"
_FIRST_DELAY = 10.0
_LONGEST_DELAY = 360.0


class JobController:
    """Runs each Job's pod until one succeeds or too many have failed."""

    def __init__(self, cluster: Cluster, clock: Clock) -> None:
        self._cluster = cluster
        self._clock = clock
        # Pods that were seen to fail, by the uid of the Job: a pod that is deleted afterwards still counts.
        self._failed: dict[str, set[str]] = {}
        self._known: dict[str, set[str]] = {}

    def reconcile(self, job: Object) -> None:
        """One look at one Job."""
        if "deletionTimestamp" in job["metadata"] or any(condition_true(job, kind) for kind in ("Complete", "Failed")):
            return
        uid, pods = job["metadata"]["uid"], self._pods(job)
        failed = self._count_failed(uid, pods)
        active = [pod for pod in pods if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")]
        succeeded = [pod for pod in pods if pod.get("status", {}).get("phase") == "Succeeded"]
        limit = job["spec"].get("backoffLimit", 6)
        restarts = sum(_restarts(pod) for pod in active if pod["spec"].get("restartPolicy") == "OnFailure")
        conditions = list((job.get("status") or {}).get("conditions") or [])
        if succeeded:
            message = "Reached expected number of succeeded pods"
            conditions = _end(conditions, "SuccessCriteriaMet", "Complete", "CompletionsReached", message)
        elif failed > limit or (restarts > 0 and restarts >= limit):
            message = "Job has reached the specified backoff limit"
            conditions = _end(conditions, "FailureTarget", "Failed", "BackoffLimitExceeded", message)
            for pod in active:
                self._cluster.delete("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
            active = []
        elif not active and self._clock.ready(uid, "next pod"):
            self._start(job, failed)
        self._write(job, conditions, active, len(succeeded), failed)

    def _pods(self, job: Object) -> Objects:
        selector = f"batch.kubernetes.io/controller-uid={job['metadata']['uid']}"
        return self._cluster.list("pods", job["metadata"]["namespace"], selector)

    def _count_failed(self, uid: str, pods: Objects) -> int:
        """Failed pods so far; each one doubles the pause before the next."""
        failed = self._failed.setdefault(uid, set())
        present = {pod["metadata"]["uid"]: pod for pod in pods}
        ended = {one for one, pod in present.items() if pod.get("status", {}).get("phase") == "Failed"}
        vanished = self._known.get(uid, set()) - set(present)
        for _ in (ended | vanished) - failed:
            self._clock.postpone(uid, "next pod", min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** len(failed)))
        failed |= ended | vanished
        self._known[uid] = set(present)
        return len(failed)

    def _start(self, job: Object, failed: int) -> None:
        metadata = job["metadata"]
        pod = duplicate(job["spec"]["template"])
        labels = {
            "batch.kubernetes.io/controller-uid": metadata["uid"],
            "batch.kubernetes.io/job-name": metadata["name"],
            "controller-uid": metadata["uid"],
            "job-name": metadata["name"],
        }
        name = self._cluster.store.unused_name(f"{metadata['name']}-")
        pod["metadata"] = {
            **(pod.get("metadata") or {}),
            "name": name,
            "namespace": metadata["namespace"],
            "labels": {**((pod.get("metadata") or {}).get("labels") or {}), **labels},
            "ownerReferences": [owner_reference(job)],
        }
        pod["spec"] = {"terminationGracePeriodSeconds": 30, "serviceAccountName": "default", **pod["spec"]}
        try:
            check_quota(self._cluster, pod)
            created = self._cluster.create("pods", pod)
        except ApiError as error:
            self._clock.postpone(metadata["uid"], "next pod", 5)
            self._cluster.event(job, "FailedCreate", f"Error creating: {error}", kind="Warning", component=_COMPONENT)
            return
        self._known.setdefault(metadata["uid"], set()).add(created["metadata"]["uid"])
        self._clock.postpone(metadata["uid"], "next pod", _FIRST_DELAY * 2**failed)
        self._cluster.event(job, "SuccessfulCreate", f"Created pod: {name}", component=_COMPONENT)

    def _write(self, job: Object, conditions: Objects, active: Objects, succeeded: int, failed: int) -> None:
        old = job.get("status") or {}
        status: Object = {
            "startTime": old.get("startTime") or timestamp(),
            "active": len(active),
            "ready": sum(is_ready(pod) for pod in active),
            "succeeded": succeeded,
            "failed": failed,
            "conditions": conditions,
        }
        if any(entry["type"] == "Complete" for entry in conditions):
            status["completionTime"] = timestamp()
        status = {name: value for name, value in status.items() if value not in (0, [])}
        if status != old:
            self._cluster.update_status(
                "jobs", job["metadata"]["namespace"], job["metadata"]["name"], status, replace=True
            )


def _end(conditions: Objects, first: str, last: str, reason: str, message: str) -> Objects:
    for kind in (first, last):
        conditions = set_condition(conditions, type=kind, status="True", reason=reason, message=message)
    return conditions


def _restarts(pod: Object) -> int:
    return sum(entry["restartCount"] for entry in pod.get("status", {}).get("containerStatuses") or [])
