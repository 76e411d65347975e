"""From a YAML file, flags and `--set` to a Spec, with every mistake told at once; and back to YAML.

YAML is read in its 1.2 core sense (`1e-3` is a number, `no` is a text), without aliases and tags; a key that stands
twice is an error. Nothing here opens anything but the one spec file.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from launcher.errors import UserError, nearest
from launcher.section import complaint
from launcher.space import KINDS, Domain
from launcher.spec import SECTIONS, Spec, fields, unknown
from launcher.sweeping import problems_of

MAPPINGS = ("sweep.space", "sweep.objectives", "sweep.points")
"""Fields whose value is `key: value` lines, or a list of such."""


@dataclass
class Draft:
    """Values for spec fields as they were given, and where each came from. `None` leaves the choice to the plan.

    `lines` says where the parts of a mapping stand, by their dotted names. With `sweep` the spec is that of a sweep,
    even if no field says so.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    lines: dict[str, str] = field(default_factory=dict)
    sweep: bool = False

    def put(self, key: str, value: Any, origin: str) -> None:
        """Sets a field by its dotted name; a later call wins. An unknown name becomes a problem."""
        if key not in fields():
            self.problems.append(f"{_at(origin, key)}: {unknown(key)}")
        elif not _is_unicode(value):
            self.problems.append(f"{_at(origin, key)}: is not UTF-8 text")
        else:
            self.values[key] = _domains(value) if key == "sweep.space" else value
            self.origin[key] = origin
            if value is None:
                del self.origin[key]

    def read(self, path: Path) -> None:
        """Takes over every field of a YAML (or JSON) file."""
        try:
            root = _compose(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise UserError("there is no such file", where=str(path), hint="launch --data URI needs no file") from None
        except IsADirectoryError:
            raise UserError("this is a folder, not a spec", where=str(path), hint=f"launch --data {path}") from None
        except OSError as error:
            raise UserError(f"the file cannot be read: {error.strerror}", where=str(path),
                            hint="check its owner and mode") from None  # fmt: skip
        except UnicodeDecodeError:
            raise UserError("this is not a text in UTF-8", where=str(path), hint="a spec is a YAML file") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f"{path}:{mark.line + 1}" if mark else str(path)
            raise UserError(f"not valid YAML: {_problem(error)}", where=line, hint="mend this line") from None
        if root is not None and root.tag != _NULL:
            self._section(root, "", str(path), set())

    def assign(self, text: str) -> None:
        """Takes over one `--set a.b=c`; c is YAML, so `[a, b]` is a list and `null` hands the choice to the plan."""
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            self.problems.append(f"--set {text}: write --set section.field=value")
            return
        try:
            node = _compose(value)
        except yaml.YAMLError as error:
            self.problems.append(f"--set {key}: not valid YAML: {_problem(error)}")
            return
        self._put_node(key, node, f"--set {key}")

    def spec(self) -> Spec:
        """The spec, or one `UserError` that lists everything that is wrong."""
        document: dict[str, Any] = {"sweep": {}} if self.sweep else {}
        for key, value in self.values.items():
            if value is not None:
                section, _, name = key.rpartition(".")
                (document.setdefault(section, {}) if section else document)[name] = value
        problems, broken = list(self.problems), []
        try:
            spec = Spec.model_validate_json(json.dumps(document))
        except ValidationError as error:
            broken = error.errors(include_url=False)
            problems += [self._explain(item) for item in broken]
        checked = _rest(document, broken) if broken else spec
        lost = {str(item["loc"][2]) for item in broken if item["loc"][:2] == ("sweep", "space") and item["loc"][2:]}
        for place, what in problems_of(checked) if checked else ():
            # That a domain which fell out is not searched would be wrong to say.
            if not lost or not ("is not searched" in what or place == "sweep.space"):
                problems.append(f"{_at(self._origin(place), place)}: {what}")
        if problems:
            count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
            raise UserError(f"{count} in the spec:\n" + "\n".join(f"  {problem}" for problem in problems),
                            hint="launch schema prints every field")  # fmt: skip
        return spec

    def _section(self, node: yaml.Node, prefix: str, path: str, seen: set[str]) -> None:
        if not isinstance(node, yaml.MappingNode):
            name = prefix.rstrip(".") or "the file"
            self.problems.append(f"{path}:{node.start_mark.line + 1}: {name}: should be `key: value` lines")
            return
        for key_node, value in node.value:
            line = f"{path}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{line}: a key should be a name")
                continue
            key = prefix + str(key_node.value)
            if key in seen:
                self.problems.append(f"{line}: {key}: stands twice")
            seen.add(key)
            self.sweep |= key.partition(".")[0] == "sweep"
            if key in SECTIONS:
                # A section of which every line is commented out says nothing, but that there is a sweep.
                if value.tag != _NULL:
                    self._section(value, f"{key}.", path, seen)
            elif not prefix and isinstance(value, yaml.MappingNode):
                close = nearest(key, SECTIONS) or f"the sections are {', '.join(SECTIONS)}"
                self.problems.append(f"{line}: {key}: no such section; {close}")
            else:
                self._put_node(key, value, line, path)

    def _put_node(self, key: str, node: yaml.Node | None, origin: str, path: str = "") -> None:
        self.origin |= {key: origin} if key in MAPPINGS else {}
        try:
            value = None if node is None else self._nested(node, key, path) if key in MAPPINGS else _value(node)
        except ValueError as error:
            self.problems.append(f"{_at(origin, key)}: {error if key in fields() else unknown(key)}")
        else:
            self.put(key, value, origin)

    def _nested(self, node: yaml.Node, place: str, path: str) -> Any:
        """The node as plain data with mappings; what is wrong with one of their values costs only that."""
        if isinstance(node, yaml.SequenceNode):
            return [self._nested(item, f"{place}.{number}", path) for number, item in enumerate(node.value, 1)]
        if not isinstance(node, yaml.MappingNode):
            return _value(node)
        found: dict[str, Any] = {}
        for key_node, value in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            inner = f"{place}.{key}"
            if path:
                self.lines[inner] = f"{path}:{key_node.start_mark.line + 1}"
            try:
                if key in found or key == "?":
                    raise ValueError("stands twice" if key in found else "a key should be a name")
                found[key] = self._nested(value, inner, path)
            except ValueError as error:
                self.problems.append(f"{_at(self._origin(inner), inner)}: {error}")
        return found

    def _origin(self, place: str) -> str:
        """Where a field, or the part of it that has a line of its own, was given."""
        while place and place not in self.lines and place not in self.origin:
            place = place.rpartition(".")[0]
        return self.lines.get(place) or self.origin.get(place, "")

    def _explain(self, item: Any) -> str:
        points = item["loc"][:2] == ("sweep", "points")
        parts = [part for part in item["loc"] if isinstance(part, str) or points]
        key = ".".join(str(part) if isinstance(part, str) else str(part + 1) for part in parts)
        if key in ("data", "data.uri") and item["type"] == "missing":
            return "data.uri: is missing; write --data URI"
        message = complaint(item)
        if not key:  # a rule that ties several sections together names its field itself
            return message
        if item["type"] == "extra_forbidden":
            message = f"no such key; {nearest(parts[-1], Domain.model_fields) or 'it has ' + ', '.join(KINDS)}"
        elif "quniform" in parts and item["type"] in ("missing", "too_long"):
            message = "should be [least, most, step]"
        elif item["type"] != "value_error":
            given = json.dumps(item["input"], ensure_ascii=False)
            message += f" (is {given if len(given) <= 60 else given[:57] + '...'})"
        return f"{_at(self._origin(key), key)}: {message}"


def _rest(document: dict[str, Any], broken: list[Any]) -> Spec | None:
    """The spec without its broken fields and domains, so that the others can be judged; None where that is no use."""
    rest = json.loads(json.dumps(document))
    for item in broken:
        section, *inner = item["loc"] or ("",)
        if not inner or inner[0] in ("search", "scheduler") or (item["type"] == "value_error" and len(inner) < 2):
            return None
        holder = rest.get(section, {})
        if inner[0] in ("space", "objectives") and inner[1:]:
            holder, inner = holder[inner[0]], inner[1:]
        holder.pop(inner[0], None)
    rest["data"] = {"uri": "unknown"} | rest.get("data", {})
    try:
        return Spec.model_validate_json(json.dumps(rest))
    except ValidationError:
        return None


def _domains(value: Any) -> Any:
    """A search space in which a plain list is a choice."""
    if not isinstance(value, dict):
        return value
    return {key: {"choice": domain} if isinstance(domain, list) else domain for key, domain in value.items()}


def dump(spec: Spec) -> str:
    """The spec as YAML that `Draft.read` takes back, and that older readers understand alike."""
    return yaml.dump(spec.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _at(origin: str, key: str) -> str:
    """Place and field; the place alone where it names the field already."""
    named = origin.rpartition(" ")[2].removeprefix("--") == key
    return origin if named else ": ".join(part for part in (origin, key) if part)


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _value(node: yaml.Node) -> Any:
    """The node as plain data; `ValueError` says why it is no value of a spec."""
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        raise ValueError("a single value is wanted here, not `key: value` lines")
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind in ("int", "float") and ("n" in text.lower() or len(text) > 100):
        raise ValueError(f"{text[:20]} is not a number for a spec")
    return {"int": int, "float": float}.get(kind, str)(text)


def _compose(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Core)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).partition("\n")[0]


_NULL = "tag:yaml.org,2002:null"
_CORE = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
)


class _Core(yaml.SafeLoader):
    """YAML 1.2 core scalars; aliases refused, since a few lines of them can expand to gigabytes, and tags too."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the name and type are PyYAML's

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        alias = self.check_event(yaml.AliasEvent)
        if alias or getattr(event, "tag", None) is not None:
            problem = "aliases (*name) are not allowed" if alias else "tags (!name) are not allowed"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either YAML 1.1 or our reader would take for something else; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes some line ends of Unicode bare, and reads them back as a space.
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
for _tag, _pattern, _first in _CORE:
    for _side in (_Core, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
