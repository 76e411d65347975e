"""Label and field selectors, with the API server's refusals of fields it does not index."""

from __future__ import annotations

import re

from tests.kube.errors import ApiError
from tests.kube.resources import Resource
from tests.kube.schema import Object

_EVENT_TARGET = ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")
_FIELDS = {
    "pods": {
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.schedulerName",
        "spec.serviceAccountName",
        "spec.hostNetwork",
        "status.phase",
        "status.podIP",
        "status.nominatedNodeName",
    },
    "events": {"reason", "type", "source", "reportingComponent"} | {f"involvedObject.{name}" for name in _EVENT_TARGET},
    "events.events.k8s.io": {"reason", "type", "reportingController"} | {f"regarding.{name}" for name in _EVENT_TARGET},
    "secrets": {"type"},
    "nodes": {"spec.unschedulable"},
    "namespaces": {"status.phase"},
    "jobs.batch": {"status.successful"},
}
_STORED_EVENT_FIELDS = {"regarding": "involvedObject", "reportingController": "reportingComponent"}


def labels_match(selector: str | None, labels: dict[str, str]) -> bool:
    """Whether labels satisfy a selector such as `a=b,c in (d,e),!f`."""
    parts = re.split(r",(?![^(]*\))", selector or "")
    return all(_label_matches(part.strip(), labels) for part in parts if part.strip())


def _label_matches(part: str, labels: dict[str, str]) -> bool:
    listed = re.fullmatch(r"(\S+?)\s+(in|notin)\s+\(([^)]*)\)", part)
    if listed:
        key, operator, values = listed.groups()
        return (labels.get(key) in [value.strip() for value in values.split(",")]) == (operator == "in")
    if "!=" in part:
        key, _, value = part.partition("!=")
        return labels.get(key.strip()) != value.strip()
    if "=" in part:
        key, value = re.split(r"==?", part, maxsplit=1)
        return labels.get(key.strip()) == value.strip()
    if part.startswith("!"):
        return part[1:].strip() not in labels
    return part in labels


def check_fields(selector: str | None, resource: Resource) -> None:
    """Refuses a field selector this kind does not support."""
    allowed = {"metadata.name", "metadata.namespace"} | _FIELDS.get(resource.full_name, set())
    for field, _, _ in _field_terms(selector):
        if field not in allowed:
            asked = f'that match label selector "", field selector "{selector}"'
            raise ApiError(400, f'Unable to find "{resource.full_name}" {asked}: field label not supported: {field}')


def fields_match(selector: str | None, thing: Object) -> bool:
    """Whether an object satisfies a field selector such as `metadata.name=x,status.phase!=Running`."""
    for field, wanted, value in _field_terms(selector):
        current: object = thing
        for part in field.split("."):
            current = current.get(_STORED_EVENT_FIELDS.get(part, part)) if isinstance(current, dict) else None
        if (str(current if current is not None else "") == value) != wanted:
            return False
    return True


def _field_terms(selector: str | None) -> list[tuple[str, bool, str]]:
    terms = []
    for part in (selector or "").split(","):
        if part.strip():
            field, operator, value = re.split(r"(!=|==?)", part.strip(), maxsplit=1)
            terms.append((field.strip(), operator != "!=", value.strip()))
    return terms
