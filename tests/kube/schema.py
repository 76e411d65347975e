"""Custom resources as the API server treats them: prune unknown fields, fill in defaults, name what is invalid.

Never speaks HTTP and never stores anything. Not covered: CEL rules and list-map uniqueness.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from jsonschema import Draft202012Validator, ValidationError  # type: ignore[import-untyped]

Object = dict[str, Any]
T = TypeVar("T")

CRD_FOLDER = Path(__file__).parents[2].parent / "shared" / "crds"

_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf")
_DROPPED = ("description", "format", "example", "externalDocs", "title", "default")


def duplicate(value: T) -> T:
    """A deep copy of JSON; several times as fast as `copy.deepcopy`."""
    if isinstance(value, dict):
        return cast("T", {key: duplicate(entry) for key, entry in value.items()})
    if isinstance(value, list | tuple):
        return cast("T", [duplicate(entry) for entry in value])
    return value


def crd_path(group: str, plural: str) -> Path | None:
    """The definition of a custom resource, or None on a machine without the definitions."""
    return next(iter(sorted(CRD_FOLDER.glob(f"*/{group}_{plural}.yaml"))), None)


@cache
def load_crd(path: Path) -> Object:
    """One parsed definition; parsing takes half a second, so once per process."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    document: Object = yaml.load(path.read_text(), loader)
    return document


@cache
def validator(group: str, version: str, plural: str) -> Validator | None:
    """The validator of one served version, or None when its definition is not at hand."""
    path = crd_path(group, plural)
    return Validator(path, version) if path else None


class Validator:
    """Judges objects of one version of one custom resource."""

    def __init__(self, path: Path, version: str | None = None) -> None:
        spec = load_crd(path)["spec"]
        versions = {entry["name"]: entry for entry in spec["versions"]}
        chosen = version or next(entry["name"] for entry in spec["versions"] if entry["storage"])
        self.schema: Object = duplicate(versions[chosen]["schema"]["openAPIV3Schema"])
        self.schema["properties"].update(
            apiVersion={"type": "string"},
            kind={"type": "string"},
            metadata={"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        )
        self._validator = Draft202012Validator(_json_schema(self.schema))

    def errors(self, thing: Object) -> list[str]:
        """Everything wrong with an object: unknown fields first, then invalid values."""
        pruned, unknown = self.prune(thing)
        return [f'unknown field "{path}"' for path in unknown] + self.invalid(pruned)

    def prune(self, thing: Object) -> tuple[Object, list[str]]:
        """A copy without the fields the schema does not know and with its defaults, and the paths dropped."""
        unknown: list[str] = []
        pruned: Object = _prune(self.schema, thing, "", unknown)
        return pruned, unknown

    def invalid(self, thing: Object) -> list[str]:
        """The invalid values, in the API server's words."""
        found = sorted(self._validator.iter_errors(thing), key=lambda error: [str(part) for part in error.path])
        return [text for error in found for text in _describe(error)]


def _prune(schema: Object, value: Any, path: str, unknown: list[str]) -> Any:
    if isinstance(value, list):
        items = schema.get("items", {})
        return [_prune(items, entry, f"{path}[{index}]", unknown) for index, entry in enumerate(value)]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties", {})
    free = schema.get("additionalProperties")
    keep_all = schema.get("x-kubernetes-preserve-unknown-fields") or not (
        properties or "additionalProperties" in schema
    )
    result: Object = {}
    for key, entry in value.items():
        where = f"{path}.{key}" if path else key
        if key in properties:
            result[key] = _prune(properties[key], entry, where, unknown)
        elif isinstance(free, dict):
            result[key] = _prune(free, entry, where, unknown)
        elif free or keep_all or schema.get("x-kubernetes-embedded-resource"):
            result[key] = duplicate(entry)
        else:
            unknown.append(where)
    for key, entry in properties.items():
        if "default" in entry and key not in result:
            result[key] = duplicate(entry["default"])
    return result


def _json_schema(schema: Any) -> Any:
    """An OpenAPI v3 structural schema as JSON Schema."""
    if not isinstance(schema, dict):
        return schema
    result = {
        key: entry for key, entry in schema.items() if key not in _DROPPED and not key.startswith("x-kubernetes-")
    }
    if "properties" in result:
        result["properties"] = {name: _json_schema(entry) for name, entry in result["properties"].items()}
    for key in ("items", "additionalProperties", "not"):
        if key in result:
            result[key] = _json_schema(result[key])
    for key in _SCHEMA_LISTS:
        if key in result:
            result[key] = [_json_schema(entry) for entry in result[key]]
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and "type" in result:
        result["type"] = [result["type"], "null"]
    return result


def _describe(error: ValidationError) -> Iterator[str]:
    path = _path(error)
    shown = json.dumps(error.instance)[:200]
    match error.validator:
        case "required":
            missing = [name for name in error.validator_value if name not in error.instance]
            yield from (f"{path}.{name}: Required value" if path else f"{name}: Required value" for name in missing)
        case "type":
            kind = error.validator_value if isinstance(error.validator_value, str) else error.validator_value[0]
            found = json.dumps(_go_type(error.instance))
            yield f"{path}: Invalid value: {found}: {path} in body must be of type {kind}: {found}"
        case "enum":
            allowed = ", ".join(json.dumps(entry) for entry in error.validator_value)
            yield f"{path}: Unsupported value: {shown}: supported values: {allowed}"
        case "minimum" | "maximum":
            bound = f"{'greater' if error.validator == 'minimum' else 'less'} than or equal to {error.validator_value}"
            yield f"{path}: Invalid value: {shown}: {path} in body should be {bound}"
        case "pattern":
            yield f"{path}: Invalid value: {shown}: {path} in body should match '{error.validator_value}'"
        case _:
            yield f"{path}: Invalid value: {shown}: {error.message[:200]}"


def _path(error: ValidationError) -> str:
    text = ""
    for part in error.absolute_path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _go_type(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")
