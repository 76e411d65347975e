"""A stand-in for KubeRay v1.7.0's RayJob controller: the state machine of `rayjob_controller.go`, K8sJobMode.

Left out: the other submission modes, cluster selectors, batch schedulers. Its 3 s between looks are as short as the
caller makes them; its other timers run on an emulated clock.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from tests.kube.clock import Clock
from tests.kube.cluster import Cluster, owner_reference
from tests.kube.raypods import PORTS, head_address, head_service, submitter_job
from tests.kube.rules import random_suffix
from tests.kube.schema import Object, duplicate
from tests.kube.store import timestamp
from tests.kube.validation import rayjob_error

COMPONENT = "rayjob-controller"
FINALIZER = "ray.io/rayjob-finalizer"
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
SUBMITTER_FINISHED_TIMEOUT = 30
TRANSITION_GRACE = 300
STATUS_CHECK_TIMEOUT = 300
DELETION_RANK = ("DeleteNone", "DeleteWorkers", "DeleteCluster", "DeleteSelf")


@dataclass(frozen=True)
class JobInfo:
    """What a Ray dashboard says about a job."""

    status: str
    message: str = ""
    start_time: int = 0
    end_time: int = 0


class Dashboards(Protocol):
    """The Ray dashboards of the clusters, real or scripted."""

    def ray_job(self, ray_cluster: Object, job_id: str) -> JobInfo | None:
        """A job, or None for a 404; OSError when the dashboard does not answer."""

    def stop_ray_job(self, ray_cluster: Object, job_id: str) -> None:
        """Asks for the job to stop; OSError when the dashboard does not answer."""


class Later(Exception):
    """Nothing to write now: look again."""


class RayJobController:
    """Moves each RayJob through its states."""

    def __init__(self, cluster: Cluster, dashboards: Dashboards, clock: Clock) -> None:
        self._cluster = cluster
        self._dashboards = dashboards
        self._clock = clock
        self._states = {
            "": self._new,
            "Initializing": self._initializing,
            "Running": self._running,
            "Suspending": self._release,
            "Retrying": self._release,
            "Suspended": self._suspended,
            "Complete": self._finished,
            "Failed": self._finished,
        }

    def reconcile(self, job: Object) -> None:
        """One look at one RayJob."""
        if "deletionTimestamp" in job["metadata"]:
            return self._delete(job)
        old = job.get("status") or {}
        status = duplicate(old)
        error = rayjob_error(job)
        if error:
            status |= {"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": error}
            kind = "InvalidRayJobMetadata" if "metadata is invalid" in error else "InvalidRayJobSpec"
            if old.get("jobDeploymentStatus") != "ValidationFailed":
                where = f"{job['metadata']['namespace']}/{job['metadata']['name']}"
                self._event(job, kind, f"{where}: {error}", kind="Warning")
            return self._write(job, old, status)
        handler = self._states.get(status.get("jobDeploymentStatus", ""))
        if handler is None:
            return None
        try:
            handler(job, status)
        except Later:
            return None
        _count(job, status)
        return self._write(job, old, status)

    def _write(self, job: Object, old: Object, status: Object) -> None:
        """Stores a status that differs in what matters; other changes are dropped, as in KubeRay."""
        fields = ("jobStatus", "jobDeploymentStatus", "jobStatusCheckFailureStartTime")
        changed = any(old.get(field) != status.get(field) for field in fields)
        if not changed and _cluster_status(old) == _cluster_status(status):
            return
        uid = job["metadata"]["uid"]
        if status.get("jobDeploymentStatus") in ("Complete", "Failed"):
            status["endTime"] = timestamp()
            self._clock.mark(uid, "ended")
        cleaned = {name: value for name, value in status.items() if value is not None}
        cleaned["observedGeneration"] = job["metadata"].get("generation", 1)
        self._cluster.update_status("rayjobs", *_place(job), cleaned, replace=True)

    def _new(self, job: Object, status: Object) -> None:
        metadata = job["metadata"]
        if FINALIZER not in (metadata.get("finalizers") or []):
            finalizers = [*(metadata.get("finalizers") or []), FINALIZER]
            self._cluster.patch("rayjobs", *_place(job), {"metadata": {"finalizers": finalizers}})
        generated = f"{metadata['name']}-{random_suffix()}"
        status["jobId"] = status.get("jobId") or job["spec"].get("jobId") or generated
        status["rayClusterName"] = status.get("rayClusterName") or f"{metadata['name']}-{random_suffix()}"
        status |= {"jobStatus": "", "jobDeploymentStatus": "Initializing", "startTime": timestamp()}
        self._clock.mark(metadata["uid"], "started")

    def _initializing(self, job: Object, status: Object) -> None:
        if self._suspend(job, status) or self._past_deadline(job, status, "activeDeadlineSeconds", "DeadlineExceeded"):
            return
        if self._past_deadline(job, status, "preRunningDeadlineSeconds", "PreRunningDeadlineExceeded"):
            return
        ray_cluster = self._ray_cluster(job, status)
        if not status.get("dashboardURL"):
            if (ray_cluster.get("status") or {}).get("state") != "ready":
                status["rayClusterStatus"] = ray_cluster.get("status") or {}
                return
            status["dashboardURL"] = f"{head_address(ray_cluster)}:{PORTS['dashboard']}"
        self._create_submitter(job, status, ray_cluster)
        status["jobDeploymentStatus"] = "Running"

    def _running(self, job: Object, status: Object) -> None:
        if self._suspend(job, status) or self._past_deadline(job, status, "activeDeadlineSeconds", "DeadlineExceeded"):
            return
        if self._past_grace(job, status) or self._past_status_checks(job, status):
            return
        ray_cluster = self._ray_cluster(job, status)
        self._ensure_service(job, ray_cluster)
        finished, failed = self._submitter(job, status)
        if finished and self._clock.passed(job["metadata"]["uid"], "submitter finished", SUBMITTER_FINISHED_TIMEOUT):
            _fail(status, "JobDeploymentStatusTransitionGracePeriodExceeded", "")
            limit = f"within {SUBMITTER_FINISHED_TIMEOUT}s"
            status["message"] = f"The RayJob submitter finished but the ray job did not reach terminal state {limit}"
            status["jobStatus"] = "FAILED"
            return
        if failed:
            return
        self._ask_dashboard(job, status, ray_cluster, finished)

    def _ask_dashboard(self, job: Object, status: Object, ray_cluster: Object, finished: bool) -> None:
        uid = job["metadata"]["uid"]
        try:
            info = self._dashboards.ray_job(ray_cluster, status["jobId"])
        except OSError as error:
            if status.get("jobStatusCheckFailureStartTime"):
                raise Later from error
            status["jobStatusCheckFailureStartTime"] = timestamp()
            self._clock.mark(uid, "checks failing")
            return
        if info is None:
            if not finished:
                raise Later
            _fail(status, "AppFailed", "Submitter completed but Ray job not found in RayCluster.")
            return
        status |= {"jobStatusCheckFailureStartTime": None, "rayClusterStatus": ray_cluster.get("status") or {}}
        status |= {"jobStatus": info.status, "message": info.message, "reason": None, "jobDeploymentStatus": "Running"}
        if info.status in TERMINAL and finished:
            status["jobDeploymentStatus"] = "Complete"
            if info.status == "FAILED":
                status |= {"jobDeploymentStatus": "Failed", "reason": "AppFailed"}
        times = dict(status.get("rayJobInfo") or {})
        if info.start_time:
            times["startTime"] = timestamp(datetime.fromtimestamp(info.start_time / 1000, UTC))
        if info.end_time:
            if "endTime" not in times:
                self._clock.mark(uid, "ray job ended")
            times["endTime"] = timestamp(datetime.fromtimestamp(info.end_time / 1000, UTC))
        status["rayJobInfo"] = times

    def _release(self, job: Object, status: Object) -> None:
        """Suspending and Retrying: everything goes before the state does."""
        if not (self._delete_cluster(job, status) & self._delete_submitter(job)):
            raise Later
        for field in ("rayClusterStatus", "rayClusterName", "dashboardURL", "jobId", "message", "reason", "rayJobInfo"):
            status.pop(field, None)
        for timer in ("submitter finished", "checks failing", "ray job ended"):
            self._clock.clear(job["metadata"]["uid"], timer)
        status |= {"jobStatusCheckFailureStartTime": None, "jobStatus": ""}
        status["jobDeploymentStatus"] = "Suspended" if status["jobDeploymentStatus"] == "Suspending" else ""

    def _suspended(self, job: Object, status: Object) -> None:
        if job["spec"].get("suspend"):
            raise Later
        status |= {"jobStatus": "", "jobDeploymentStatus": ""}

    def _finished(self, job: Object, status: Object) -> None:
        spec, uid = job["spec"], job["metadata"]["uid"]
        rules = (spec.get("deletionStrategy") or {}).get("deletionRules") or []
        if rules:
            due = [rule["policy"] for rule in rules if self._rule_due(job, status, rule["condition"])]
            if due:
                self._carry_out(job, status, max(due, key=DELETION_RANK.index))
        elif spec.get("shutdownAfterJobFinishes") and self._clock.passed(uid, "ended", _ttl(spec)):
            self._delete_cluster(job, status)
        raise Later

    def _rule_due(self, job: Object, status: Object, condition: Object) -> bool:
        name = "jobStatus" if "jobStatus" in condition else "jobDeploymentStatus"
        seconds = condition.get("ttlSeconds", 0)
        return status.get(name) == condition[name] and self._clock.passed(job["metadata"]["uid"], "ended", seconds)

    def _carry_out(self, job: Object, status: Object, policy: str) -> None:
        if policy == "DeleteSelf":
            self._cluster.delete("rayjobs", *_place(job))
        elif policy == "DeleteCluster":
            self._delete_cluster(job, status)
        elif policy == "DeleteWorkers":
            ray_cluster = self._cluster.get("rayclusters", job["metadata"]["namespace"], status["rayClusterName"])
            if ray_cluster and not all(group.get("suspend") for group in ray_cluster["spec"]["workerGroupSpecs"]):
                groups = [{**group, "suspend": True} for group in ray_cluster["spec"]["workerGroupSpecs"]]
                name = status["rayClusterName"]
                self._cluster.patch(
                    "rayclusters", job["metadata"]["namespace"], name, {"spec": {"workerGroupSpecs": groups}}
                )

    def _delete(self, job: Object) -> None:
        """A deleted RayJob: stop the Ray job if it can be reached, then let go."""
        status = job.get("status") or {}
        if FINALIZER not in (job["metadata"].get("finalizers") or []):
            return
        ray_cluster = self._cluster.get(
            "rayclusters", job["metadata"]["namespace"], status.get("rayClusterName") or "-"
        )
        if status.get("jobStatus") not in TERMINAL and ray_cluster is not None:
            with contextlib.suppress(OSError):
                self._dashboards.stop_ray_job(ray_cluster, status.get("jobId", ""))
        finalizers = [name for name in job["metadata"]["finalizers"] if name != FINALIZER]
        self._cluster.patch("rayjobs", *_place(job), {"metadata": {"finalizers": finalizers}})

    def _suspend(self, job: Object, status: Object) -> bool:
        if job["spec"].get("suspend"):
            status["jobDeploymentStatus"] = "Suspending"
            return True
        return False

    def _past_deadline(self, job: Object, status: Object, field: str, reason: str) -> bool:
        seconds = job["spec"].get(field)
        if seconds is None or not self._clock.passed(job["metadata"]["uid"], "started", seconds):
            return False
        began = (status.get("startTime") or "").replace("T", " ").replace("Z", " +0000 UTC")
        message = f"The RayJob has passed the {field}. StartTime: {began}. {field[0].upper()}{field[1:]}: {seconds}"
        _fail(status, reason, message)
        return True

    def _past_grace(self, job: Object, status: Object) -> bool:
        ended = (status.get("rayJobInfo") or {}).get("endTime")
        if status.get("jobStatus") not in TERMINAL or not ended:
            return False
        if not self._clock.passed(job["metadata"]["uid"], "ray job ended", TRANSITION_GRACE):
            return False
        reason = "JobDeploymentStatusTransitionGracePeriodExceeded"
        message = (
            "JobDeploymentStatus does not transition to Complete or Failed within the grace period after JobStatus"
        )
        _fail(status, reason, f"{message} reaches a terminal state.")
        if status["jobStatus"] != "FAILED":
            status["jobDeploymentStatus"] = "Complete"
        return True

    def _past_status_checks(self, job: Object, status: Object) -> bool:
        began = status.get("jobStatusCheckFailureStartTime")
        if not began or not self._clock.passed(job["metadata"]["uid"], "checks failing", STATUS_CHECK_TIMEOUT):
            return False
        message = f"Job status checks have been failing since {began}; exceeded timeout of {STATUS_CHECK_TIMEOUT}s"
        _fail(status, "JobStatusCheckTimeoutExceeded", message)
        return True

    def _ray_cluster(self, job: Object, status: Object) -> Object:
        """The RayCluster of a RayJob, made if it is not there."""
        metadata, name = job["metadata"], status["rayClusterName"]
        found = self._cluster.get("rayclusters", metadata["namespace"], name)
        if found is not None:
            return found
        origin = {"ray.io/originated-from-cr-name": metadata["name"], "ray.io/originated-from-crd": "RayJob"}
        origin["ray.io/job-submission-mode"] = job["spec"].get("submissionMode", "K8sJobMode")
        made = self._cluster.create("rayclusters", {
            "metadata": {
                "name": name,
                "namespace": metadata["namespace"],
                "labels": {**(metadata.get("labels") or {}), **origin},
                "annotations": dict(metadata.get("annotations") or {}),
                "ownerReferences": [owner_reference(job)],
            },
            "spec": duplicate(job["spec"]["rayClusterSpec"]),
        })  # fmt: skip
        self._event(job, "CreatedRayCluster", f"Created RayCluster {metadata['namespace']}/{name}")
        return made

    def _ensure_service(self, job: Object, ray_cluster: Object) -> None:
        namespace, name = job["metadata"]["namespace"], f"{job['metadata']['name']}-head-svc"
        wanted = head_service(ray_cluster, name, job)
        found = self._cluster.get("services", namespace, name)
        if found is None:
            self._cluster.create("services", wanted)
        elif found["spec"]["selector"] != wanted["spec"]["selector"]:
            self._cluster.patch("services", namespace, name, {"spec": {"selector": wanted["spec"]["selector"]}})

    def _create_submitter(self, job: Object, status: Object, ray_cluster: Object) -> None:
        namespace, name = _place(job)
        if self._cluster.get("jobs", namespace, name) is not None:
            return
        self._cluster.create("jobs", submitter_job(job, status, ray_cluster))
        self._event(job, "CreatedRayJobSubmitter", f"Created Kubernetes Job {namespace}/{name}")

    def _submitter(self, job: Object, status: Object) -> tuple[bool, bool]:
        """Whether the submitter has finished, and whether it has failed (which the status then says)."""
        submitter = self._cluster.get("jobs", *_place(job))
        if submitter is None:
            raise Later
        conditions = (submitter.get("status") or {}).get("conditions") or []
        ends = {entry["type"]: entry for entry in conditions if entry["status"] == "True"}
        failed = ends.get("Failed")
        if failed is not None:
            message = f"Job submission has failed. Reason: {failed['reason']}. Message: {failed['message']}"
            of_app = status.get("jobStatus") == "FAILED"
            _fail(
                status, "AppFailed" if of_app else "SubmissionFailed", status.get("message", "") if of_app else message
            )
        return "Complete" in ends or failed is not None, failed is not None

    def _delete_cluster(self, job: Object, status: Object) -> bool:
        """Deletes the RayCluster; true once it is gone."""
        namespace, name = job["metadata"]["namespace"], status.get("rayClusterName") or "-"
        found = self._cluster.get("rayclusters", namespace, name)
        if found is not None and "deletionTimestamp" not in found["metadata"]:
            self._cluster.delete("rayclusters", namespace, name)
            self._event(job, "DeletedRayCluster", f"Deleted cluster {namespace}/{name}")
        return found is None

    def _delete_submitter(self, job: Object) -> bool:
        """Deletes the submitter Job; true once it is gone."""
        namespace, name = _place(job)
        found = self._cluster.get("jobs", namespace, name)
        if found is not None and "deletionTimestamp" not in found["metadata"]:
            self._cluster.delete("jobs", namespace, name)
            self._event(job, "DeletedRayJobSubmitter", f"Deleted submitter K8s Job {namespace}/{name}")
        return found is None

    def _event(self, job: Object, reason: str, message: str, *, kind: str = "Normal") -> None:
        self._cluster.event(job, reason, message, kind=kind, component=COMPONENT, modern=True)


def _ttl(spec: Object) -> float:
    return float(spec.get("ttlSecondsAfterFinished") or 0)


def _place(job: Object) -> tuple[str, str]:
    return job["metadata"]["namespace"], job["metadata"]["name"]


def _fail(status: Object, reason: str, message: str) -> None:
    status |= {"jobDeploymentStatus": "Failed", "reason": reason, "message": message}


def _cluster_status(status: Object) -> Object:
    ignored = ("lastUpdateTime", "observedGeneration", "stateTransitionTimes")
    return {name: value for name, value in (status.get("rayClusterStatus") or {}).items() if name not in ignored}


def _count(job: Object, status: Object) -> None:
    """Counts ends, and turns a failure into a retry while `backoffLimit` lasts."""
    failed, succeeded = status.get("failed", 0), status.get("succeeded", 0)
    deployment = status.get("jobDeploymentStatus")
    status["failed"] = failed + (deployment == "Failed")
    status["succeeded"] = succeeded + (deployment == "Complete" and status.get("jobStatus") == "SUCCEEDED")
    limit, final = job["spec"].get("backoffLimit"), ("DeadlineExceeded", "JobStatusCheckTimeoutExceeded")
    if (
        deployment == "Failed"
        and limit is not None
        and status["failed"] < limit + 1
        and status.get("reason") not in final
    ):
        status["jobDeploymentStatus"] = "Retrying"
