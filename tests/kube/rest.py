"""The REST side of the emulated API server: discovery, CRUD, patches, dry runs, access reviews, permissions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from tests.kube import streams
from tests.kube.cluster import FINALIZER_OF_POLICY, Cluster, json_patch, merge
from tests.kube.errors import ApiError, invalid, not_found
from tests.kube.resources import Resource, discovery, find, served_form, served_groups, stored_form
from tests.kube.rules import admit
from tests.kube.schema import Object, duplicate
from tests.kube.selection import check_fields, fields_match, labels_match
from tests.kube.store import Key, key_of
from tests.kube.wire import Exchange

_ADDRESS = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/(?!status$|finalize$)))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<subresource>[^/]+)(?P<rest>/.*)?)?)?"
)
_VERBS = {"GET": "get", "HEAD": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_VERSION = {"major": "1", "minor": "33", "gitVersion": "v1.33.5", "gitTreeState": "clean", "platform": "linux/amd64"}


@dataclass(frozen=True)
class Target:
    """What a request is about."""

    resource: Resource
    version: str
    namespace: str | None
    name: str
    subresource: str
    rest: str
    verb: str

    @property
    def key(self) -> Key:
        """Where the object lies."""
        return key_of(self.resource, self.namespace, self.name)


def verb_of(exchange: Exchange) -> str:
    """The Kubernetes verb of a request, for the request log and for permissions."""
    match = _ADDRESS.fullmatch(exchange.path)
    verb = _VERBS.get(exchange.method, exchange.method.lower())
    if match and not match["name"]:
        if verb == "get":
            return "watch" if exchange.query.get("watch") in ("1", "true") else "list"
        return "deletecollection" if verb == "delete" else verb
    return verb


def serve(cluster: Cluster, exchange: Exchange, access: Access) -> None:
    """Answers one request, or raises the ApiError to answer with."""
    if exchange.path == "/version":
        return exchange.send(_VERSION)
    if exchange.path in ("/healthz", "/readyz", "/livez"):
        return exchange.send(b"ok")
    served = served_groups(cluster.kueue_installed)
    found = discovery(exchange.path, served)
    if found is not None:
        return exchange.send(found)
    target = _target(exchange, served)
    if target.resource.plural == "selfsubjectaccessreviews":
        return exchange.send(access.review(_document(exchange)), 201)
    access.check(target)
    if target.subresource in ("log", "portforward", "proxy"):
        return streams.SUBRESOURCES[target.subresource](cluster, exchange, target)
    if target.verb == "watch":
        check_fields(exchange.query.get("fieldSelector"), target.resource)
        return streams.watch(cluster, exchange, target)
    handler: dict[str, Callable[[Cluster, Exchange, Target], None]] = {
        "get": _get, "list": _list, "create": _create, "update": _update, "patch": _patch,
        "delete": _delete, "deletecollection": _delete_collection,
    }  # fmt: skip
    return handler[target.verb](cluster, exchange, target)


@dataclass
class Access:
    """Who asks, and what they may not do: pairs of verb and resource, such as `("get", "pods/log")`."""

    user: str
    denied: set[tuple[str, str]]

    def check(self, target: Target) -> None:
        """Refuses what is denied, in the words of RBAC."""
        resource = target.resource
        what = resource.plural + (f"/{target.subresource}" if target.subresource else "")
        if (target.verb, what) not in self.denied:
            return
        place = f'in the namespace "{target.namespace}"' if target.namespace else "at the cluster scope"
        named = f'{resource.full_name} "{target.name}"' if target.name else resource.full_name
        who = f'User "{self.user}" cannot {target.verb} resource "{what}" in API group "{resource.group}"'
        message = f"{named} is forbidden: {who} {place}"
        details = {"name": target.name, "group": resource.group, "kind": resource.plural}
        raise ApiError(403, message, details=details)

    def review(self, body: Object) -> Object:
        """A SelfSubjectAccessReview with its status."""
        wanted = body.get("spec", {}).get("resourceAttributes") or {}
        what = wanted.get("resource", "") + (f"/{wanted['subresource']}" if wanted.get("subresource") else "")
        allowed = (wanted.get("verb"), what) not in self.denied
        status = {"allowed": True, "reason": "RBAC: allowed by RoleBinding"} if allowed else {"allowed": False}
        return {**body, "metadata": {"creationTimestamp": None}, "status": status}


def _target(exchange: Exchange, served: dict[tuple[str, str], list[Resource]]) -> Target:
    match = _ADDRESS.fullmatch(exchange.path)
    group, version = (match["group"] or "", match["version"] or "v1") if match else ("", "")
    resource = find(group, version, match["plural"]) if match and (group, version) in served else None
    if (
        match is None
        or resource is None
        or (match["subresource"] and match["subresource"] not in resource.subresources)
    ):
        raise ApiError(404, "the server could not find the requested resource")
    parts = {name: match[name] or "" for name in ("name", "subresource", "rest")}
    return Target(resource, version, match["namespace"], verb=verb_of(exchange), **parts)


def _document(exchange: Exchange) -> Any:
    """The body of a request; JSON, or YAML for an apply patch."""
    try:
        if "apply-patch" in exchange.headers.get("Content-Type", ""):
            return yaml.safe_load(exchange.body)
        return json.loads(exchange.body)
    except ValueError as error:
        raise ApiError(400, f"couldn't get version/kind; json parse error: {error}") from error


def _answer(
    exchange: Exchange, target: Target, thing: Object, status: int = 200, warnings: list[str] | None = None
) -> None:
    headers = {"Warning": ", ".join("299 - " + json.dumps(text) for text in warnings)} if warnings else None
    exchange.send(served_form(target.resource, target.version, thing), status, headers)


def _dry(exchange: Exchange) -> bool:
    value = exchange.query.get("dryRun", "")
    if value not in ("", "All"):
        raise ApiError(
            422,
            f'DryRunOptions.meta.k8s.io "" is invalid: dryRun: Unsupported value: "{value}": supported values: "All"',
        )
    return value == "All"


def _get(cluster: Cluster, exchange: Exchange, target: Target) -> None:
    thing = cluster.store.read(target.key)
    if thing is None:
        raise not_found(target.resource.full_name, target.name)
    _answer(exchange, target, thing)


def _list(cluster: Cluster, exchange: Exchange, target: Target) -> None:
    things, version = _selected(cluster, exchange, target)
    first = int(exchange.query.get("continue") or 0)
    last = (
        first + int(exchange.query.get("limit") or 0)
        if exchange.query.get("limit") not in (None, "", "0")
        else len(things)
    )
    metadata: Object = {"resourceVersion": str(version)}
    if last < len(things):
        metadata |= {"continue": str(last), "remainingItemCount": len(things) - last}
    items = [served_form(target.resource, target.version, thing) for _, thing in things[first:last]]
    kind = {"kind": target.resource.kind + "List", "apiVersion": target.resource.api_version(target.version)}
    exchange.send({**kind, "metadata": metadata, "items": items})


def _selected(cluster: Cluster, exchange: Exchange, target: Target) -> tuple[list[tuple[Key, Object]], int]:
    fields, labels = exchange.query.get("fieldSelector"), exchange.query.get("labelSelector")
    check_fields(fields, target.resource)
    with cluster.store.changed:
        things = [
            (key, thing)
            for key, thing in cluster.store.select(target.resource, target.namespace)
            if labels_match(labels, thing["metadata"].get("labels") or {}) and fields_match(fields, thing)
        ]
        return things, cluster.store.version


def _create(cluster: Cluster, exchange: Exchange, target: Target) -> None:
    thing, warnings = _admitted(cluster, exchange, target, _document(exchange))
    key = key_of(target.resource, target.namespace, thing["metadata"]["name"])
    stored = cluster.store.insert(target.resource, key, thing, dry=_dry(exchange))
    if target.resource.plural == "namespaces" and not _dry(exchange):
        cluster.create("serviceaccounts", {"metadata": {"name": "default", "namespace": key.name}})
    _answer(exchange, target, stored, 201, warnings)


def _admitted(cluster: Cluster, exchange: Exchange, target: Target, body: Any) -> tuple[Object, list[str]]:
    """A new object after all the checks and changes that precede its storage."""
    resource = target.resource
    if not isinstance(body, dict) or body.get("kind", resource.kind) != resource.kind:
        raise ApiError(400, f"the object provided is unrecognized (must be of type {resource.kind})")
    metadata = dict(body.get("metadata") or {})
    if resource.namespaced and metadata.get("namespace", target.namespace) != target.namespace:
        raise ApiError(400, "the namespace of the provided object does not match the namespace sent on the request")
    if resource.namespaced and cluster.get("namespaces", None, target.namespace or "") is None:
        raise not_found("namespaces", target.namespace or "")
    if not metadata.get("name") and metadata.get("generateName"):
        metadata["name"] = cluster.store.unused_name(metadata["generateName"])
    thing = duplicate({**stored_form(resource, target.version, body), "metadata": metadata})
    if resource.has_status:
        thing.pop("status", None)
    thing, warnings = admit(resource, target.version, thing, exchange.query.get("fieldValidation", "Warn"))
    for webhook in cluster.webhooks:
        webhook(resource, "CREATE", thing)
    return thing, warnings


def _update(cluster: Cluster, exchange: Exchange, target: Target) -> None:
    body = _document(exchange)
    metadata = body.get("metadata") or {}
    if metadata.get("name") != target.name:
        raise ApiError(
            400, f"the name of the object ({metadata.get('name')}) does not match the name on the URL ({target.name})"
        )
    if target.resource.custom and not metadata.get("resourceVersion"):
        cause = "metadata.resourceVersion: Invalid value: 0x0: must be specified for an update"
        raise invalid(target.resource.kind, target.resource.group, target.name, [cause])
    _change(cluster, exchange, target, lambda _: stored_form(target.resource, target.version, body), metadata)


def _patch(cluster: Cluster, exchange: Exchange, target: Target) -> None:
    body, kind = _document(exchange), exchange.headers.get("Content-Type", "")
    if "json-patch" in kind:
        return _change(cluster, exchange, target, lambda thing: json_patch(thing, body), {})
    if "apply-patch" in kind:
        if not exchange.query.get("fieldManager"):
            raise ApiError(
                422, 'PatchOptions.meta.k8s.io "" is invalid: fieldManager: Required value: is required for apply patch'
            )
        if cluster.store.read(target.key) is None:
            body["metadata"] = {**(body.get("metadata") or {}), "name": target.name}
            thing, warnings = _admitted(cluster, exchange, target, body)
            stored = cluster.store.insert(target.resource, target.key, thing, dry=_dry(exchange))
            return _answer(exchange, target, stored, 201, warnings)
    elif "merge-patch" not in kind:
        raise ApiError(415, f"the body of the request was in an unknown format - accepted media types include: {kind}")
    changes = {name: value for name, value in body.items() if name not in ("apiVersion", "kind")}
    return _change(cluster, exchange, target, lambda thing: merge(thing, changes), body.get("metadata") or {})


def _change(
    cluster: Cluster, exchange: Exchange, target: Target, change: Callable[[Object], Object], metadata: Object
) -> None:
    """An update or a patch: optimistic locking, validation and the separation of status."""
    resource, warnings = target.resource, list[str]()

    def checked(thing: Object) -> Object:
        expected = metadata.get("resourceVersion")
        if expected not in (None, "", thing["metadata"]["resourceVersion"]):
            wording = "the object has been modified; please apply your changes to the latest version and try again"
            raise _conflict(target, wording)
        if metadata.get("uid") not in (None, "", thing["metadata"]["uid"]):
            raise _conflict(target, _precondition("UID", metadata["uid"], thing["metadata"]["uid"]))
        new, found = admit(resource, target.version, change(thing), exchange.query.get("fieldValidation", "Warn"))
        warnings.extend(found)
        return new

    part = "status" if target.subresource == "status" else "main"
    stored = cluster.store.update(resource, target.key, checked, part=part, dry=_dry(exchange))
    _answer(exchange, target, stored, warnings=warnings)


def _precondition(what: str, wanted: str, found: str) -> str:
    return f"Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {found}"


def _conflict(target: Target, wording: str) -> ApiError:
    details = {"name": target.name, "group": target.resource.group, "kind": target.resource.plural}
    message = f'Operation cannot be fulfilled on {target.resource.full_name} "{target.name}": {wording}'
    return ApiError(409, message, details=details)


def _delete(cluster: Cluster, exchange: Exchange, target: Target) -> None:
    options = _document(exchange) if exchange.body else {}
    thing = cluster.store.read(target.key)
    if thing is None:
        raise not_found(target.resource.full_name, target.name)
    for field, shown in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
        wanted, found = (options.get("preconditions") or {}).get(field), thing["metadata"][field]
        if wanted not in (None, found):
            raise _conflict(target, _precondition(shown, wanted, found))
    left = thing if _dry(exchange) else _remove(cluster, target.resource, target.key, exchange, options)
    if left is not None:
        return _answer(exchange, target, left)
    details = {"name": target.name, "kind": target.resource.plural, "uid": thing["metadata"]["uid"]}
    details |= {"group": target.resource.group} if target.resource.group else {}
    return exchange.send(
        {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
    )


def _remove(cluster: Cluster, resource: Resource, key: Key, exchange: Exchange, options: Object) -> Object | None:
    query = exchange.query
    # A Job deleted without a policy leaves its pods behind, as batch/v1 has always done.
    usual = "Orphan" if resource.full_name == "jobs.batch" else "Background"
    policy = options.get("propagationPolicy") or query.get("propagationPolicy") or usual
    grace = options.get("gracePeriodSeconds", query.get("gracePeriodSeconds"))
    finalizer = FINALIZER_OF_POLICY.get(policy, "")
    return cluster.store.delete(resource, key, finalizer=finalizer, grace=None if grace is None else int(grace))


def _delete_collection(cluster: Cluster, exchange: Exchange, target: Target) -> None:
    options = _document(exchange) if exchange.body else {}
    things, version = _selected(cluster, exchange, target)
    for key, _ in things if not _dry(exchange) else []:
        _remove(cluster, target.resource, key, exchange, options)
    items = [served_form(target.resource, target.version, thing) for _, thing in things]
    kind = {"kind": target.resource.kind + "List", "apiVersion": target.resource.api_version(target.version)}
    exchange.send({**kind, "metadata": {"resourceVersion": str(version)}, "items": items})
