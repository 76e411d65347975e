"""The state of the emulated cluster, as controllers, kubelet and tests reach it: in process, without HTTP.

What is created here is validated like anything else; permissions, faults and the request log belong to the HTTP side.
"""

from __future__ import annotations

import time
import zlib
from collections import defaultdict
from typing import Any

from tests.kube.errors import ApiError
from tests.kube.resources import RESOURCES, crd_manifest, named, stored_form
from tests.kube.rules import Webhook, admit
from tests.kube.schema import Object, duplicate
from tests.kube.selection import labels_match
from tests.kube.store import Store, key_of, micro_timestamp, timestamp

Objects = list[Object]

OPERATOR_NAMESPACE = "kuberay-system"
FINALIZER_OF_POLICY = {"Foreground": "foregroundDeletion", "Orphan": "orphan"}


class ContainerLog:
    """What one life of a container wrote."""

    def __init__(self, store: Store) -> None:
        self.lines: list[tuple[float, str]] = []
        self.closed = False
        self._store = store

    def write(self, text: str) -> None:
        """Appends whole lines, stamped with the present time."""
        with self._store.changed:
            self.lines += [(time.time(), line) for line in text.splitlines()]
            self._store.changed.notify_all()

    def close(self) -> None:
        """The container has ended: whoever follows gets the end of the stream."""
        with self._store.changed:
            self.closed = True
            self._store.changed.notify_all()


Logs = list[ContainerLog]


class Cluster:
    """Objects, logs and addresses of one emulated cluster."""

    def __init__(self) -> None:
        self.store = Store()
        self.kueue_installed = False
        self.stopping = False
        # How a watch from a forgotten version fails: as the answer's status, or as an ERROR event in its stream.
        self.gone_as_status = False
        self.expiries = 0
        # Webhooks may change an object that a client creates, or refuse it.
        self.webhooks: list[Webhook] = []
        # Where a service or a pod really listens: {(namespace, name): {port: address}}.
        self.service_backends: dict[tuple[str, str], dict[int, str]] = {}
        self.pod_ports: dict[tuple[str, str], dict[int, int]] = {}
        self._logs: dict[tuple[str, str], dict[str, Logs]] = defaultdict(dict)
        for namespace in ("default", "kube-system", OPERATOR_NAMESPACE):
            self.add_namespace(namespace)
        for resource in RESOURCES:
            if resource.group == "ray.io":
                self.create("customresourcedefinitions", crd_manifest(resource))
        self.create("deployments", _operator_deployment())

    def get(self, plural: str, namespace: str | None, name: str) -> Object | None:
        """A copy of an object, or None."""
        return duplicate(self.store.read(key_of(named(plural), namespace, name)))

    def list(self, plural: str, namespace: str | None = None, labels: str = "") -> Objects:
        """Copies of the objects of a kind, in one namespace or all, with matching labels."""
        found = self.store.select(named(plural), namespace)
        return [duplicate(thing) for _, thing in found if labels_match(labels, thing["metadata"].get("labels") or {})]

    def create(self, plural: str, thing: Object) -> Object:
        """Creates an object (with its status, if it has one); raises ApiError as a client would see it."""
        resource = named(plural)
        metadata = {**thing.get("metadata", {})}
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = self.store.unused_name(metadata["generateName"])
        namespace = metadata.get("namespace", "default") if resource.namespaced else None
        prepared = duplicate({**stored_form(resource, resource.versions[0], thing), "metadata": metadata})
        prepared, _ = admit(resource, resource.versions[0], prepared, "Strict")
        for webhook in self.webhooks:
            webhook(resource, "CREATE", prepared)
        return duplicate(
            self.store.insert(resource, key_of(resource, namespace, prepared["metadata"]["name"]), prepared)
        )

    def patch(self, plural: str, namespace: str | None, name: str, changes: Object) -> Object:
        """Merges changes into any part of an object."""
        resource = named(plural)
        key = key_of(resource, namespace, name)
        return duplicate(self.store.update(resource, key, lambda thing: merge(thing, changes)))

    def update_status(
        self, plural: str, namespace: str | None, name: str, status: Object, *, replace: bool = False
    ) -> Object:
        """Merges into the status of an object, or replaces it."""
        resource = named(plural)
        key = key_of(resource, namespace, name)

        def change(thing: Object) -> Object:
            return {**thing, "status": status if replace else merge(thing.get("status", {}), status)}

        return duplicate(self.store.update(resource, key, change))

    def delete(
        self, plural: str, namespace: str | None, name: str, *, grace: int | None = None, policy: str = "Background"
    ) -> None:
        """Deletes an object if it is there; finalizers and a pod's kubelet may keep it for a while."""
        resource = named(plural)
        try:
            finalizer = FINALIZER_OF_POLICY.get(policy, "")
            self.store.delete(resource, key_of(resource, namespace, name), finalizer=finalizer, grace=grace)
        except ApiError as error:
            if error.status != 404:
                raise

    def add_namespace(self, name: str) -> None:
        """A namespace with its default service account, unless it is there."""
        if self.get("namespaces", None, name) is None:
            labels = {"kubernetes.io/metadata.name": name}
            self.create("namespaces", {"metadata": {"name": name, "labels": labels}, "status": {"phase": "Active"}})
            self.create("serviceaccounts", {"metadata": {"name": "default", "namespace": name}})

    def event(
        self,
        about: Object,
        reason: str,
        message: str,
        *,
        kind: str = "Normal",
        component: str = "",
        modern: bool = False,
    ) -> None:
        """Records an event; a repetition raises the count. `modern`: as events.k8s.io clients write it."""
        metadata = about["metadata"]
        target = {
            "apiVersion": about["apiVersion"],
            "kind": about["kind"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        }
        target["namespace"] = namespace = metadata.get("namespace", "default")
        digest = zlib.crc32(f"{metadata['uid']} {reason} {message}".encode())
        name = f"{metadata['name'][:200]}.{digest:08x}"
        known = self.get("events", namespace, name)
        if known and modern:
            series = {"count": known.get("series", {}).get("count", 1) + 1, "lastObservedTime": micro_timestamp()}
            self.patch("events", namespace, name, {"series": series})
        elif known:
            self.patch("events", namespace, name, {"count": known["count"] + 1, "lastTimestamp": timestamp()})
        else:
            body: Object = {"metadata": {"name": name, "namespace": namespace}, "involvedObject": target}
            body |= {"reason": reason, "message": message, "type": kind}
            if modern:
                body |= {
                    "eventTime": micro_timestamp(),
                    "reportingComponent": component,
                    "reportingInstance": f"{component}-0",
                }
                body |= {"firstTimestamp": None, "lastTimestamp": None, "source": {}, "action": reason}
            else:
                body |= {"eventTime": None, "firstTimestamp": timestamp(), "lastTimestamp": timestamp(), "count": 1}
                body |= {"source": {"component": component}, "reportingComponent": component, "reportingInstance": ""}
            self.create("events", body)

    def open_log(self, namespace: str, pod: str, container: str) -> ContainerLog:
        """A new life of a container: what the last one wrote becomes `previous`."""
        log = ContainerLog(self.store)
        with self.store.changed:
            self._logs[namespace, pod].setdefault(container, []).append(log)
        return log

    def log(self, namespace: str, pod: str, text: str, container: str | None = None) -> None:
        """Appends lines to the present log of a pod's container, by default its first."""
        if container is None:
            thing = self.get("pods", namespace, pod)
            container = thing["spec"]["containers"][0]["name"] if thing else "main"
        (self.lives(namespace, pod, container) or [self.open_log(namespace, pod, container)])[-1].write(text)

    def lives(self, namespace: str, pod: str, container: str) -> Logs:
        """The logs of a container, oldest life first."""
        return self._logs[namespace, pod].get(container, [])

    def forget_logs(self, namespace: str, pod: str) -> None:
        """The pod is gone, and its logs with it."""
        for logs in self._logs.pop((namespace, pod), {}).values():
            for log in logs:
                log.close()


def merge(base: Any, changes: Any) -> Any:
    """JSON merge patch (RFC 7386): null removes."""
    if not isinstance(changes, dict):
        return duplicate(changes)
    result = dict(base) if isinstance(base, dict) else {}
    for name, value in changes.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge(result.get(name), value)
    return result


def json_patch(thing: Object, operations: list[Object]) -> Object:
    """JSON patch (RFC 6902): add, replace, remove and test."""
    result = duplicate(thing)
    for operation in operations:
        parts = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        holder: Any = result
        for part in parts[:-1]:
            holder = holder[int(part)] if isinstance(holder, list) else holder.get(part, {})
        _apply(holder, parts[-1], operation)
    return result


def _apply(holder: Any, last: str, operation: Object) -> None:
    refused = "the server rejected our request due to an error in our request"
    place: Any = last
    if isinstance(holder, list):
        place = len(holder) if last == "-" else int(last)
    present = place < len(holder) if isinstance(holder, list) else place in holder
    match operation["op"]:
        case "test" if not present or holder[place] != operation.get("value"):
            raise ApiError(422, f"{refused}: testing path {operation['path']} value failed")
        case "remove" | "replace" if not present:
            raise ApiError(422, f"{refused}: unable to find {operation['path']}")
        case "remove":
            del holder[place]
        case "add" if isinstance(holder, list):
            holder.insert(place, operation["value"])
        case "add" | "replace":
            holder[place] = operation["value"]


def owner_reference(owner: Object) -> Object:
    """A controller reference to an object."""
    metadata = owner["metadata"]
    identity = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": metadata["name"],
        "uid": metadata["uid"],
    }
    return identity | {"controller": True, "blockOwnerDeletion": True}


def _operator_deployment() -> Object:
    labels = {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/version": "v1.7.0"}
    patience = {"name": "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS", "value": "1800"}
    container = {"name": "kuberay-operator", "image": "quay.io/kuberay/operator:v1.7.0", "env": [patience]}
    selector = {"app.kubernetes.io/name": "kuberay-operator"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    return {
        "metadata": {"name": "kuberay-operator", "namespace": OPERATOR_NAMESPACE, "labels": labels},
        "spec": {"replicas": 1, "selector": {"matchLabels": selector}, "template": template},
        "status": {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1, "updatedReplicas": 1},
    }
