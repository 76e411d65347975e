"""A planned run -> the Kubernetes objects that carry it out: a ConfigMap with its spec, and a KubeRay RayJob. Pure.

What `--dry-run` prints and what is submitted is made here and nowhere else. Everything a user typed travels as JSON or
as one element of an argument list, never as shell text; no value here is a secret.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from launcher import __version__
from launcher.errors import BugError
from launcher.labels import (
    FINGERPRINT_NOTE,
    KUEUE_PRIORITY_LABEL,
    POOL_LABEL,
    QUEUE_LABEL,
    ROLE_LABEL,
    RUN_LABEL,
    STORAGE_NOTE,
)
from launcher.layout import Layout, lay_out, trial_drivers
from launcher.pools import Pool
from launcher.runs import driver_command
from launcher.site import Offer, Site, Toleration, quantity
from launcher.spec import Spec

CONFIG_PATH = "/etc/raylaunch"
CACHE_PATH = "/cache"
KEEP = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
"""Keeps an autoscaler from moving pods to save a node."""
TTL_SECONDS = 30
"""How long the pods of an ended run stay, for whoever wants to look into one."""
WORKER_GRACE_SECONDS = 60
LOST_NODE_SECONDS = 60
"""A pod on a lost node is replaced after this long: KubeRay gives a run up that has no head for 300 s."""
SUBMITTER_RETRIES = 6
"""With the pauses between them 10 minutes, during which the GPUs are held."""
TRIAL_DRIVER_BYTES = 3 * 2**29
"""What a trial of several workers takes on the head: its driver and five processes of Ray Train, measured 1.4 GB."""


@dataclass(frozen=True)
class Submission:
    """What the objects of one submission of a run are made from.

    `plan` is the content of plan.json, `suffix` tells the submissions of a run apart: what belongs to an old one may
    be on its way out. `spent` is what earlier attempts have cost.
    """

    spec: Spec
    pool: Pool
    plan: dict[str, Any]
    run_uri: str
    suffix: str
    spent: float = 0.0

    @property
    def site(self) -> Site:
        if self.pool.site is None:
            raise BugError("a pool without a cluster has no manifest", where=self.pool.name)
        return self.pool.site

    @cached_property
    def layout(self) -> Layout:
        return lay_out(self.spec, self.site, self.spent)

    @property
    def config_name(self) -> str:
        return f"{self.spec.name}-{self.suffix}"

    def labels(self, role: str = "") -> dict[str, str]:
        """The labels of the run's objects; those of pods have a role."""
        made = {
            "app.kubernetes.io/managed-by": "raylaunch", "app.kubernetes.io/version": __version__,
            RUN_LABEL: self.spec.name or "", POOL_LABEL: self.pool.name,
        }  # fmt: skip
        return made | ({ROLE_LABEL: role} if role else {})

    def config_map(self) -> dict[str, Any]:
        """The ConfigMap: spec.json and plan.json, from which the submitter can make the run directory."""
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": self.config_name, "labels": self.labels()},
            "data": {
                "spec.json": json.dumps(self.spec.model_dump(mode="json"), indent=1),
                "plan.json": json.dumps(self.plan, indent=1),
            },
        }

    def ray_job(self) -> dict[str, Any]:
        """The RayJob, named as the run."""
        site, spec = self.site, self.spec
        labels = self.labels()
        if site.queue:
            labels[QUEUE_LABEL] = site.queue
            if spec.resources.priority:
                labels[KUEUE_PRIORITY_LABEL] = spec.resources.priority
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {
                "name": spec.name,
                "labels": labels,
                "annotations": {STORAGE_NOTE: spec.storage, FINGERPRINT_NOTE: spec.fingerprint()},
            },
            "spec": {
                "submissionMode": "K8sJobMode",
                "jobId": spec.name,
                "entrypoint": driver_command(self.run_uri),
                # Ray takes a typo for a dead node, and so would a retry here: what is tried again, and from where, the
                # submitter and the driver decide.
                "backoffLimit": 0,
                "submitterConfig": {"backoffLimit": SUBMITTER_RETRIES},
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": TTL_SECONDS,
                "preRunningDeadlineSeconds": self.layout.start_seconds,
                "activeDeadlineSeconds": self.layout.max_seconds,
                "submitterPodTemplate": _submitter(self),
                "rayClusterSpec": {
                    "rayVersion": site.ray_version,
                    # Without the mode KubeRay makes a token and nobody asks for it.
                    "authOptions": {"mode": "token"},
                    "enableInTreeAutoscaling": False,
                    "headGroupSpec": _head(self),
                    "workerGroupSpecs": [_workers(self)],
                },
            },
        }


def dry_suffix(plan: dict[str, Any]) -> str:
    """A suffix for objects that are only printed: the same for the same plan."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:8]


def _submitter(order: Submission) -> dict[str, Any]:
    site, layout = order.site, order.layout
    container = _container("ray-job-submitter", site, cpus="500m", memory="512Mi")
    container["command"] = [
        # Kubernetes would fill in `$(NAME)`; in its words `$$` is a plain `$`.
        "python", "-m", "trainers.submitter", order.run_uri.replace("$", "$$"),
        "--config", CONFIG_PATH, "--submission", order.suffix,
        "--idle-seconds", str(layout.idle_seconds), "--start-seconds", str(layout.start_seconds),
    ]  # fmt: skip
    container["volumeMounts"].append({"name": "config", "mountPath": CONFIG_PATH, "readOnly": True})
    pod = _pod(order, container, Offer(node_selector=site.head.node_selector, tolerations=site.head.tolerations))
    pod["restartPolicy"] = "Never"
    pod["volumes"].append({"name": "config", "configMap": {"name": order.config_name}})
    return {"metadata": {"labels": order.labels("submitter")}, "spec": pod}


def _head(order: Submission) -> dict[str, Any]:
    site, drivers = order.site, trial_drivers(order.spec)
    # The driver runs here; workers must not.
    parameters, memory = {"num-cpus": "0", "num-gpus": "0"}, site.head.memory
    if drivers:
        # KubeRay writes the value into a shell command as it is: it needs its quotes, and those within escaped.
        parameters["resources"] = json.dumps(json.dumps({"trial": drivers}))
        memory = f"{(quantity(memory) + drivers * TRIAL_DRIVER_BYTES) / 2**20:.0f}Mi"
    container = _container("ray-head", site, cpus=site.head.cpus, memory=memory)
    container["ports"] = [
        {"name": name, "containerPort": port}
        for name, port in (("gcs-server", 6379), ("dashboard", 8265), ("client", 10001))
    ]
    pod = _pod(order, container, Offer(node_selector=site.head.node_selector, tolerations=site.head.tolerations))
    # A head that comes back in the same pod has forgotten its job; a new pod may find a healthier node.
    pod["restartPolicy"] = "Never"
    return {
        "serviceType": "ClusterIP",
        "rayStartParams": parameters,
        "template": {
            "metadata": {"labels": order.labels("head"), "annotations": KEEP},
            "spec": pod,
        },
    }


def _workers(order: Submission) -> dict[str, Any]:
    site, layout = order.site, order.layout
    memory = f"{layout.memory // 2**20}Mi"
    container = _container("ray-worker", site, cpus=str(layout.cpus), memory=memory)
    if layout.gpus:
        for bound in ("requests", "limits"):
            container["resources"][bound][site.gpu_resource] = str(layout.gpus)
    container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    kind, offer = layout.node_type, layout.offer
    where = Offer(
        node_selector=kind.node_selector | offer.node_selector, tolerations=(*kind.tolerations, *offer.tolerations)
    )
    pod = _pod(order, container, where)
    pod["terminationGracePeriodSeconds"] = WORKER_GRACE_SECONDS
    # Ray's object store and NCCL both want it; it counts against the pod's memory only as far as it is used.
    pod["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{layout.memory // 2**21}Mi"}})
    return {
        "groupName": kind.name[:40].rstrip("-.").replace(".", "-"),
        "replicas": layout.pods,
        "minReplicas": layout.pods,
        "maxReplicas": layout.pods,
        "numOfHosts": 1,
        "rayStartParams": {"num-cpus": str(layout.cpus)} | ({"num-gpus": str(layout.gpus)} if layout.gpus else {}),
        "template": {"metadata": {"labels": order.labels("worker"), "annotations": KEEP}, "spec": pod},
    }


def _container(name: str, site: Site, *, cpus: str, memory: str) -> dict[str, Any]:
    settings = {
        "XDG_CACHE_HOME": CACHE_PATH,
        # A pod that puts more into its volume is evicted.
        "RAYLAUNCH_CACHE_BYTES": str(int(quantity(site.cache_size))),
        # `ray job stop` gives a driver 3 s by default, too few for a last checkpoint.
        "RAY_JOB_STOP_WAIT_TIME_S": str(WORKER_GRACE_SECONDS),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A raylet that outlived its head asks once a second, not every ten, whether the new head knows it: measured, a
        # worker joins a new head 12 s after the old one died, and 57 s without this.
        "RAY_raylet_liveness_self_check_interval_ms": "1000",
        **site.env,
    }
    container: dict[str, Any] = {
        "name": name,
        "image": site.image,
        "env": [{"name": key, "value": value} for key, value in settings.items()],
        # Requests equal limits: the pod is the last to be evicted, and nobody's neighbour is starved.
        "resources": {bound: {"cpu": cpus, "memory": memory} for bound in ("requests", "limits")},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "cache", "mountPath": CACHE_PATH}],
    }
    if site.env_secret:
        container["envFrom"] = [{"secretRef": {"name": site.env_secret}}]
    return container


def _pod(order: Submission, container: dict[str, Any], where: Offer) -> dict[str, Any]:
    site, priority = order.site, order.spec.resources.priority
    lost = [
        {"key": f"node.kubernetes.io/{what}", "operator": "Exists", "effect": "NoExecute",
         "tolerationSeconds": LOST_NODE_SECONDS}
        for what in ("not-ready", "unreachable")
    ]  # fmt: skip
    pod: dict[str, Any] = {
        "serviceAccountName": site.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": site.run_as_user,
            "fsGroup": site.run_as_user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "cache", **_cache_volume(site)}],
        "tolerations": [_toleration(item) for item in where.tolerations] + lost,
    }
    if where.node_selector:
        pod["nodeSelector"] = where.node_selector
    if priority and not site.queue:
        pod["priorityClassName"] = priority
    return pod


def _toleration(item: Toleration) -> dict[str, str]:
    return item.model_dump(exclude_none=True)


def _cache_volume(site: Site) -> dict[str, Any]:
    if site.cache_path:
        return {"hostPath": {"path": site.cache_path, "type": "Directory"}}
    return {"emptyDir": {"sizeLimit": site.cache_size}}
