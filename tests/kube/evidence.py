"""An emulated cluster in words: what the message of a failed test needs, since the cluster is gone when it is read."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tests.kube.cluster import Cluster
from tests.kube.schema import Object

LINES = 15
EVENTS = 20
BULKY = {"rayClusterStatus", "stateTransitionTimes", "endpoints", "conditions"}


def describe(cluster: Cluster) -> str:
    """RayJobs, RayClusters, Jobs and pods with their states, the ends of the pods' logs, and the last events."""
    return "\n".join([*_objects(cluster), *_pods(cluster), *_events(cluster)])


def _objects(cluster: Cluster) -> Iterator[str]:
    for plural in ("rayjobs", "rayclusters", "jobs"):
        for thing in cluster.list(plural):
            status = thing.get("status") or {}
            short = {name: value for name, value in status.items() if name not in BULKY}
            yield f"{plural} {_place(thing)}: {json.dumps(short)} {_conditions(status)}"


def _pods(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.list("pods"):
        status = pod.get("status") or {}
        yield f"pods {_place(pod)}: {status.get('phase', 'no phase')} {_conditions(status)}"
        for entry in status.get("containerStatuses") or []:
            yield f"  {entry['name']}: {json.dumps(entry['state'])}, {entry['restartCount']} restarts"
        for container in pod["spec"]["containers"]:
            lives = cluster.lives(pod["metadata"]["namespace"], pod["metadata"]["name"], container["name"])
            for number, log in list(enumerate(lives))[-2:]:
                yield f"  the end of the log of {container['name']}, life {number + 1}:"
                yield from (f"    {line}" for _, line in log.lines[-LINES:])


def _events(cluster: Cluster) -> Iterator[str]:
    def moment(event: Object) -> str:
        return str((event.get("series") or {}).get("lastObservedTime") or event["lastTimestamp"] or event["eventTime"])

    for event in sorted(cluster.list("events"), key=moment)[-EVENTS:]:
        about = event["involvedObject"]
        yield f"event {moment(event)} {about['kind']} {about['name']}: {event['reason']}: {event['message']}"


def _place(thing: Object) -> str:
    metadata = thing["metadata"]
    going = " (being deleted)" if "deletionTimestamp" in metadata else ""
    return f"{metadata['namespace']}/{metadata['name']}{going}"


def _conditions(status: Object) -> str:
    entries = status.get("conditions") or []
    return " ".join(f"{entry['type']}={entry['status']} {entry.get('reason') or ''}".strip() for entry in entries)
