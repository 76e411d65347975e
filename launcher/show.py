"""How things look on a terminal: the plan, tables of runs, and a run as it goes. Reads runs; changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from launcher.backends import Backend
from launcher.journal import Lines
from launcher.plan import Plan
from launcher.runs import Run, State, Status

COLORS = {
    Status.SUCCEEDED: "green", Status.FAILED: "red", Status.CANCELLED: "yellow", Status.INTERRUPTED: "yellow",
    Status.RUNNING: "cyan", Status.RECOVERING: "magenta",
}  # fmt: skip


def seconds(value: float) -> str:
    """A duration: `9.5 s`, `3m 05s`, `2h 07m`."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def size(value: float) -> str:
    """A number of bytes: `1.4 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def plan_table(plan: Plan, uri: str, console: Console, *, every: bool) -> None:
    """Says what will be done; with `every` field, and why each has its value."""
    facts, spec = plan.facts, plan.spec
    rows = [("run", f"{spec.name}  ({uri})"), ("data", spec.data.uri)]
    if facts:
        held = ", ".join(f"{facts[split]:,} {split}" for split in ("train", "val", "test") if facts.get(split))
        rows.append(("", f"{facts['images']:,} images in {facts['classes']} classes: {held}"))
    rows.append(("model", f"{spec.model.name} at {spec.data.image_size} px, weights: {spec.model.pretrained}"))
    steps = f", {plan.steps_per_epoch:,} steps each" if plan.steps_per_epoch else ""
    rows.append(("training", f"{spec.train.epochs} epochs{steps}; batch {spec.train.batch_size}, SGD lr {spec.optim.lr:g},"
                             f" {spec.optim.schedule}, {spec.train.precision}"))  # fmt: skip
    each = spec.resources
    device = f"{each.gpus_per_worker} GPU ({plan.pool.gpu_type})" if each.gpus_per_worker else "no GPU"
    rows.append(("on", f"{plan.pool.name}: {plan.workers} worker{'s' * (plan.workers > 1)}, each {each.cpus_per_worker} CPU"
                       f" cores, {device}"))  # fmt: skip
    grid = Table.grid(padding=(0, 2))
    for name, text in rows:
        grid.add_row(f"[bold]{name}[/]", escape(text))
    console.print(grid)
    for warning in plan.warnings:
        console.print(f"[yellow]note[/]  {escape(warning)}", soft_wrap=True)
    if every:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for heading in ("field", "value", "set by", "why"):
            table.add_column(heading, overflow="fold")
        for choice in plan.choices:
            value = "" if choice.value is None else str(choice.value)
            table.add_row(choice.key, escape(value), choice.source, escape(choice.why))
        console.print(table)


def runs_table(rows: list[tuple[Run, State]], console: Console) -> None:
    """One line for each run, the newest first."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("name", "status", "data", "model", "epoch", "top-1", "began", "took"):
        table.add_column(heading)
    for run, state in rows:
        spec, epochs = run.spec(), run.metrics().get("epochs", [])
        top1 = state.result.get("top1", epochs[-1]["val"]["top1"] if epochs else None)
        table.add_row(
            run.name, f"[{COLORS.get(state.status, 'white')}]{state.status}[/]", escape(spec.data.uri),
            escape(spec.model.name or ""), f"{len(epochs)}/{spec.train.epochs}", "" if top1 is None else f"{top1:.1%}",
            _clock(state.created), seconds((state.ended or time.time()) - state.created),
        )  # fmt: skip
    console.print(table)


def _clock(moment: float) -> str:
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M") if moment else ""


def status_text(run: Run, state: State, console: Console) -> None:
    """Everything about one run that fits on a screen."""
    spec, metrics = run.spec(), run.metrics()
    epochs = spec.train.epochs or 1

    def row(name: str, text: str) -> None:
        console.print(Text.assemble((f"{name:<8}", "bold"), text), soft_wrap=True)

    head = (
        (f"{run.name}  ", "bold"),
        (str(state.status), COLORS.get(state.status, "white")),
        f"  {state.reason}".rstrip(),
    )
    console.print(Text.assemble(*head), soft_wrap=True)
    row("data", spec.data.uri)
    row("model", f"{spec.model.name}, {epochs} epochs, attempt {state.attempt}")
    steps = [event for event in Lines(run.store, "progress.jsonl").events() if event["event"] == "step"]
    if steps and not state.status.final:
        row("now", step_line(steps[-1], epochs))
    for record in metrics.get("epochs", [])[-1:]:
        row("last", epoch_line(record, epochs))
    end(run, state, console)


def step_line(event: dict[str, Any], epochs: int) -> str:
    """A step event as text, without the ETA, which needs the clock."""
    parts = [
        f"epoch {event['epoch']}/{epochs}", f"step {event['at']}/{event['of']}", f"loss {event['loss']:.3f}",
        f"{event['images_per_second']:,.0f} images/s", f"waiting for data {event['data_wait']:.0%}",
        f"memory {size(event['memory'])}",
    ]  # fmt: skip
    if event.get("gpu_memory"):
        parts.append(f"GPU {size(event['gpu_memory'])}")
    return "  ".join(parts)


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """An epoch's record as text."""
    val = record["val"]
    return (
        f"epoch {record['epoch']}/{epochs}  loss {record['train_loss']:.3f}  val top-1 {val['top1']:.1%}"
        f"  macro F1 {val['macro_f1']:.1%}  {seconds(record['seconds'] + record['eval_seconds'])}"
        f"  {record['images_per_second']:,.0f} images/s  waiting for data {record['data_wait']:.0%}"
        + ("  best so far" if record["best"] else "")
    )


def result_line(state: State) -> str:
    """The final figures as text."""
    result = state.result
    return (
        f"top-1 {result['top1']:.1%} on {result['count']:,} held-out images ({result['split']}), "
        f"macro F1 {result['macro_f1']:.1%}, best epoch {result['epoch']}"
    )


def end(run: Run, state: State, console: Console) -> None:
    """What a run's end leaves, or why it failed, and what to type next; nothing for a run that goes on."""

    def row(name: str, text: str) -> None:
        console.print(Text.assemble((f"{name:<8}", "bold"), text), soft_wrap=True)

    if state.error:
        console.print(Text.assemble(("failed  ", "bold red"), state.error["what"]), soft_wrap=True)
        if state.error.get("where"):
            row("at", state.error["where"])
        if state.error.get("hint"):
            row("next", state.error["hint"])
        row("logs", f"launch logs {run.name}")
    elif state.status is Status.SUCCEEDED:
        row("result", result_line(state))
        row("report", f"{run.uri}/report.html")
        row("model", f"{run.uri}/model")
    elif state.status.final:
        row(state.status.lower(), state.reason)
        row("next", f"launch resume {run.name}: goes on from step {max(run.latest_step(), 0):,}")


class Viewer:
    """Shows a run until it is over: one live line on a terminal, plain lines elsewhere."""

    def __init__(self, run: Run, backend: Backend, console: Console) -> None:
        self._run = run
        self._backend = backend
        self._console = console
        self._epochs = run.spec().train.epochs or 1
        self._progress = Lines(run.store, "progress.jsonl")
        self._events = Lines(run.store, "events.jsonl")
        self._last: dict[str, Any] = {}
        self._epoch_seconds = 0.0

    def watch(self, sleep: Callable[[float], None] = time.sleep) -> State:
        """Follows the run to its end and returns its last state. Ctrl-C leaves as `KeyboardInterrupt`; the run goes on."""
        every = 2.0 if self._run.uri.startswith("s3://") else 0.3
        live = Live(console=self._console, transient=True, refresh_per_second=4) if self._console.is_terminal else None
        with ExitStack() as stack:
            if live is not None:
                stack.enter_context(live)
            shown = ""
            while True:
                state = self._backend.status(self._run)
                for event in [*self._events.events(), *self._progress.events()]:
                    self._tell(event)
                if state.status.final:
                    return state
                line = self._now(state)
                if live is not None:
                    live.update(Text(line, no_wrap=True, overflow="ellipsis"))
                elif state.status is not Status.RUNNING and line != shown:
                    self._console.print(line, soft_wrap=True, markup=False, highlight=False)
                    shown = line
                sleep(every)

    def _now(self, state: State) -> str:
        if state.status is Status.RUNNING and self._last.get("event") == "step":
            return f"{step_line(self._last, self._epochs)}  ETA {self._eta()}"
        if state.status is Status.RUNNING and self._last.get("event") == "evaluating":
            return f"evaluating on {self._last['split']}"
        return f"{state.status.lower()}" + (f": {state.reason}" if state.reason else "")

    def _eta(self) -> str:
        event = self._last
        rate, left = event["images_per_second"], event["of"] - event["at"]
        batch = event["batch"]
        now = left * batch / rate if rate else 0.0
        later = self._epochs - event["epoch"]
        each = self._epoch_seconds or (event["of"] * batch / rate if rate else 0.0)
        return seconds(now + later * each)

    def _tell(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in ("step", "evaluating", "start"):
            self._last = event
        if kind == "start":
            self._epochs = event["epochs"]
            where = f"from step {event['step']:,}" if event["step"] else "from the beginning"
            self._print(f"training on {event['device']} with {event['workers']} worker(s), {where}")
        elif kind == "epoch":
            self._epoch_seconds = event["seconds"] + event["eval_seconds"]
            self._print(epoch_line(event, self._epochs))
        elif kind == "retry":
            self._print(f"recovering: {event['error']['what']}; going on from step {max(event['step'], 0):,}")
        elif kind == "attempt" and event["number"] > 1:
            self._print(f"attempt {event['number']}, from step {event['from_step']:,}")

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)
