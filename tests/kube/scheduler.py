"""Nodes, and which of them a pod fits: resources, selectors, required node affinity, taints. Says why when none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

from tests.kube.cluster import Cluster
from tests.kube.errors import ApiError
from tests.kube.podstatus import unschedulable
from tests.kube.quantities import GPU, alive, amount, requests
from tests.kube.schema import Object

GPU_TAINT = {"key": GPU, "value": "present", "effect": "NoSchedule"}


@dataclass(frozen=True)
class Node:
    """A machine of the emulated cluster."""

    name: str
    cpu: str = "8"
    memory: str = "32Gi"
    gpus: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    tainted: bool = False

    def manifest(self) -> Object:
        """The Node object."""
        capacity = {"cpu": self.cpu, "memory": self.memory, "pods": "110"} | (
            {GPU: str(self.gpus)} if self.gpus else {}
        )
        labels = {"kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux", **self.labels}
        condition = {
            "type": "Ready",
            "status": "True",
            "reason": "KubeletReady",
            "message": "kubelet is posting ready status",
        }
        return {
            "metadata": {"name": self.name, "labels": labels},
            "spec": {"taints": [GPU_TAINT]} if self.tainted else {},
            "status": {"capacity": capacity, "allocatable": capacity, "conditions": [condition]},
        }


def schedule(cluster: Cluster, pod: Object) -> bool:
    """Binds a pod to a node it fits, or leaves it Pending with the reason in a condition and an event."""
    metadata, taken = pod["metadata"], _taken(cluster)
    reasons: Counter[str] = Counter()
    nodes = cluster.list("nodes")
    for node in nodes:
        found = _obstacles(pod, node, taken.get(node["metadata"]["name"], Counter()))
        if not found:
            cluster.patch(
                "pods", metadata["namespace"], metadata["name"], {"spec": {"nodeName": node["metadata"]["name"]}}
            )
            where = f"{metadata['namespace']}/{metadata['name']} to {node['metadata']['name']}"
            cluster.event(pod, "Scheduled", f"Successfully assigned {where}", component="default-scheduler")
            return True
        reasons.update(found)
    message = _explain(len(nodes), reasons)
    if _present_message(pod) != message:
        cluster.event(pod, "FailedScheduling", message, kind="Warning", component="default-scheduler")
        status = unschedulable(pod, message)
        cluster.update_status("pods", metadata["namespace"], metadata["name"], status, replace=True)
    return False


def _taken(cluster: Cluster) -> dict[str, Counter[str]]:
    taken: dict[str, Counter[str]] = {}
    for pod in cluster.list("pods"):
        if pod["spec"].get("nodeName") and alive(pod):
            taken.setdefault(pod["spec"]["nodeName"], Counter()).update(requests(pod))
    return taken


def _obstacles(pod: Object, node: Object, taken: Counter[str]) -> list[str]:
    """Why a pod cannot go to a node, in the scheduler's words; the first filter that objects is the one reported."""
    spec, labels = pod["spec"], node["metadata"].get("labels") or {}
    if node["spec"].get("unschedulable"):
        return ["node(s) were unschedulable"]
    for taint in node["spec"].get("taints") or []:
        if taint["effect"] != "PreferNoSchedule" and not any(
            _tolerates(one, taint) for one in spec.get("tolerations") or []
        ):
            return [f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"]
    wanted = spec.get("nodeSelector") or {}
    affine = _affine(spec.get("affinity") or {}, labels)
    if any(labels.get(key) != value for key, value in wanted.items()) or not affine:
        return ["node(s) didn't match Pod's node affinity/selector"]
    free = {name: amount(value) - Fraction(taken[name]) for name, value in node["status"]["allocatable"].items()}
    short = [name for name, value in requests(pod).items() if value and value > free.get(name, 0)]
    return [f"Insufficient {name}" for name in short]


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return (toleration.get("key"), toleration.get("value", "")) == (taint["key"], taint.get("value", ""))


def _affine(affinity: Object, labels: dict[str, str]) -> bool:
    required = (affinity.get("nodeAffinity") or {}).get("requiredDuringSchedulingIgnoredDuringExecution")
    if not required:
        return True
    return any(
        all(_expression(entry, labels) for entry in term.get("matchExpressions") or [])
        for term in required["nodeSelectorTerms"]
    )


def _expression(expression: Object, labels: dict[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or []
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case other:
            raise ApiError(422, f"operator {other} is not emulated")


def _explain(count: int, reasons: Counter[str]) -> str:
    if not count:
        return "no nodes available to schedule pods"
    listed = ", ".join(sorted(f"{number} {reason}" for reason, number in reasons.items()))
    lacking = sum(number for reason, number in reasons.items() if reason.startswith("Insufficient"))
    lacking = min(lacking, count)
    helpless = [f"{count - lacking} Preemption is not helpful for scheduling"] if count > lacking else []
    helpless += [f"{lacking} No preemption victims found for incoming pod"] if lacking else []
    head = f"0/{count} nodes are available"
    return f"{head}: {listed}. preemption: {head}: {', '.join(helpless)}."


def _present_message(pod: Object) -> str:
    conditions = pod.get("status", {}).get("conditions") or []
    return next((str(entry.get("message")) for entry in conditions if entry["type"] == "PodScheduled"), "")
