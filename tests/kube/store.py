"""The objects of the emulated API server and the history of their changes. Knows nothing of HTTP.

Stored objects are never changed in place; a change replaces them and appends to the history that watches read.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tests.kube.errors import ApiError, invalid, not_found
from tests.kube.resources import Resource
from tests.kube.rules import forbidden_change, random_suffix
from tests.kube.schema import Object, duplicate


@dataclass(frozen=True)
class Key:
    """Where an object is kept."""

    group: str
    plural: str
    namespace: str | None
    name: str


@dataclass(frozen=True)
class Change:
    """One line of history: what an object became, and what it was."""

    version: int
    kind: str
    key: Key
    thing: Object
    before: Object | None


def timestamp(moment: datetime | None = None, *, after: float = 0.0) -> str:
    """A time as `metav1.Time` writes it: whole seconds."""
    return ((moment or datetime.now(UTC)) + timedelta(seconds=after)).strftime("%Y-%m-%dT%H:%M:%SZ")


def micro_timestamp() -> str:
    """Now, as `metav1.MicroTime` writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def key_of(resource: Resource, namespace: str | None, name: str) -> Key:
    """The key of an object of a kind; the namespace of a cluster-wide kind is nothing."""
    return Key(*resource.storage, namespace if resource.namespaced else None, name)


class Store:
    """Objects with uid, resourceVersion, generation and finalizers, and their history."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.version = 1000
        self.oldest = 1000
        self.history: list[Change] = []
        self._objects: dict[Key, Object] = {}

    def read(self, key: Key) -> Object | None:
        """The stored object itself: copy before changing it."""
        with self.changed:
            return self._objects.get(key)

    def select(self, resource: Resource, namespace: str | None = None) -> list[tuple[Key, Object]]:
        """All objects of a kind, in a namespace or everywhere, by namespace and name."""
        with self.changed:
            found = [
                (key, thing)
                for key, thing in self._objects.items()
                if (key.group, key.plural) == resource.storage and namespace in (None, key.namespace)
            ]
        return sorted(found, key=lambda pair: (pair[0].namespace or "", pair[0].name))

    def everything(self) -> list[tuple[Key, Object]]:
        """All objects of all kinds."""
        with self.changed:
            return list(self._objects.items())

    def insert(self, resource: Resource, key: Key, thing: Object, *, dry: bool = False) -> Object:
        """Adds a new object and returns it as stored; the first of two with one name wins."""
        with self.changed:
            if key in self._objects:
                details = {"name": key.name, "group": resource.group, "kind": resource.plural}
                message = f'{resource.full_name} "{key.name}" already exists'
                raise ApiError(409, message, reason="AlreadyExists", details=details)
            metadata = {
                name: value for name, value in thing["metadata"].items() if name not in ("resourceVersion", "selfLink")
            }
            metadata |= {"name": key.name, "uid": str(uuid.uuid4()), "creationTimestamp": timestamp()}
            if key.namespace:
                metadata["namespace"] = key.namespace
            if resource.has_status:
                metadata["generation"] = 1
            stored = duplicate({**thing, "metadata": metadata})
            return stored if dry else self._keep("ADDED", key, stored)

    def update(
        self, resource: Resource, key: Key, change: Callable[[Object], Object], *, part: str = "all", dry: bool = False
    ) -> Object:
        """Replaces an object by what `change` makes of a copy; `part`: `all`, `status`, or `main` (all but status)."""
        with self.changed:
            old = self._objects.get(key)
            if old is None:
                raise not_found(resource.full_name, key.name)
            new = change(duplicate(old))
            if part == "status":
                new = {**old, "status": new.get("status", {})}
            elif part == "main" and resource.has_status:
                new = {name: value for name, value in new.items() if name != "status"}
                new |= {"status": old["status"]} if "status" in old else {}
            new = duplicate({**new, "metadata": _kept_metadata(old, new)})
            if causes := forbidden_change(resource, old, new):
                raise invalid(resource.kind, resource.group, key.name, causes)
            if new == old or dry:
                return new
            if resource.has_status and _specification(new) != _specification(old):
                new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
            stored = self._keep("MODIFIED", key, new)
            if _ready_to_go(stored):
                self._drop(key)
            return stored

    def delete(self, resource: Resource, key: Key, *, finalizer: str = "", grace: int | None = None) -> Object | None:
        """Starts a deletion: returns the object while finalizers or a kubelet hold it, None once it is gone."""
        with self.changed:
            old = self._objects.get(key)
            if old is None:
                raise not_found(resource.full_name, key.name)
            wait = _grace_period(resource, old, grace)
            finalizers = list(old["metadata"].get("finalizers") or [])
            if finalizer and finalizer not in finalizers:
                finalizers.append(finalizer)
            if not finalizers and not wait:
                self._drop(key)
                return None
            metadata = {**old["metadata"], **({"finalizers": finalizers} if finalizers else {})}
            if "deletionTimestamp" not in metadata:
                metadata |= {"deletionTimestamp": timestamp(after=wait), "deletionGracePeriodSeconds": wait}
            new = {**old, "metadata": metadata}
            return old if new == old else self._keep("MODIFIED", key, duplicate(new))

    def compact(self) -> None:
        """Forgets the history: a watch from before now gets 410."""
        with self.changed:
            self.oldest = self.version
            self.history.clear()

    def since(self, version: int) -> Iterator[Change]:
        """The changes after a version."""
        with self.changed:
            first = next(
                (index for index, change in enumerate(self.history) if change.version > version), len(self.history)
            )
            return iter(self.history[first:])

    def unused_name(self, prefix: str) -> str:
        """A generated name."""
        return f"{prefix[:58]}{random_suffix()}"

    def _keep(self, kind: str, key: Key, thing: Object) -> Object:
        self.version += 1
        thing["metadata"]["resourceVersion"] = str(self.version)
        before = self._objects.get(key)
        self._objects[key] = thing
        self.history.append(Change(self.version, kind, key, thing, before))
        self.changed.notify_all()
        return thing

    def _drop(self, key: Key) -> None:
        before = self._objects.pop(key)
        self.version += 1
        last = {**before, "metadata": {**before["metadata"], "resourceVersion": str(self.version)}}
        self.history.append(Change(self.version, "DELETED", key, last, before))
        self.changed.notify_all()


def _kept_metadata(old: Object, new: Object) -> Object:
    """What a client may not change stays as it was."""
    fixed = ["uid", "creationTimestamp", "name", "namespace", "resourceVersion", "generation"]
    fixed += ["deletionTimestamp", "deletionGracePeriodSeconds"]
    metadata = {name: value for name, value in (new.get("metadata") or {}).items() if name not in fixed}
    metadata |= {name: old["metadata"][name] for name in fixed if name in old["metadata"]}
    return {
        name: value
        for name, value in metadata.items()
        if value not in ([], {}, None) or name not in ("finalizers", "ownerReferences")
    }


def _specification(thing: Object) -> Object:
    return {name: value for name, value in thing.items() if name not in ("metadata", "status")}


def _ready_to_go(thing: Object) -> bool:
    metadata = thing["metadata"]
    return (
        "deletionTimestamp" in metadata
        and not metadata.get("finalizers")
        and not metadata.get("deletionGracePeriodSeconds")
    )


def _grace_period(resource: Resource, thing: Object, asked: int | None) -> int:
    """Seconds a kubelet may take to end a pod; other kinds, and pods that no kubelet holds, go at once."""
    if resource.plural != "pods" or not thing.get("spec", {}).get("nodeName"):
        return 0
    if thing.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return 0
    return asked if asked is not None else int(thing["spec"].get("terminationGracePeriodSeconds", 30))
