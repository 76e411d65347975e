"""Reads what a cluster shows of a run, any field of which may be missing, null or of another shape.

It also holds the form in which the readers of pods, queues and schedulers answer (`Why`). It decides nothing, and
does no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from launcher.labels import CLUSTER_LABEL, NODE_TYPE_LABEL, ROLE_LABEL, RUN_LABEL
from launcher.site import quantity

Object = dict[str, Any]
"""An API object, or a part of one, as the API server sends it."""


@dataclass(frozen=True)
class Why:
    """Why something waits: one sentence, what to do, and whether nothing but that helps."""

    reason: str
    hint: str = ""
    hopeless: bool = False


@dataclass(frozen=True)
class Rule:
    """A pattern in a message and what it means; `{0}` is its first group, `{pod}`, `{ns}`, `{name}` are names."""

    pattern: str
    reason: str
    hint: str = ""
    hopeless: bool = False


def first(rules: Iterable[Rule], message: str, **names: str) -> Why | None:
    """What the first rule says whose pattern is in the message."""
    message = " ".join(message.split())
    for rule in rules:
        if found := re.search(rule.pattern, message, re.IGNORECASE):
            groups = [group or "" for group in found.groups()]
            return Why(rule.reason.format(*groups, **names), rule.hint.format(*groups, **names), rule.hopeless)
    return None


def dig(value: Any, *path: str) -> Any:
    """The value at a path of keys, None where it ends early."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def text(value: Any, *path: str) -> str:
    """The string or number at the path as text, else an empty string."""
    found = dig(value, *path)
    return str(found) if isinstance(found, str | int | float) else ""


def number(value: Any, *path: str) -> int:
    """The integer at the path, else 0."""
    found = dig(value, *path)
    return found if isinstance(found, int) else 0


def items(value: Any, *path: str) -> list[Object]:
    """The objects of the list at the path."""
    found = dig(value, *path)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list | tuple) else []


def amount(value: Any) -> float:
    """The number that a Kubernetes quantity means, 0 if it is none."""
    try:
        return quantity(value)
    except ValueError:
        return 0.0


def seconds(value: Any, *path: str) -> float:
    """The time at the path in Unix seconds, 0 if there is none."""
    try:
        moment = datetime.fromisoformat(text(value, *path))
    except ValueError:
        return 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def condition(value: Any, kind: str) -> Object:
    """The condition of that type in an object's status, or an empty one."""
    return next((each for each in items(value, "status", "conditions") if text(each, "type") == kind), {})


def holds(value: Any, kind: str) -> bool:
    """Whether the condition of that type is true."""
    return text(condition(value, kind), "status") == "True"


def span(duration: float) -> str:
    """A duration in the words of a person: 40 s, 12 min, 1.5 hours."""
    if duration < 100:
        return f"{max(0, round(duration))} s"
    if duration < 5400:
        return f"{round(duration / 60)} min"
    hours = f"{duration / 3600:.1f}".removesuffix(".0")
    return f"{hours} hour{'' if hours == '1' else 's'}"


def is_gpu(resource: str) -> bool:
    """Whether the name of a resource is that of GPUs."""
    return resource.rpartition("/")[2] == "gpu"


def spell(resource: str, value: float, how: str = "") -> str:
    """A number of a resource in words: `4 GPUs`, `28 GiB of free memory`."""
    name = resource.removeprefix("requests.").removeprefix("limits.")
    if name in ("memory", "ephemeral-storage", "storage"):
        return f"{value / 2**30:.3g} GiB of {how}{'memory' if name == 'memory' else 'disk'}"
    noun = "GPU" if is_gpu(name) else {"cpu": "CPU core", "pods": "pod"}.get(name, name)
    return f"{value:g} {how}{noun}" + ("" if value == 1 or noun == name else "s")


@dataclass(frozen=True)
class Event:
    """A core/v1 or events.k8s.io/v1 Event."""

    time: float
    warning: bool
    reason: str
    message: str
    source: str
    kind: str
    name: str
    uid: str


def _read(event: Object) -> Event:
    about = "involvedObject" if isinstance(event.get("involvedObject"), dict) else "regarding"
    # An Event that repeats keeps its first time in eventTime and the last one in series or in lastTimestamp.
    stamps = (("series", "lastObservedTime"), ("lastTimestamp",), ("deprecatedLastTimestamp",), ("eventTime",),
              ("firstTimestamp",), ("metadata", "creationTimestamp"))  # fmt: skip
    sources = (("source", "component"), ("reportingComponent",), ("reportingController",))
    return Event(
        time=max(seconds(event, *path) for path in stamps),
        warning=text(event, "type") == "Warning",
        reason=text(event, "reason"),
        message=text(event, "message") or text(event, "note"),
        source=next(filter(None, (text(event, *path) for path in sources)), ""),
        kind=text(event, about, "kind"),
        name=text(event, about, "name"),
        uid=text(event, about, "uid"),
    )


@dataclass(frozen=True)
class View:
    """One run as its cluster shows it: names, pods that are to stay, and events, the newest last."""

    name: str
    namespace: str
    now: float
    job: Object
    cluster: Object
    pods: tuple[Object, ...]
    events: tuple[Event, ...]
    nodes: tuple[Object, ...] | None

    @classmethod
    def of(
        cls,
        job: Object | None,
        cluster: Object | None,
        pods: Iterable[Object],
        events: Iterable[Object],
        nodes: Iterable[Object] | None,
        now: float,
    ) -> View:
        real = tuple(pod for pod in pods if isinstance(pod, dict))
        known = [each for each in (job, cluster, *real) if isinstance(each, dict)]
        names = (text(each, "metadata", "labels", RUN_LABEL) for each in known)
        spaces = (text(each, "metadata", "namespace") for each in known)
        return cls(
            name=next(filter(None, names), "") or text(job, "metadata", "name") or "NAME",
            namespace=next(filter(None, spaces), "default"),
            now=now,
            job=job or {},
            cluster=cluster or {},
            pods=tuple(pod for pod in real if _stays(pod, text(job, "status", "rayClusterName"))),
            events=tuple(
                sorted((_read(each) for each in events if isinstance(each, dict)), key=lambda each: each.time)
            ),
            nodes=None if nodes is None else tuple(node for node in nodes if isinstance(node, dict)),
        )

    def events_of(self, pod: Object) -> list[Event]:
        """Events of this pod, and not of an earlier one with its name."""
        name, uid = text(pod, "metadata", "name"), text(pod, "metadata", "uid")
        mine = [each for each in self.events if each.kind == "Pod" and each.name == name]
        return [each for each in mine if not (uid and each.uid) or each.uid == uid]

    def names(self, pod: Object) -> dict[str, str]:
        """The names that a `Rule` may use."""
        node = text(pod, "spec", "nodeName")
        return {"name": self.name, "ns": self.namespace, "pod": text(pod, "metadata", "name") or "POD",
                "node": f"node {node}" if node else "its node"}  # fmt: skip

    def of_role(self, wanted: str) -> list[Object]:
        """Pods of a role, the newest last."""
        mine = [pod for pod in self.pods if role(pod) == wanted]
        return sorted(mine, key=lambda pod: seconds(pod, "metadata", "creationTimestamp"))

    @property
    def workers(self) -> int:
        """How many worker pods the run asks for."""
        groups = items(self.job, "spec", "rayClusterSpec", "workerGroupSpecs") or items(
            self.cluster, "spec", "workerGroupSpecs"
        )
        asked = sum(number(group, "replicas") * (number(group, "numOfHosts") or 1) for group in groups)
        return asked or number(self.cluster, "status", "desiredWorkerReplicas") or len(self.of_role("worker"))

    @property
    def age(self) -> float:
        """Seconds since the run was handed to the cluster, 0 if that is not known."""
        created = seconds(self.job, "metadata", "creationTimestamp")
        return self.now - created if created else 0.0


def _stays(pod: Object, cluster: str) -> bool:
    """Whether the pod is none that is on its way out: deleted already, or of the RayCluster of an earlier attempt."""
    of = text(pod, "metadata", "labels", CLUSTER_LABEL)
    return not text(pod, "metadata", "deletionTimestamp") and (not of or not cluster or of == cluster)


def role(pod: Object) -> str:
    """head, worker or submitter."""
    labels = dig(pod, "metadata", "labels")
    return text(labels, ROLE_LABEL) or text(labels, NODE_TYPE_LABEL) or "submitter"


def bound(pod: Object) -> bool:
    """Whether the pod has a node."""
    return bool(text(pod, "spec", "nodeName")) or holds(pod, "PodScheduled")
