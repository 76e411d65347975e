"""Writes a run's report.html: one page that needs no network, no script and no other file.

    render(run)   the page as text
    write(run)    renders, stores it in the run directory, returns where

It reads the run directory and nothing else, in whatever state the run is; files that are missing or damaged leave
out their section. Labels, keys and settings are other people's text: the template escapes all of it. This module
computes no metric and never imports torch, ray or timm.
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
import numpy as np
from markupsafe import Markup

from launcher.errors import SiteError
from launcher.runs import Run, State, Status
from trainers.curves import curves, finite

MATRIX_CLASSES = 40
"""Up to this many classes the whole confusion matrix is shown, beyond it only the most confused pairs."""
ROWS = 1000
"""The longest table on the page; a page of ten thousand rows helps nobody and opens slowly."""
MISTAKES = 24

Json = dict[str, Any]
_THUMBNAIL = re.compile(r"data:image/(jpeg|png);base64,[A-Za-z0-9+/=]+")
# Control characters break the page, bidirectional ones make a label read as another, surrogates cannot be stored.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def write(run: Run, state: State | None = None) -> str:
    """Renders the report, stores it as report.html in the run directory, and returns its URI."""
    run.store.write("report.html", render(run, state).encode())
    return f"{run.uri}/report.html"


def render(run: Run, state: State | None = None) -> str:
    """The whole page, for the run's recorded state or the one that is about to be recorded.

    Raises only if there is no such run or its storage cannot be reached.
    """
    files = _Files(run)
    state, plan, metrics = state or files.state(), files.read("plan.json"), files.read("metrics.json")
    final, epochs = _table(metrics, "final"), _rows(metrics, "epochs")
    settings = files.settings(_rows(plan, "choices"))
    facts = _table(plan, "facts")
    values = {str(choice.get("key")): choice.get("value") for choice in settings}
    page = {
        "run": run,
        "state": state,
        "plan": plan,
        "facts": facts,
        "metrics": metrics,
        "final": final,
        "epochs": epochs[-ROWS:],
        "settings": settings,
        "values": values,
        "headline": files.guard("metrics.json", _headline, final, epochs, facts),
        "commands": _commands(run.name, state, values.get("train.epochs")),
        "curves": files.guard("metrics.json", curves, epochs),
        "confusion": files.guard("metrics.json", _confusion, final),
        "classes": files.guard("metrics.json", _classes, final),
        "mistakes": [_mistake(row) for row in _rows({"all": files.read("mistakes.json", [])}, "all")[:MISTAKES]],
        "bad": _rows(files.read("data_report.json"), "bad"),
        "timing": files.guard("metrics.json", _timing, metrics, epochs),
        "attempts": files.attempts(),
        "notes": files.notes,
        "rows": ROWS,
    }
    return _template().render(page)


class _Files:
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
        return self._damaged(key, default)

    def state(self) -> State:
        try:
            return self.run.state()
        except (SiteError, TypeError, ValueError, KeyError, AttributeError):
            return self._damaged("state.json", State(Status.PENDING, reason="its state.json cannot be read"))  # type: ignore[no-any-return]

    def settings(self, choices: list[Json]) -> list[Json]:
        """What was planned; of a run without a plan, its spec."""
        try:
            return choices or [{"key": key, "value": value} for key, value in self.run.spec().flat().items()]
        except (SiteError, ValueError):
            return self._damaged("spec.json", [])  # type: ignore[no-any-return]

    def attempts(self) -> list[Json]:
        keys = sorted(entry.key for entry in self.run.store.list("attempts/") if entry.key.endswith(".json"))
        return [{"number": number, **self.read(key)} for number, key in enumerate(keys[:ROWS], 1)]

    def guard(self, key: str, build: Callable[..., Any], *arguments: Any) -> Any:
        """What `build` makes, or None when the content of the file is not what it should be."""
        try:
            return build(*arguments)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError):
            return self._damaged(key, None)

    def _damaged(self, key: str, default: Any) -> Any:
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


def _headline(final: Json, epochs: list[Json], facts: Json) -> Json | None:
    if final:
        split, epoch, top1, count = final.get("split"), final.get("epoch"), final["top1"], final.get("count")
    elif epochs:
        best = max(epochs, key=lambda epoch: finite(_table(epoch, "val").get("top1"), -1.0))
        split, epoch, top1, count = "val", best.get("epoch"), best["val"]["top1"], facts.get("val")
    else:
        return None
    total = finite(count, 0.0)
    support = [finite(row.get("support"), 0.0) for row in _rows(final, "per_class")]
    known = total > 0 and math.isfinite(top1)
    return {
        "split": {"val": "validation", "test": "test"}.get(str(split), split),
        "epoch": epoch,
        "top1": top1,
        "count": total,
        "correct": round(top1 * total) if known else None,
        "interval": wilson(round(top1 * total), total) if known else None,
        "guess": max(support) / sum(support) if sum(support) else None,
    }


def _commands(name: str, state: State, epochs: Any) -> list[tuple[str, str]]:
    if state.status is Status.SUCCEEDED:
        more = 2 * int(finite(epochs, 10))
        return [
            ("Classify an image", f"launch predict {name} img.jpg"),
            ("Train on", f"launch resume {name} --epochs {more}"),
        ]
    logs = ("Read its logs", f"launch logs {name}")
    if state.status.final:
        return [("Go on from the last checkpoint", f"launch resume {name}"), logs]
    return [("See where it stands", f"launch status {name}"), logs]


def _confusion(final: Json) -> Json | None:
    """The matrix, rows normalised for shading, and the pairs that are confused most often."""
    if not final.get("confusion"):
        return None
    labels = [str(label) for label in final["classes"]]
    matrix = np.array(final["confusion"], dtype=np.int64)
    if matrix.shape != (len(labels), len(labels)) or matrix.min() < 0:
        raise ValueError("the confusion matrix does not fit the classes")
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    wrong = matrix * (1 - np.eye(len(labels), dtype=np.int64))
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][: 10 if len(labels) <= MATRIX_CLASSES else 40]
    places = [(index // len(labels), index % len(labels)) for index in order.tolist()]
    return {
        "labels": labels if len(labels) <= MATRIX_CLASSES else [],
        "matrix": matrix.tolist(),
        "shares": shares.tolist(),
        "totals": matrix.sum(axis=1).tolist(),
        "pairs": [
            {"true": labels[i], "predicted": labels[j], "count": int(matrix[i, j]), "share": float(shares[i, j])}
            for i, j in places
            if wrong[i, j]
        ],
    }


def _classes(final: Json) -> list[Json]:
    """Per-class scores, worst first; a class without held-out images has no score and goes last."""
    rows = []
    for row in _rows(final, "per_class"):
        support, recall = finite(row.get("support"), 0.0), finite(row.get("recall"), math.nan)
        known = support > 0 and math.isfinite(recall)
        rows.append({**row, "known": known, "interval": wilson(round(recall * support), support) if known else None})
    return sorted(rows, key=lambda row: (not row["known"], finite(row.get("f1"), 0.0), -row.get("support", 0)))


def _mistake(row: Json) -> Json:
    thumbnail = row.get("thumbnail")
    safe = isinstance(thumbnail, str) and _THUMBNAIL.fullmatch(thumbnail)
    return {**row, "thumbnail": thumbnail if safe else None}


def _timing(metrics: Json, epochs: list[Json]) -> list[Json]:
    """Where the time went, as parts of the whole."""
    given = _table(metrics, "timing")
    train = finite(given.get("train_seconds"), sum(finite(epoch.get("seconds"), 0.0) for epoch in epochs))
    waited = train * min(max(finite(given.get("data_wait"), 0.0), 0.0), 1.0)
    parts = {
        "training": train - waited,
        "waiting for data": waited,
        "evaluating": finite(given.get("eval_seconds"), sum(finite(e.get("eval_seconds"), 0.0) for e in epochs)),
        "checkpoints": finite(given.get("checkpoint_seconds"), 0.0),
        "starting": finite(given.get("start_seconds"), 0.0),
    }
    total = max(finite(given.get("total_seconds"), 0.0), sum(parts.values()))
    parts["the rest"] = total - sum(parts.values())
    return [
        {"part": part, "seconds": seconds, "share": seconds / total, "colour": colour}
        for colour, (part, seconds) in enumerate(parts.items())
        if seconds > total / 1e4
    ]


def _table(document: Json, key: str) -> Json:
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _rows(document: Json, key: str) -> list[Json]:
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


def _duration(seconds: float) -> str:
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


def _setting(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_setting(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else {"True": "yes", "False": "no"}.get(str(value), str(value))


def _printable(value: Any) -> Any:
    return value if isinstance(value, Markup) else _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value))


@functools.cache
def _template() -> jinja2.Template:
    # A key that an older run did not write prints as nothing; it must not cost the page.
    environment = jinja2.Environment(
        autoescape=True, finalize=_printable, undefined=jinja2.ChainableUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": _shown(lambda value: f"{100 * value:.1f}\N{NO-BREAK SPACE}%"),
        "number": _shown(lambda value: f"{value:.4f}"),
        "rate": _shown(lambda value: f"{value:.3g}"),
        "count": _shown(lambda value: f"{value:,.0f}"),
        "when": _shown(lambda value: f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M} UTC"),
        "duration": _shown(_duration),
        "size": _shown(_size),
        "setting": _setting,
    }
    return environment.from_string(resources.files("trainers").joinpath("report.html.j2").read_text("utf-8"))
