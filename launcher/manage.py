"""The commands on runs that exist: list, status, trials, attach, logs, cancel, report, predict, rm.

What these need is in the run directory; none of them trains, and none but `predict` needs the train extra.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from launcher.errors import (
    Exit,
    LaunchError,
    NotFinishedError,
    NotFoundError,
    SiteError,
    UserError,
    printable,
)
from launcher.where import Where, storage_option, where_options

if TYPE_CHECKING:
    from rich.console import Console

    from launcher.backends import Backend
    from launcher.runs import Run, State
    from launcher.storage import Store

CANCEL_SECONDS = 150.0
"""A run that has not saved and stopped by then is killed."""

output_option = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
name_argument = click.argument("name", shell_complete=lambda ctx, _param, part: _complete(ctx, part))


def console(*, stderr: bool = True) -> Console:
    """The console for people: stderr, unless a person asked for what is printed; then a script may read it."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 200  # nothing says how wide a file is, and rich would break lines at 80
    return made


def watch(here: Run, engine: Backend, output: str) -> NoReturn:
    """Shows the run to its end and exits with its code; Ctrl-C leaves it running."""
    from launcher.errors import from_record

    out, page = console(), _page(here)
    try:
        state = page.Viewer(here, engine, out).watch()
    except KeyboardInterrupt:
        detached(here)
    if output == "json":
        click.echo(json.dumps(summary(here, state), indent=1))
    page.end(here, state, out)
    sys.exit(from_record(state.error).exit_code if state.error else state.status.exit_code)


def _page(here: Run) -> ModuleType:
    """How the run is shown: `show`, or for a sweep `show_sweep`, where the same names stand for the same things."""
    from launcher import show, show_sweep

    return show_sweep if here.spec().sweep else show


def detached(here: Run) -> NoReturn:
    """Says that the run goes on without us, and how to come back."""
    from launcher.show import typed

    click.echo(f"\ndetached; {here.name} goes on", err=True)
    click.echo(f"next:  launch attach {typed(here)} comes back, launch cancel {typed(here)} stops it", err=True)
    sys.exit(Exit.INTERRUPTED)


def summary(here: Run, state: State) -> dict[str, Any]:
    """The run as `-o json` shows it."""
    document = {"name": here.name, "uri": here.uri, **asdict(state)}
    if state.status.name == "SUCCEEDED":
        document |= {"report": f"{here.uri}/report.html", "model": f"{here.uri}/model"}
    return document


def _complete(ctx: click.Context, part: str) -> list[str]:
    from launcher.runs import all_runs

    with suppress(LaunchError):  # a prompt is no place for an error
        root = Where(ctx.params.get("storage"), ctx.params.get("cluster")).root()
        return [item.name for item in all_runs(root) if item.name.startswith(part)]
    return []


@click.command("list")
@where_options
@output_option
def list_(where: Where, output: str) -> None:
    """Show all runs."""
    rows = sorted(_rows(where), key=lambda pair: -pair[1].created)
    if output == "json":
        click.echo(json.dumps([summary(*row) for row in rows], indent=1))
    elif not rows:
        click.echo(f"no runs in {where.root()}; launch --data sample://digits makes the first", err=True)
    else:
        from launcher import show

        show.runs_table(rows, console(stderr=False))


def _rows(where: Where) -> Iterator[tuple[Run, State]]:
    """Every run in the storage, each with its state from the place that carries it out."""
    from launcher.backends import backend
    from launcher.runs import all_runs

    root = where.root()
    runs = all_runs(root)
    for name in sorted({run.pool() for run in runs}):
        try:
            yield from backend(where.pool(name)).list(root)
        except LaunchError as error:
            # A cluster out of reach costs its runs the latest word, not the others the list.
            for run in runs:
                if run.pool() == name:
                    yield run, replace(run.state(), reason=f"as last recorded: {error}")


@click.command()
@name_argument
@where_options
@output_option
def status(name: str, where: Where, output: str) -> None:
    """Show where a run stands, and why."""
    here = where.run(name)
    state = where.reader(here).status(here)
    if output == "json":
        more = _sweep_json(here) if here.spec().sweep else {"epochs": here.metrics().get("epochs", [])}
        click.echo(json.dumps({**summary(here, state), **more}, indent=1))
    else:
        _page(here).status_text(here, state, console(stderr=False))


def _sweep_json(here: Run) -> dict[str, Any]:
    """All trials of a sweep with their epochs, and the leaderboard; a NaN is null, which JSON knows."""
    from launcher.sweeps import Ledger, leaderboard

    ledger = Ledger.load(here)
    document = {"sweep": asdict(ledger), "leaderboard": leaderboard(ledger)}
    return dict(json.loads(json.dumps(document), parse_constant=lambda _name: None))


@click.command()
@name_argument
@where_options
@click.option("-o", "--output", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
def trials(name: str, where: Where, output: str) -> None:
    """Show all trials of a sweep, the best first."""
    from launcher.sweeps import Ledger, leaderboard_csv

    here = where.run(name)
    if output == "table":
        from launcher import show_sweep

        show_sweep.trials_table(here, console(stderr=False))
    elif output == "csv":
        click.echo(leaderboard_csv(Ledger.load(here)), nl=False)
    else:
        click.echo(json.dumps(_sweep_json(here)["leaderboard"], indent=1))


@click.command()
@name_argument
@where_options
@output_option
def attach(name: str, where: Where, output: str) -> None:
    """Watch a run; Ctrl-C leaves it running."""
    here = where.run(name)
    watch(here, where.reader(here), output)


@click.command()
@name_argument
@click.option("-f", "--follow", is_flag=True, help="Wait for new lines until the run is over.")
@click.option("--rank", type=click.IntRange(0), help="Only this worker's log.")
@click.option("--trial", type=click.IntRange(1), help="The logs of this trial of a sweep.")
@click.option("--since", callback=lambda _ctx, _param, text: _ago(text), metavar="AGO",
              help="Begin so long ago: 30s, 5m, 2h.")  # fmt: skip
@click.option("--tail", type=click.IntRange(0), help="Begin with the last N lines.")
@where_options
def logs(
    name: str, follow: bool, rank: int | None, trial: int | None, since: float | None, tail: int | None, where: Where
) -> None:
    """Print the logs of a run: of the driver, of every worker, and on a cluster of the submitter."""
    import time
    from collections import deque
    from itertools import takewhile

    from launcher.backends import stored_logs

    here = where.run(name)
    engine = where.reader(here)
    source_run = here if trial is None else _trial(here, trial)
    only = "" if rank is None else f"rank-{rank}"
    if only and not follow and not any(source_run.store.list(f"logs/{only}.log")):
        found = source_run.store.list("logs/")
        known = sorted({entry.key.removeprefix("logs/").partition(".log")[0] for entry in found})
        raise UserError(f"there is no log of rank {rank}", where=source_run.uri,
                        hint=f"the logs are {', '.join(known)}" if known else f"launch status {name}")  # fmt: skip

    def tell(source: str, line: str) -> None:
        click.echo(line if only else f"[{source}] {line}")

    lines = engine.logs(here, only)
    if trial is not None:  # it may go on for as long as its sweep does
        lines = stored_logs(source_run, lambda: engine.status(here).status.final, only)
    stored: Iterable[tuple[str, str]] = takewhile(lambda pair: pair[0], lines)
    if since is not None:
        stored = _since(stored, time.time() - since)
    for source, line in stored if tail is None else deque(stored, tail):
        tell(source, line)
    if follow:
        pause = 2.0 if here.uri.startswith("s3://") else 0.5
        for source, line in lines:
            if source:
                tell(source, line)
            else:
                time.sleep(pause)
        sys.exit(engine.status(here).status.exit_code)


def _trial(here: Run, number: int) -> Run:
    """The run directory of a trial, or `NotFoundError`."""
    from launcher.sweeps import Ledger

    return here.trial(Ledger.load(here).trial(number).number)


def _ago(text: str | None) -> float | None:
    """Seconds that `30s`, `5m`, `2h` or `1d` mean."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not found:
        raise UserError(f"{text} is not a time", where="--since", hint="write 30s, 5m, 2h or 1d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _since(lines: Iterable[tuple[str, str]], moment: float) -> Iterator[tuple[str, str]]:
    """The lines from that moment (Unix seconds) on; a line without a time belongs to the one before it."""
    late: dict[str, bool] = {}
    for source, line in lines:
        stamp = re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z", line)
        if stamp:
            late[source] = datetime.fromisoformat(stamp[0]).timestamp() >= moment
        if late.get(source):
            yield source, line


@click.command()
@name_argument
@click.option("--force", is_flag=True, help="Kill it; what came after the last checkpoint is lost.")
@where_options
def cancel(name: str, force: bool, where: Where) -> None:
    """Stop a run after a last checkpoint, and give its GPUs back. `launch resume` goes on from there."""
    import time

    here = where.run(name)
    engine = where.engine(here)
    state = engine.status(here)
    if state.status.final:
        engine.cancel(here)
        click.echo(f"{name} is over already: {state.status.lower()}", err=True)
        return
    try:
        engine.cancel(here, force=force)
        after = "" if force else " after a checkpoint (--force does not wait for it)"
        click.echo(f"{name}: stopping{after}", err=True)
        began = time.monotonic()
        while not (state := engine.status(here)).status.final:
            if time.monotonic() - began > CANCEL_SECONDS:
                engine.cancel(here, force=True)
            time.sleep(0.3)
        engine.cancel(here)  # what it still holds is given back now, not in a while
    except KeyboardInterrupt:
        from launcher import show

        click.echo(f"\nnot waiting; launch status {show.typed(here)} shows the end", err=True)
        sys.exit(Exit.INTERRUPTED)
    _page(here).status_text(here, state, console())


@click.command()
@name_argument
@click.option("--open", "open_", is_flag=True, help="Open it in the browser.")
@click.option("--trial", type=click.IntRange(1), help="The report of this trial of a sweep.")
@where_options
def report(name: str, open_: bool, trial: int | None, where: Where) -> None:
    """Write a run's report anew, and say where it is."""
    from trainers import report as page

    here = where.run(name) if trial is None else _trial(where.run(name), trial)
    uri = page.write(here)
    click.echo(uri)
    if open_:
        if uri.startswith("s3://"):
            import tempfile

            folder = tempfile.mkdtemp(prefix="raylaunch-")
            here.store.download("report.html", Path(folder) / "report.html")
            uri = f"{folder}/report.html"
        click.launch(uri)


@click.command()
@click.argument("model")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="Classes to show for each image.")
@storage_option
@output_option
def predict(model: str, images: tuple[str, ...], top: int, storage: str | None, output: str) -> None:
    """Classify images with a trained model. MODEL is the name of a run, or the path of a model folder."""
    store, hint = _model_of(storage, model)
    try:
        from trainers.predict import Predictor
    except ModuleNotFoundError as error:
        raise SiteError(f"predicting needs {error.name}", hint="pip install 'raylaunch[train]'") from None
    try:
        predictor = Predictor(store)
    except FileNotFoundError:
        raise NotFinishedError("there is no model here", where=store.uri, hint=hint) from None
    rows = list(predictor.predict([Path(image) for image in images], top))
    if not rows:
        raise UserError("there is no image here", where=" ".join(images), hint="give image files, or folders of them")
    if output == "json":
        click.echo(json.dumps(rows, indent=1))
    else:
        for row in rows:
            answers = "  ".join(f"{item['label']} {item['probability']:.1%}" for item in row.get("classes", []))
            click.echo(printable(f"{row['image']}  {answers or 'cannot be read: ' + row['error']}"))
    if any("error" in row for row in rows):
        sys.exit(Exit.FAILED)


def _model_of(storage: str | None, model: str) -> tuple[Store, str]:
    """Where the model lies, and what to type if it does not."""
    from launcher.storage import open_store

    folder = open_store(model), "give the name of a run, or the path of a model folder"
    if "/" in model:
        return folder
    try:
        here = Where(storage).run(model)
    except NotFoundError:
        if Path(model).is_dir():
            return folder
        raise
    return here.store.child("model"), f"launch status {model} shows how far the run is"


@click.command()
@name_argument
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@where_options
def rm(name: str, yes: bool, where: Where) -> None:
    """Delete a run that is over. Its checkpoints, model and report go with it."""
    here = where.run(name)
    if here.owner() is not None:
        raise NotFinishedError(f"{name} is still running", where=here.uri, hint=f"launch cancel {name}")
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("there is no terminal to ask on", where="launch rm", hint=f"launch rm {name} --yes")
        if not click.confirm(f"delete {here.uri} with its checkpoints and model?", err=True):
            click.echo("nothing is deleted", err=True)
            return
    where.engine(here).delete(here)
    click.echo(f"{name} is deleted", err=True)


COMMANDS = (list_, status, trials, attach, logs, cancel, report, predict, rm)
