"""Writes a run's report.html: one page that needs no network, no script and no other file.

    render(run)   the page as text
    write(run)    renders, stores it in the run directory, returns where

The page of a sweep is that of `sweep_page`; that of a trial tells which sweep it belongs to. It reads the run directory
(of a trial, that of its sweep too) and nothing else, in whatever state the run is; files that are missing or damaged
leave out their section. Labels, keys and settings are other people's text: the template escapes all of it. This module
computes no metric and never imports torch, ray or timm.
"""

from __future__ import annotations

import math
import re
import shlex
from typing import Any

import numpy as np

from launcher.errors import LaunchError
from launcher.runs import Run, State, Status
from launcher.sweeps import Ledger, Trial, command_of, spec_of
from trainers import sweep_page
from trainers.curves import curves, finite
from trainers.data.counts import FIELDS
from trainers.page import ROWS, Files, Json, rows_of, table_of, template, wilson

MATRIX_CLASSES = 40
"""Up to this many classes the whole confusion matrix is shown, beyond it only the most confused pairs."""
MISTAKES = 24

_THUMBNAIL = re.compile(r"data:image/(jpeg|png);base64,[A-Za-z0-9+/=]+")


def write(run: Run, state: State | None = None) -> str:
    """Renders the report, stores it as report.html in the run directory, and returns its URI."""
    run.store.write("report.html", render(run, state).encode())
    return f"{run.uri}/report.html"


def render(run: Run, state: State | None = None) -> str:
    """The whole page, for the run's recorded state or the one that is about to be recorded.

    Raises only if there is no such run or its storage cannot be reached.
    """
    if sweep_page.is_sweep(run):
        return sweep_page.render(run, state)
    files, trial = Files(run), _trial_of(run)
    plan, metrics = files.read("plan.json"), files.read("metrics.json")
    state = state or (trial.state() if trial else files.state())
    final, epochs = table_of(metrics, "final"), rows_of(metrics, "epochs")
    settings = _trial_settings(run, trial, files) if trial else files.settings(rows_of(plan, "choices"))
    facts = table_of(plan, "facts") or table_of(Files(run.home).read("plan.json"), "facts")
    values = {str(choice.get("key")): choice.get("value") for choice in settings}
    page = {
        "run": run,
        "title": f"{run.home.name}, trial {trial.number}" if trial else run.name,
        "trial": trial,
        "mark": trial.outcome if trial else state.status,
        "state": state,
        "plan": plan,
        "facts": facts,
        "metrics": metrics,
        "final": final,
        "epochs": epochs[-ROWS:],
        "settings": settings,
        "values": values,
        "headline": files.guard("metrics.json", _headline, final, epochs, facts),
        "commands": _trial_commands(run, trial) if trial else _commands(run.name, state, values.get("train.epochs")),
        "logs": f"launch logs {run.home.name}" + (f" --trial {trial.number}" if trial else ""),
        "curves": files.guard("metrics.json", curves, epochs),
        "confusion": files.guard("metrics.json", _confusion, final),
        "classes": files.guard("metrics.json", _classes, final),
        "mistakes": [_mistake(row) for row in rows_of({"all": files.read("mistakes.json", [])}, "all")[:MISTAKES]],
        "bad": rows_of(files.read("data_report.json"), "bad"),
        "timing": files.guard("metrics.json", _timing, metrics, epochs),
        "reading": files.guard("metrics.json", _reading, epochs),
        "attempts": files.attempts(),
        "notes": files.notes,
        "rows": ROWS,
    }
    return template("report.html.j2").render(page)


def _trial_of(run: Run) -> Trial | None:
    """The trial whose run directory this is, as its sweep knows it; None for other runs."""
    try:
        return Ledger.load(run.home).trial(int(run.name)) if run.home is not run else None
    except (LaunchError, ValueError):
        return None


def _trial_settings(run: Run, trial: Trial, files: Files) -> list[Json]:
    """The settings of a trial: those that were searched, then those of the sweep's plan, which all trials share."""
    shared = rows_of(Files(run.home).read("plan.json"), "choices") or files.settings([])
    shared = [row for row in shared if row.get("key") not in trial.settings and "sweep." not in str(row.get("key"))]
    origins = {"default": "what launch uses unasked", "point": "a given point"}
    why = origins.get(trial.origin, "proposed by the search")
    return [{"key": key, "value": value, "why": why} for key, value in trial.settings.items()] + shared


def _trial_commands(run: Run, trial: Trial) -> list[tuple[str, str]]:
    logs = ("Read its logs", f"launch logs {run.home.name} --trial {trial.number}")
    try:
        return [("Train it again by itself", shlex.join(command_of(spec_of(run.home, trial)))), logs]
    except (LaunchError, ValueError):
        return [logs]


def _headline(final: Json, epochs: list[Json], facts: Json) -> Json | None:
    if final:
        split, epoch, top1, count = final.get("split"), final.get("epoch"), final["top1"], final.get("count")
    elif epochs:
        best = max(epochs, key=lambda epoch: finite(table_of(epoch, "val").get("top1"), -1.0))
        split, epoch, top1, count = "val", best.get("epoch"), best["val"]["top1"], facts.get("val")
    else:
        return None
    total = finite(count, 0.0)
    support = [finite(row.get("support"), 0.0) for row in rows_of(final, "per_class")]
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
    for row in rows_of(final, "per_class"):
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
    given = table_of(metrics, "timing")
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


def _reading(epochs: list[Json]) -> list[Json]:
    """What the data engine did in the first epoch and in each later one, on average; nothing where it is not known."""
    known = [table_of(epoch, "data") for epoch in epochs]
    spans = {"first epoch": known[:1], "each later epoch": known[1:]}
    columns = []
    for span, parts in spans.items():
        sums = {key: sum(finite(part.get(key), 0.0) for part in parts) for key in FIELDS}
        if not sums["images"]:
            continue
        decoded, count = sums["decoded"], len(parts)
        columns.append({
            "span": span,
            "images": sums["images"] / count,
            "held": sums["pixels_held"] / sums["images"],
            "decoded": decoded / count,
            "decode_rate": decoded / sums["decode_seconds"] if sums["decode_seconds"] else None,
            "crop_rate": sums["images"] / sums["crop_seconds"] if sums["crop_seconds"] else None,
            "bytes": sums["bytes"] / count,
            "requests": sums["requests"] / count,
            "repeated": sums["repeated"] / count,
        })  # fmt: skip
    return columns
