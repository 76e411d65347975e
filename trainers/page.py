"""What the pages of runs and sweeps share: reading a run directory that may be damaged, and the templates.

Labels, keys and settings are other people's text: the templates escape all of it. This module never imports torch, ray
or timm.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from launcher.errors import LaunchError, SiteError
from launcher.runs import Run, State, Status

ROWS = 1000
"""The longest table on a page; one of ten thousand rows helps nobody and opens slowly."""

Json = dict[str, Any]
# Control characters break the page, bidirectional ones make a label read as another, surrogates cannot be stored.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Files:
    """Reads the run directory; what cannot be read becomes a note on the page instead of an error."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.notes: list[str] = []

    def read(self, key: str, default: Any = None) -> Any:
        default = {} if default is None else default
        try:
            document = self.run.read_json(key)
        except (SiteError, RecursionError):
            document = ""
        if document is None or isinstance(document, type(default)):
            return default if document is None else document
        return self.damaged(key, default)

    def state(self) -> State:
        try:
            return self.run.state()
        except (SiteError, TypeError, ValueError, KeyError, AttributeError):
            return self.damaged("state.json", State(Status.PENDING, reason="its state.json cannot be read"))  # type: ignore[no-any-return]

    def settings(self, choices: list[Json]) -> list[Json]:
        """What was planned; of a run without a plan, its spec."""
        try:
            return choices or [{"key": key, "value": value} for key, value in self.run.spec().flat().items()]
        except (LaunchError, ValueError):
            return self.damaged("spec.json", [])  # type: ignore[no-any-return]

    def attempts(self) -> list[Json]:
        keys = sorted(entry.key for entry in self.run.store.list("attempts/") if entry.key.endswith(".json"))
        return [{"number": number, **self.read(key)} for number, key in enumerate(keys[:ROWS], 1)]

    def guard(self, key: str, build: Callable[..., Any], *arguments: Any) -> Any:
        """What `build` makes, or None when the content of the file is not what it should be."""
        try:
            return build(*arguments)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError):
            return self.damaged(key, None)

    def damaged(self, key: str, default: Any = None) -> Any:
        """Notes that the file cannot be read; returns `default`."""
        if (note := f"{key} is damaged; what it would show is left out.") not in self.notes:
            self.notes.append(note)
        return default


def wilson(successes: float, total: float) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): right for small counts and for shares near 0 or 1."""
    if not total > 0:
        return 0.0, 1.0
    z2 = 1.959963984540054**2
    share = successes / total
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2))) / (1 + z2 / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def table_of(document: Json, key: str) -> Json:
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def rows_of(document: Json, key: str) -> list[Json]:
    value = document.get(key)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _shown(form: Callable[[float], str]) -> Callable[[Any], str]:
    """A template filter that prints a number with `form`, and what is not a finite number in words."""

    def show(value: Any) -> str:
        if type(value) not in (int, float):
            return "–"
        if isinstance(value, float) and not math.isfinite(value):
            return "not a number" if math.isnan(value) else "infinite"
        try:
            return form(value)
        except (OverflowError, OSError, ValueError):  # no such date, or beyond what a float holds
            return "–"

    return show


def duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _size(count: float) -> str:
    steps = int(min(max(math.log10(max(count, 1)) // 3, 0), 4))
    return f"{count / 1000**steps:.{min(steps, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[steps]}"


def setting(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(setting(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else {"True": "yes", "False": "no"}.get(str(value), str(value))


def printable(value: Any) -> Any:
    return value if isinstance(value, Markup) else _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value))


@functools.cache
def template(name: str) -> jinja2.Template:
    """The template of that file name, with the filters and the escaping of all pages."""
    # A key that an older run did not write prints as nothing; it must not cost the page.
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        finalize=printable,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _shown(lambda value: f"{100 * value:.1f}\N{NO-BREAK SPACE}%"),
        "number": _shown(lambda value: f"{value:.4f}"),
        "rate": _shown(lambda value: f"{value:.3g}"),
        "count": _shown(lambda value: f"{value:,.0f}"),
        "when": _shown(lambda value: f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M} UTC"),
        "duration": _shown(duration),
        "size": _shown(_size),
        "setting": setting,
    }
    return environment.get_template(name)


def _source(name: str) -> str:
    return resources.files("trainers").joinpath(name).read_text("utf-8")
