"""What the API server refuses or completes before it stores an object. Knows no storage and no HTTP."""

from __future__ import annotations

import base64
import binascii
import json
import random
import re
from collections.abc import Callable

from tests.kube.errors import ApiError, invalid
from tests.kube.resources import Resource
from tests.kube.schema import Object, validator

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_SUBDOMAIN_TEXT = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start "
    f"and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{_SUBDOMAIN}')"
)
_DNS_1035 = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_DNS_1035_TEXT = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    f"and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation "
    f"is '{_DNS_1035}')"
)
_VALUE = r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?"
_VALUE_TEXT = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    f"'{_VALUE}')"
)
_NAME_PART = r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
_NAME_PART_TEXT = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric "
    f"character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '{_NAME_PART}')"
)
_MEBIBYTE = 1024 * 1024
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"


def random_suffix(length: int = 5) -> str:
    """Random characters as Kubernetes appends them to generated names: no vowels, nothing easily confused."""
    return "".join(random.choices(_ALPHABET, k=length))


def admit(resource: Resource, version: str, thing: Object, field_validation: str) -> tuple[Object, list[str]]:
    """The object as it will be stored, and warnings for the client. Raises what the API server would answer."""
    warnings: list[str] = []
    if resource.custom and (checker := validator(resource.group, version, resource.plural)):
        thing, unknown = checker.prune(thing)
        texts = [f'unknown field "{path}"' for path in unknown]
        if texts and field_validation == "Strict":
            raise _strict_error(resource, version, texts)
        warnings = texts if field_validation != "Ignore" else []
        causes = _metadata_causes(resource, thing) + checker.invalid(thing)
    else:
        thing = _complete(resource, version, thing)
        causes = _metadata_causes(resource, thing) + _size_causes(resource, thing)
    if causes:
        raise invalid(resource.kind, resource.group, thing["metadata"].get("name", ""), causes)
    return thing, warnings


def _strict_error(resource: Resource, version: str, texts: list[str]) -> ApiError:
    handled = f'{resource.kind} in version "{version}" cannot be handled as a {resource.kind}'
    return ApiError(400, f"{handled}: strict decoding error: {', '.join(texts)}")


def _complete(resource: Resource, version: str, thing: Object) -> Object:
    """Defaults and conversions of the built-in kinds a launcher creates."""
    for field in ("data", "stringData") if resource.plural in ("configmaps", "secrets") else ():
        binary = resource.plural == "secrets" and field == "data"
        for key, value in (thing.get(field) or {}).items():
            if not isinstance(value, str):
                place = f"Go struct field {resource.kind}.{field} of type {'[]uint8' if binary else 'string'}"
                text = f"json: cannot unmarshal {_go_kind(value)} into {place}"
                raise _decode_error(resource, version, text)
            if binary and not _is_base64(value):
                raise _decode_error(resource, version, f"illegal base64 data at input byte 0 (key {key})")
    if resource.plural == "secrets":
        clear = thing.pop("stringData", None) or {}
        encoded = {key: base64.b64encode(value.encode()).decode() for key, value in clear.items()}
        if encoded:
            thing["data"] = {**(thing.get("data") or {}), **encoded}
        thing.setdefault("type", "Opaque")
    return thing


def _decode_error(resource: Resource, version: str, text: str) -> ApiError:
    return ApiError(400, f'{resource.kind} in version "{version}" cannot be handled as a {resource.kind}: {text}')


def _is_base64(value: str) -> bool:
    try:
        base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def _go_kind(value: object) -> str:
    return {bool: "bool", int: "number", float: "number", list: "array", dict: "object"}.get(type(value), "null")


def _metadata_causes(resource: Resource, thing: Object) -> list[str]:
    metadata = thing.get("metadata") or {}
    causes = _name_causes(resource, metadata.get("name"))
    for key, value in (metadata.get("labels") or {}).items():
        causes += _key_causes("metadata.labels", key) + _label_value_causes(value)
    annotations = metadata.get("annotations") or {}
    for key in annotations:
        causes += _key_causes("metadata.annotations", key)
    if sum(len(key) + len(str(value)) for key, value in annotations.items()) > 256 * 1024:
        causes.append("metadata.annotations: Too long: may not be more than 262144 bytes")
    for index, owner in enumerate(metadata.get("ownerReferences") or []):
        for field in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(field):
                noun = "version" if field == "apiVersion" else field
                causes.append(f'metadata.ownerReferences[{index}].{field}: Invalid value: "": {noun} must not be empty')
    return causes


def _name_causes(resource: Resource, name: object) -> list[str]:
    if not name:
        return ["metadata.name: Required value: name or generateName is required"]
    longest, pattern, text = 253, _SUBDOMAIN, _SUBDOMAIN_TEXT
    if resource.plural == "services":
        longest, pattern, text = 63, _DNS_1035, _DNS_1035_TEXT
    causes = []
    if not re.fullmatch(pattern, str(name)):
        causes.append(f"metadata.name: Invalid value: {json.dumps(name)}: {text}")
    if len(str(name)) > longest:
        causes.append(f"metadata.name: Invalid value: {json.dumps(name)}: must be no more than {longest} bytes")
    return causes


def _key_causes(field: str, key: str) -> list[str]:
    prefix, _, name = key.rpartition("/")
    shown = f"{field}: Invalid value: {json.dumps(key)}: "
    causes = []
    if prefix and not re.fullmatch(_SUBDOMAIN, prefix):
        causes.append(f"{shown}prefix part {_SUBDOMAIN_TEXT}")
    if not re.fullmatch(_NAME_PART, name):
        causes.append(shown + _NAME_PART_TEXT)
    if len(name) > 63:
        causes.append(f"{shown}name part must be no more than 63 bytes")
    return causes


def _label_value_causes(value: object) -> list[str]:
    shown = f"metadata.labels: Invalid value: {json.dumps(value)}: "
    causes = []
    if len(str(value)) > 63:
        causes.append(f"{shown}must be no more than 63 bytes")
    if not isinstance(value, str) or not re.fullmatch(_VALUE, value):
        causes.append(shown + _VALUE_TEXT)
    return causes


def _size_causes(resource: Resource, thing: Object) -> list[str]:
    if resource.plural not in ("configmaps", "secrets"):
        return []
    size = sum(len(str(value)) for field in ("data", "binaryData") for value in (thing.get(field) or {}).values())
    return ["data: Too long: may not be more than 1048576 bytes"] if size > _MEBIBYTE else []


def forbidden_change(resource: Resource, old: Object, new: Object) -> list[str]:
    """Changes to fields that may not change."""
    if resource.plural in ("configmaps", "secrets") and old.get("immutable"):
        changed = any(old.get(field) != new.get(field) for field in ("data", "binaryData", "immutable"))
        return ["data: Forbidden: field is immutable when `immutable` is set"] if changed else []
    return []


# A mutating or validating webhook: may change the object it is given, or raise an ApiError.
Webhook = Callable[[Resource, str, Object], None]
