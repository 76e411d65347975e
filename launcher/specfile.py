"""From a YAML file, flags and `--set` to a Spec, with every mistake told at once.

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
from launcher.spec import Spec, fields


@dataclass
class Draft:
    """Values for spec fields as they were given, and where each came from."""

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, origin: str) -> None:
        """Sets a field by its dotted name; a later call wins. An unknown name becomes a problem."""
        if key in fields():
            self.values[key] = value
            self.origin[key] = origin
        else:
            close = nearest(key, fields()) or nearest(
                key.rpartition(".")[2], (name.rpartition(".")[2] for name in fields())
            )
            self.problems.append(f"{origin}: {key}: no such field" + (f"; {close}" if close else ""))

    def read(self, path: Path) -> None:
        """Takes over every field of a YAML (or JSON) file."""
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Core)
        except FileNotFoundError:
            raise UserError("there is no such file", where=str(path), hint="launch --data URI needs no file") from None
        except IsADirectoryError:
            raise UserError("this is a folder, not a spec", where=str(path), hint=f"launch --data {path}") from None
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
        except UnicodeDecodeError:
            raise UserError("is not UTF-8 text", where=str(path), hint=f"launch --data {path}") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f"{path}:{mark.line + 1}" if mark else str(path)
            raise UserError(f"not valid YAML: {getattr(error, 'problem', error)}", where=line) from None
        if root is not None:
            self._section(root, "", str(path))

    def assign(self, text: str) -> None:
        """Takes over one `--set a.b=c`; c is YAML, so `[a, b]` is a list and `null` hands the choice to the plan."""
        key, equals, value = text.partition("=")
        if not equals:
            self.problems.append(f"--set {text}: write --set section.field=value")
            return
        try:
            node = yaml.compose(value, Loader=_Core)
        except yaml.YAMLError as error:
            self.problems.append(f"--set {text}: {getattr(error, 'problem', error)}")
            return
        self.put(key.strip(), None if node is None else self._plain(node, f"--set {key}"), f"--set {key.strip()}")

    def spec(self) -> Spec:
        """The spec, or one `UserError` that lists everything that is wrong."""
        document: dict[str, Any] = {}
        for key, value in self.values.items():
            section, _, name = key.rpartition(".")
            (document.setdefault(section, {}) if section else document)[name] = value
        try:
            spec = Spec.model_validate_json(json.dumps(document))
        except ValidationError as error:
            self.problems += [self._explain(item) for item in error.errors(include_url=False)]
        if self.problems:
            count = f"{len(self.problems)} mistakes" if len(self.problems) > 1 else "a mistake"
            raise UserError(
                f"{count} in the spec:\n" + "\n".join(f"  {problem}" for problem in self.problems),
                hint="launch schema prints every field",
            )
        return spec

    def _section(self, node: yaml.Node, prefix: str, path: str) -> None:
        where = f"{path}:{node.start_mark.line + 1}"
        if not isinstance(node, yaml.MappingNode):
            self.problems.append(f"{where}: {prefix.rstrip('.') or 'the file'}: should be `key: value` lines")
            return
        seen: set[str] = set()
        sections = {key.partition(".")[0] for key in fields() if "." in key}
        for key_node, value in node.value:
            key = prefix + str(key_node.value)
            line = f"{path}:{key_node.start_mark.line + 1}"
            if key in seen:
                self.problems.append(f"{line}: {key}: stands twice")
            seen.add(key)
            if key in sections:
                self._section(value, f"{key}.", path)
            elif not prefix and key not in fields() and (close := nearest(key, sections)):
                self.problems.append(f"{line}: {key}: no such field; {close}")
            else:
                self.put(key, self._plain(value, line), line)

    def _plain(self, node: yaml.Node, where: str) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, where) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            self.problems.append(f"{where}: a single value is wanted here, not `key: value` lines")
            return None
        return _scalar(node, where, self.problems)

    def _explain(self, item: Any) -> str:
        key = ".".join(str(part) for part in item["loc"] if isinstance(part, str)) or "spec"
        if item["type"] == "missing":
            return f"{key}: is missing; write --data URI" if key.startswith("data") else f"{key}: is missing"
        message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if key == "name":
            message = "should be at most 40 of a-z, 0-9 and -, starting with a letter"
        given = "" if item["type"] == "value_error" else f" (is {json.dumps(item['input'])})"
        origin = self.origin.get(key, "")
        # A flag's origin already names the field it sets.
        return (
            f"{origin}: {key}: {message}{given}"
            if origin and not origin.endswith(key)
            else f"{origin or key}: {message}{given}"
        )


class _Core(yaml.SafeLoader):
    """YAML 1.2 core scalars; aliases refused, since a few lines of them can expand to gigabytes."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the name and type are PyYAML's

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", event.start_mark)
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Core.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _scalar(node: yaml.Node, where: str, problems: list[str]) -> Any:
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text)
    if kind == "float" and "n" not in text.lower():
        return float(text)
    problems.append(f"{where}: {text}: not a value for a spec")
    return None
