"""The kinds of object the emulated API server knows, and the discovery documents that say so.

Only the kinds a launcher or kubectl may ask for. Holds no objects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tests.kube.schema import Object

VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
KUEUE = "kueue.x-k8s.io"


@dataclass(frozen=True)
class Resource:
    """One kind of object and where it is served."""

    group: str
    kind: str
    plural: str
    namespaced: bool = True
    versions: tuple[str, ...] = ("v1",)
    short: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    custom: bool = False

    @property
    def full_name(self) -> str:
        """The name in messages: `pods`, `rayjobs.ray.io`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def has_status(self) -> bool:
        """Whether status and the rest are written through different addresses."""
        return "status" in self.subresources

    @property
    def storage(self) -> tuple[str, str]:
        """Group and plural under which objects are kept; both event kinds are one store, as in Kubernetes."""
        return ("", "events") if self.plural == "events" else (self.group, self.plural)

    def api_version(self, version: str) -> str:
        """What stands in `apiVersion`."""
        return f"{self.group}/{version}" if self.group else version


def _kueue(kind: str, plural: str, *, namespaced: bool, short: tuple[str, ...] = (), status: bool = True) -> Resource:
    subresources = ("status",) if status else ()
    return Resource(KUEUE, kind, plural, namespaced, ("v1beta2", "v1beta1"), short, subresources, custom=True)


def _rbac(kind: str, plural: str, *, namespaced: bool) -> Resource:
    return Resource("rbac.authorization.k8s.io", kind, plural, namespaced)


RESOURCES = (
    Resource("", "Pod", "pods", short=("po",), subresources=("status", "log", "portforward", "proxy")),
    Resource("", "Event", "events", short=("ev",)),
    Resource("", "Namespace", "namespaces", namespaced=False, short=("ns",)),
    Resource("", "Node", "nodes", namespaced=False, short=("no",), subresources=("status",)),
    Resource("", "ConfigMap", "configmaps", short=("cm",)),
    Resource("", "Secret", "secrets"),
    Resource("", "Service", "services", short=("svc",), subresources=("status", "proxy")),
    Resource("", "ServiceAccount", "serviceaccounts", short=("sa",)),
    Resource("", "ResourceQuota", "resourcequotas", short=("quota",), subresources=("status",)),
    Resource("", "LimitRange", "limitranges", short=("limits",)),
    Resource("", "PersistentVolumeClaim", "persistentvolumeclaims", short=("pvc",), subresources=("status",)),
    Resource("apps", "Deployment", "deployments", short=("deploy",), subresources=("status",)),
    Resource("apps", "DaemonSet", "daemonsets", short=("ds",), subresources=("status",)),
    Resource("batch", "Job", "jobs", subresources=("status",)),
    Resource("events.k8s.io", "Event", "events", short=("ev",)),
    Resource("networking.k8s.io", "NetworkPolicy", "networkpolicies", short=("netpol",)),
    Resource("policy", "PodDisruptionBudget", "poddisruptionbudgets", short=("pdb",), subresources=("status",)),
    Resource("scheduling.k8s.io", "PriorityClass", "priorityclasses", namespaced=False, short=("pc",)),
    Resource("coordination.k8s.io", "Lease", "leases"),
    _rbac("Role", "roles", namespaced=True),
    _rbac("RoleBinding", "rolebindings", namespaced=True),
    _rbac("ClusterRole", "clusterroles", namespaced=False),
    _rbac("ClusterRoleBinding", "clusterrolebindings", namespaced=False),
    Resource("authorization.k8s.io", "SelfSubjectAccessReview", "selfsubjectaccessreviews", namespaced=False),
    Resource("apiextensions.k8s.io", "CustomResourceDefinition", "customresourcedefinitions", False, short=("crd",)),
    Resource("ray.io", "RayJob", "rayjobs", subresources=("status",), custom=True),
    Resource("ray.io", "RayCluster", "rayclusters", subresources=("status",), custom=True),
    _kueue("Workload", "workloads", namespaced=True, short=("wl",)),
    _kueue("LocalQueue", "localqueues", namespaced=True, short=("queue", "queues", "lq")),
    _kueue("ClusterQueue", "clusterqueues", namespaced=False, short=("cq",)),
    _kueue("ResourceFlavor", "resourceflavors", namespaced=False, short=("rf",), status=False),
    _kueue("WorkloadPriorityClass", "workloadpriorityclasses", namespaced=False, status=False),
)  # fmt: skip


def find(group: str, version: str, plural: str) -> Resource | None:
    """The resource behind an address, or None."""
    for resource in RESOURCES:
        if (resource.group, resource.plural) == (group, plural) and version in resource.versions:
            return resource
    return None


def named(plural: str) -> Resource:
    """The resource with a plural name; `events` means the core kind."""
    return next(resource for resource in RESOURCES if resource.plural == plural)


def crd_manifest(resource: Resource) -> Object:
    """A CustomResourceDefinition without its schema: enough to see which kinds and versions are installed."""
    versions = [
        {"name": version, "served": True, "storage": index == 0}
        | ({"subresources": {"status": {}}} if resource.has_status else {})
        for index, version in enumerate(resource.versions)
    ]
    names = {
        "kind": resource.kind,
        "plural": resource.plural,
        "singular": resource.kind.lower(),
        "listKind": resource.kind + "List",
    }
    established = {"type": "Established", "status": "True", "reason": "InitialNamesAccepted"}
    return {
        "metadata": {"name": resource.full_name, "annotations": {"controller-gen.kubebuilder.io/version": "v0.17.3"}},
        "spec": {
            "group": resource.group,
            "names": names,
            "scope": "Namespaced" if resource.namespaced else "Cluster",
            "versions": versions,
        },
        "status": {"conditions": [established], "acceptedNames": names, "storedVersions": [resource.versions[0]]},
    }


def served_groups(kueue: bool) -> dict[tuple[str, str], list[Resource]]:
    """Resources by group and version; Kueue's only where Kueue is installed."""
    served: dict[tuple[str, str], list[Resource]] = {}
    for resource in RESOURCES:
        if resource.group != KUEUE or kueue:
            for version in resource.versions:
                served.setdefault((resource.group, version), []).append(resource)
    return served


def discovery(path: str, served: dict[tuple[str, str], list[Resource]]) -> Any:
    """The answer to a discovery address, or None if it is none."""
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": _group_list(served)}
    if path == "/openapi/v3":
        addresses = ["apis/" + "/".join(pair) if pair[0] else "api/v1" for pair in served]
        return {"paths": {address: {"serverRelativeURL": f"/openapi/v3/{address}?hash=1"} for address in addresses}}
    match = re.fullmatch(r"(/openapi/v3)?/(?:api/(v1)|apis/([^/]+)/([^/]+))", path)
    group, version = (match[3] or "", match[2] or match[4]) if match else ("", "")
    if match is None or (group, version) not in served:
        return None
    resources = served[(group, version)]
    if match[1]:
        return _openapi(group, version, resources)
    entries: list[Object] = []
    for resource in resources:
        common = {"namespaced": resource.namespaced, "kind": resource.kind}
        entries.append(
            common
            | {
                "name": resource.plural,
                "singularName": resource.kind.lower(),
                "verbs": VERBS,
                "shortNames": list(resource.short),
            }
        )
        entries += [
            common | {"name": f"{resource.plural}/{name}", "singularName": "", "verbs": ["get", "patch", "update"]}
            for name in resource.subresources
        ]
    group_version = f"{group}/{version}" if group else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": entries}


def _group_list(served: dict[tuple[str, str], list[Resource]]) -> list[Object]:
    groups: dict[str, list[Object]] = {}
    for group, version in served:
        if group:
            groups.setdefault(group, []).append({"groupVersion": f"{group}/{version}", "version": version})
    return [
        {"name": group, "versions": versions, "preferredVersion": versions[0]} for group, versions in groups.items()
    ]


def _openapi(group: str, version: str, resources: list[Resource]) -> Object:
    """What kubectl needs to see before it dares a server-side dry run."""
    names = ("dryRun", "fieldManager", "fieldValidation", "force")
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in names]
    paths = {
        f"/{resource.plural}/{{name}}": {
            "patch": {
                "parameters": parameters,
                "responses": {},
                "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": resource.kind},
            }
        }
        for resource in resources
    }
    return {
        "openapi": "3.0.0",
        "info": {"title": "emulated", "version": "0"},
        "components": {"schemas": {}},
        "paths": paths,
    }


_EVENT_FIELDS = {
    "regarding": "involvedObject",
    "note": "message",
    "deprecatedSource": "source",
    "deprecatedFirstTimestamp": "firstTimestamp",
    "deprecatedLastTimestamp": "lastTimestamp",
    "deprecatedCount": "count",
    "reportingController": "reportingComponent",
}


def stored_form(resource: Resource, version: str, body: Object) -> Object:
    """An object as it is kept: in the kind's first version, events in the core form."""
    result = dict(body)
    if resource.group == "events.k8s.io":
        result = {_EVENT_FIELDS.get(key, key): value for key, value in result.items()}
        return result | {"apiVersion": "v1", "kind": "Event"}
    return result | {
        "apiVersion": resource.api_version(resource.versions[0] if version else version),
        "kind": resource.kind,
    }


def served_form(resource: Resource, version: str, stored: Object) -> Object:
    """A kept object as this address shows it."""
    result = dict(stored)
    if resource.group == "events.k8s.io":
        back = {old: new for new, old in _EVENT_FIELDS.items()}
        result = {back.get(key, key): value for key, value in result.items()}
    return result | {"apiVersion": resource.api_version(version), "kind": resource.kind}
