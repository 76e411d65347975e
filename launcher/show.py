"""How things look on a terminal: the plan, tables of runs, and a run as it goes. Reads runs; changes nothing."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launcher.backends import Backend
from launcher.doctor import Check
from launcher.errors import InfrastructureError, LaunchError, printable
from launcher.journal import Lines
from launcher.plan import CLUSTER_FIELDS, Plan, count
from launcher.runs import Run, State, Status, default_storage
from launcher.storage import open_store
from launcher.sweeps import Ledger

COLORS = {
    Status.SUCCEEDED: "green", Status.FAILED: "red", Status.CANCELLED: "yellow", Status.INTERRUPTED: "yellow",
    Status.RUNNING: "cyan", Status.RECOVERING: "magenta",
}  # fmt: skip


def seconds(value: float) -> str:
    """A duration: `9.5 s`, `3m 05s`, `2h 07m`."""
    if value < 59.95:
        return f"{max(value, 0):.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def size(value: float) -> str:
    """A number of bytes: `1.4 GB`."""
    if value < 1000:
        return f"{value:.0f} B"
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def typed(run: Run) -> str:
    """The run as one types it after a command: with its pool, or its storage unless that is the default one."""
    if run.pool() != "local":
        return f"{run.name} --cluster {run.pool()}"
    usual = open_store(run.storage).uri == open_store(default_storage()).uri
    return run.name if usual else f"{run.name} --storage {shlex.quote(run.storage)}"


def say(console: Console, name: str, text: str, style: str = "bold") -> None:
    """A named line, never broken: what is copied from it is whole."""
    console.print(Text.assemble((f"{name:<10}", style), printable(text)), soft_wrap=True)


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def plan_table(plan: Plan, uri: str, console: Console, *, every: bool) -> None:
    """Says what will be done; with `every` field, and why each has its value."""
    facts, spec, each = plan.facts, plan.spec, plan.spec.resources
    say(console, "run", f"{spec.name}  ({uri})")
    say(console, "data", spec.data.uri)
    if facts:
        held = ", ".join(f"{facts[split]:,} {split}" for split in ("train", "val", "test") if facts.get(split))
        say(console, "", f"{facts['images']:,} images in {facts['classes']} classes: {held}")
    say(console, "model", f"{spec.model.name} at {spec.data.image_size} px, weights: {spec.model.pretrained}")
    steps = f" of {count(plan.steps_per_epoch, 'step')}" if plan.steps_per_epoch else ""
    say(console, "training", f"{count(spec.train.epochs or 0, 'epoch')}{steps}; batch {spec.train.batch_size}, "
                              f"SGD lr {spec.optim.lr:g}, {spec.optim.schedule}, {spec.train.precision}")  # fmt: skip
    gpus = count(each.gpus_per_worker or 0, "GPU") + (f" ({plan.pool.gpu_type})" if each.gpus_per_worker else "")
    share = f"{count(each.cpus_per_worker or 0, 'core')} and {gpus}{' each' * (plan.workers > 1)}"
    say(console, "on", f"{plan.pool.name}: {count(plan.workers, 'worker')} with {share}")
    for warning in plan.warnings:
        say(console, "note", warning, "yellow")
    if every:
        table = _table("field", "value", "set by", "why")
        table.columns[0].no_wrap = True
        for choice in plan.choices:
            if choice.key == "sweep.space" or (plan.pool.site is None and choice.key in CLUSTER_FIELDS):
                continue  # a space has a table of its own
            value = "" if choice.value is None else printable(str(choice.value))
            table.add_row(choice.key, Text(value), choice.source, Text(printable(choice.why)))
        console.print(table)


def layout_lines(plan: Plan, outlook: str, console: Console) -> None:
    """On which pods a run on a cluster will be, what it costs, and when they will be there."""
    layout, site = plan.layout, plan.pool.site
    if layout is None or site is None:
        return
    each = f"{count(layout.gpus, 'GPU')}, {count(layout.cpus, 'core')}, {size(layout.memory)}"
    kind = f"{layout.node_type.name} {'spot' if layout.spot else 'on demand'}"
    say(console, "pods", f"{count(layout.pods, 'worker pod')} with {each} on {kind}, and a head; in {site.namespace}")
    hours = f"{layout.max_seconds / 3600:,.2f}".rstrip("0").rstrip(".")
    price = f"{layout.price_per_hour:,.2f} {layout.currency} an hour, at most {layout.most:,.2f}" if layout.most else ""
    say(console, "cost", f"{price or 'the pool names no price; it runs'} in {hours} h, when it is ended")
    say(console, "capacity", outlook)


def pools_table(rows: list[dict[str, Any]], console: Console) -> None:
    """One line for each kind of node of each pool, and what is wrong with those that cannot be used."""
    table = _table("pool", "nodes", "now", "GPUs free", "price/h", "spot/h", "where")
    troubles = []
    for row in rows:
        if row["trouble"]:
            troubles.append(f"{row['pool']}: {row['trouble']}".removeprefix(": "))
        if "node_type" not in row:
            continue
        gpu = f" ({row['gpu']})" if row["gpu"] else ""
        prices = ("" if row[key] is None else f"{row[key]:.2f}" for key in ("price_per_hour", "spot_price"))
        nodes = "?" if row["nodes"] is None else str(row["nodes"])
        free = "?" if row["free"] is None else str(row["free"])
        cells = (row["pool"], row["node_type"] + gpu, f"{nodes} of {row['max_nodes']}", f"{free} of {row['gpus']}",
                 *prices, row["where"])  # fmt: skip
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console.print(table)
    for trouble in dict.fromkeys(troubles):
        say(console, "note", trouble, "yellow")


def checks(found: list[Check], console: Console) -> None:
    """One line for each check, and under it how to mend what is wrong."""
    for check in found:
        mark, style = {True: ("ok", "green"), False: ("wrong", "bold red"), None: ("note", "yellow")}[check.ok]
        console.print(Text.assemble((f"{mark:<7}", style), (f"{check.name:<16}", "bold"), printable(check.what)),
                      soft_wrap=True)  # fmt: skip
        if check.hint and check.ok is not True:
            console.print(Text.assemble(" " * 7, ("next:           ", "bold"), printable(check.hint)), soft_wrap=True)


def leaks_table(rows: list[dict[str, Any]], console: Console) -> None:
    """What was left behind, and the GPUs it holds."""
    if not rows:
        console.print("nothing is left behind")
        return
    table = _table("kind", "name", "run", "GPUs", "why")
    for row in rows:
        table.add_row(*(Text(printable(str(row[key]))) for key in ("kind", "name", "run", "gpus", "why")))
    console.print(table)


def runs_table(rows: list[tuple[Run, State]], console: Console) -> None:
    """One line for each run, the newest first."""
    table = _table("name", "status", "data", "model", "epoch", "top-1", "began", "took")
    for number in (0, 1, 4, 5, 6, 7):
        table.columns[number].no_wrap = True
    for run, state in rows:
        try:
            spec = run.spec()
            model, epochs, top1 = _sweep_cells(run) if spec.sweep else _run_cells(run)
        except LaunchError as error:
            # One damaged run must not hide the others.
            table.add_row(run.name, Text(state.status), Text(printable(str(error))))
            continue
        top1 = state.result.get("top1", top1)
        ended = state.ended or (None if state.status.final else time.time())
        table.add_row(
            run.name, Text(state.status, COLORS.get(state.status, "")), Text(printable(spec.data.uri)),
            Text(printable(model)), epochs, "" if top1 is None else f"{top1:.1%}", _clock(state.created),
            seconds(ended - state.created) if ended else "",
        )  # fmt: skip
    console.print(table)


def _run_cells(run: Run) -> tuple[str, str, float | None]:
    """Model, epochs and top-1 of a single training."""
    spec, epochs = run.spec(), run.metrics().get("epochs", [])
    return spec.model.name or "", f"{len(epochs)}/{spec.train.epochs}", epochs[-1]["val"]["top1"] if epochs else None


def _sweep_cells(run: Run) -> tuple[str, str, float | None]:
    """Of a sweep: how many trials, none, and the best so far."""
    ledger, search = Ledger.load(run), run.spec().sweep
    over, trials = len(ledger.over()), search.trials if search else 0
    winner = ledger.winner()
    best = winner and winner.best(*next(iter(ledger.objectives.items())))
    return count(trials, "trial") if over >= trials else f"{over}/{trials} trials", "", (best or {}).get("top1")


def _clock(moment: float) -> str:
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M") if moment else ""


def headline(run: Run, state: State, console: Console) -> None:
    """The run's name, where it stands and why, and what to type about that."""
    reason = "" if state.status.final or not state.reason else f"  {printable(state.reason)}"
    head = Text.assemble((f"{run.name}  ", "bold"), (state.status, COLORS.get(state.status, "")), reason)
    console.print(head, soft_wrap=True)
    if state.hint and not state.status.final:
        say(console, "next", state.hint)


def status_text(run: Run, state: State, console: Console) -> None:
    """Everything about one run that fits on a screen."""
    spec, metrics = run.spec(), run.metrics()
    epochs = spec.train.epochs or 1
    headline(run, state, console)
    say(console, "data", spec.data.uri)
    say(console, "model", f"{spec.model.name}, {count(epochs, 'epoch')}, attempt {state.attempt}")
    cost_line(run, console)
    steps = [event for event in Lines(run.store, "progress.jsonl").events() if event["event"] == "step"]
    if steps and not state.status.final:
        say(console, "now", step_line(steps[-1], epochs))
    for record in metrics.get("epochs", [])[-1:]:
        say(console, "last", epoch_line(record, epochs))
    end(run, state, console)


def cost_line(run: Run, console: Console) -> None:
    """What the run has cost; nothing where that is not known."""
    if cost := run.spent():
        say(console, "cost", f"{cost:,.2f} {run.plan()['layout']['currency']} so far")


def step_line(event: dict[str, Any], epochs: int) -> str:
    """A step event as text, without the ETA, which needs the clock."""
    parts = [
        f"epoch {event['epoch']}/{epochs}", f"step {event['at']}/{event['of']}", f"loss {event['loss']:.3f}",
        f"{event['images_per_second']:,.0f} images/s", f"waiting for data {event['data_wait']:.0%}",
        *_reading(event.get("pixels_held"), event.get("s3_bytes")), f"memory {size(event['memory'])}",
    ]  # fmt: skip
    if event.get("gpu_memory"):
        parts.append(f"GPU {size(event['gpu_memory'])}")
    return "  ".join(parts)


def _reading(held: float | None, fetched: float | None) -> list[str]:
    """How much of the data was decoded already, and how much had to come from S3."""
    return [
        *([] if held is None else [f"decoded before {held:.0%}"]),
        *([f"from S3 {size(int(fetched))}"] if fetched else []),
    ]


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


def failure(run: Run, error: dict[str, str], console: Console) -> None:
    """Why a run failed, where, and what to type next."""
    say(console, "failed", error["what"], "bold red")
    for label, key in (("at", "where"), ("next", "hint")):
        if error.get(key):
            say(console, label, error[key])
    say(console, "logs", f"launch logs {typed(run)}")


def end(run: Run, state: State, console: Console) -> None:
    """What a run's end leaves, or why it failed, and what to type next; nothing for a run that goes on."""
    if state.error:
        failure(run, state.error, console)
    elif state.status is Status.SUCCEEDED:
        if state.result:
            say(console, "result", result_line(state))
        say(console, "report", f"{run.uri}/report.html")
        say(console, "model", f"{run.uri}/model")
    elif state.status.final:
        say(console, "stopped", state.reason or f"the run is {state.status.lower()}")
        step = run.latest_step()
        how = f"goes on from step {step:,}" if step > 0 else "starts it again"
        say(console, "next", f"launch resume {typed(run)} {how}")


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
        """Follows the run to its end and returns its last state. Ctrl-C raises as ever; the run goes on."""
        every = 2.0 if self._run.uri.startswith("s3://") else 0.3
        live = Live(console=self._console, transient=True, refresh_per_second=4) if self._console.is_terminal else None
        with ExitStack() as stack:
            if live is not None:
                stack.enter_context(live)
            shown = ""
            while True:
                state, line = self._look()
                if state is not None and state.status.final:
                    return state
                if live is not None:
                    live.update(self._picture(line))
                elif line != shown:
                    # What happens while it runs, or recovers, the journals tell.
                    if state is None or state.status not in (Status.RUNNING, Status.RECOVERING):
                        self._print(line)
                    shown = line
                sleep(every)

    def _look(self) -> tuple[State | None, str]:
        """Tells what is new; where the run stands, and that as a line. A storage that is out of reach ends nothing."""
        try:
            state = self._backend.status(self._run)
            for event in [*self._events.events(), *self._progress.events()]:
                self._tell(event)
            return state, self._now(state)
        except InfrastructureError as error:
            return None, f"trying again: {printable(str(error))}"

    def _now(self, state: State) -> str:
        if state.status is Status.RUNNING and self._last.get("event") == "step":
            return f"{step_line(self._last, self._epochs)}  ETA {self._eta()}"
        if state.status is Status.RUNNING and self._last.get("event") == "evaluating":
            return f"evaluating on {self._last['split']}"
        words = f"{state.status.lower()}: {state.reason}" if state.reason else state.status.lower()
        return printable(f"{words}; next: {state.hint}" if state.hint else words)

    def _picture(self, line: str) -> RenderableType:
        """What a terminal shows now."""
        return Text(line, no_wrap=True, overflow="ellipsis")

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
            self._print(f"training on {event['device']} with {count(event['workers'], 'worker')}, {where}")
        elif kind == "epoch":
            self._epoch_seconds = event["seconds"] + event["eval_seconds"]
            self._print(epoch_line(event, self._epochs))
        elif kind == "retry":
            self._print(f"recovering: {event['error']['what']}; going on from step {max(event['step'], 0):,}")
        elif kind == "attempt" and event["number"] > 1:
            self._print(f"attempt {event['number']}, from step {event['from_step']:,}")

    def _print(self, line: str) -> None:
        self._console.print(Text(printable(line)), soft_wrap=True)
