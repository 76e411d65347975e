"""The status of a pod as a kubelet writes it: phase, conditions and container states."""

from __future__ import annotations

from typing import Any

from tests.kube.schema import Object
from tests.kube.store import timestamp

RUN_LABEL = "ray.io/originated-from-cr-name"


def role_of(pod: Object) -> str:
    """`head`, `worker` or `submitter`; anything else is `other`."""
    labels = pod["metadata"].get("labels") or {}
    if labels.get("ray.io/node-type") in ("head", "worker"):
        return str(labels["ray.io/node-type"])
    return "submitter" if RUN_LABEL in labels or "job-name" in labels else "other"


def waiting(reason: str, message: str = "") -> Object:
    """A container that does not run yet."""
    return {"waiting": {"reason": reason} | ({"message": message} if message else {})}


def running() -> Object:
    """A container that runs."""
    return {"running": {"startedAt": timestamp()}}


def terminated(exit_code: int, reason: str = "", message: str = "") -> Object:
    """A container that has ended."""
    state = {"exitCode": exit_code, "reason": reason or ("Error" if exit_code else "Completed")}
    state |= {"startedAt": timestamp(), "finishedAt": timestamp()} | ({"message": message} if message else {})
    return {"terminated": state}


def container_status(
    container: Object, state: Object, *, ready: bool = False, restarts: int = 0, last: Object | None = None
) -> Object:
    """One entry of `containerStatuses`."""
    return {
        "name": container["name"],
        "image": container.get("image", ""),
        "imageID": "",
        "containerID": "" if "waiting" in state else "emulated://" + container["name"],
        "ready": ready,
        "started": "running" in state,
        "restartCount": restarts,
        "state": state,
        "lastState": last or {},
    }


def pod_status(pod: Object, phase: str, containers: list[Object], inits: list[Object] | None = None) -> Object:
    """The whole status of a scheduled pod, from the states of its containers."""
    unready = [entry["name"] for entry in containers if not entry["ready"]]
    undone = [entry["name"] for entry in inits or [] if "terminated" not in entry["state"]]
    ready = phase == "Running" and not unready
    status: Object = {"phase": phase, "containerStatuses": containers, "hostIP": "127.0.0.1", "qosClass": "Burstable"}
    if inits:
        status["initContainerStatuses"] = inits
    if not undone:
        status |= {"podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}
    why: dict[str, Any] = {}
    if phase == "Succeeded":
        why = {"reason": "PodCompleted"}
    elif unready:
        why = {"reason": "ContainersNotReady", "message": f"containers with unready status: [{' '.join(unready)}]"}
    early = {
        "reason": "ContainersNotInitialized",
        "message": f"containers with incomplete status: [{' '.join(undone)}]",
    }
    status["startTime"] = (pod.get("status") or {}).get("startTime") or timestamp()
    status["conditions"] = _keep_times(
        pod,
        [
            {"type": "PodReadyToStartContainers", "status": "True"},
            {"type": "Initialized", "status": "False" if undone else "True", **(early if undone else {})},
            {"type": "Ready", "status": "True" if ready else "False", **({} if ready else why)},
            {"type": "ContainersReady", "status": "True" if ready else "False", **({} if ready else why)},
            {"type": "PodScheduled", "status": "True"},
        ],
    )
    return status


def unschedulable(pod: Object, message: str) -> Object:
    """The status of a pod no node can take."""
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"phase": "Pending", "conditions": _keep_times(pod, [condition]), "qosClass": "Burstable"}


def is_ready(pod: Object) -> bool:
    """Whether a pod runs and is ready."""
    conditions = pod.get("status", {}).get("conditions") or []
    ready = any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)
    return ready and pod["status"].get("phase") == "Running"


def set_condition(conditions: list[Object], **condition: str) -> list[Object]:
    """Conditions with one set or replaced; its transition time moves only when its status does."""
    old = next((entry for entry in conditions if entry["type"] == condition["type"]), None)
    changed = old is None or old["status"] != condition["status"]
    moment = timestamp() if changed or old is None else old["lastTransitionTime"]
    new = {"message": "", **condition, "lastTransitionTime": moment}
    return [entry for entry in conditions if entry["type"] != condition["type"]] + [new]


def condition_true(thing: Object, kind: str) -> bool:
    """Whether a condition of an object's status is True."""
    conditions = thing.get("status", {}).get("conditions") or []
    return any(entry["type"] == kind and entry["status"] == "True" for entry in conditions)


def _keep_times(pod: Object, conditions: list[Object]) -> list[Object]:
    old = {entry["type"]: entry for entry in (pod.get("status") or {}).get("conditions") or []}
    for entry in conditions:
        known = old.get(entry["type"])
        same = known is not None and known["status"] == entry["status"]
        entry |= {
            "lastProbeTime": None,
            "lastTransitionTime": known["lastTransitionTime"] if same and known else timestamp(),
        }
    return conditions
