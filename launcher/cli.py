"""The command line: what is typed becomes calls, what goes wrong becomes one message and an exit code.

Everything beyond click is imported by the command that needs it, so that help is instant.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from launcher import __version__, bench_data, datasets, manage, operate
from launcher.errors import Exit, LaunchError, SiteError, UserError, closest, printable
from launcher.where import Where, where_options

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.pools import Pool
    from launcher.runs import Run
    from launcher.specfile import Draft

FLAGS: dict[str, tuple[str, Any, str]] = {
    "name": ("--name", str, "Name of the run."),
    "data.uri": ("--data", str, "Folder, s3:// prefix, manifest, or sample://digits."),
    "data.image_size": ("--image-size", int, "Side of the model's input, in pixels."),
    "model.name": ("--model", str, "Any timm CNN."),
    "model.pretrained": ("--pretrained", str, "hub, none, or a weights file."),
    "train.epochs": ("--epochs", int, "Passes over the training images."),
    "train.batch_size": ("--batch-size", int, "Images per step, over all workers."),
    "train.precision": ("--precision", str, "fp32, bf16 or fp16."),
    "train.seed": ("--seed", int, "Seed of every random choice."),
    "optim.lr": ("--lr", float, "Peak learning rate."),
    "resources.workers": ("--workers", int, "Number of workers."),
    "resources.node_type": ("--gpu", str, "Kind of node of the pool."),
    "resources.spot": ("--spot/--no-spot", bool, "Cheaper nodes that may be taken away."),
    "resources.priority": ("--priority", str, "Priority class on the cluster."),
    "limits.max_hours": ("--max-hours", float, "End after so many hours on a cluster."),
    "limits.max_cost": ("--max-cost", float, "End before it has cost more."),
}
"""Spec fields that have a flag of their own; every other field is reached by --set."""


class Hours(click.ParamType[float]):
    """A time such as `2h`, `90m` or `1.5h`, as hours."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ARG002
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", str(value))
        if not found or not float(found[1]):
            raise UserError(f"{value} is not a time", where="--time-limit", hint="write 90m, 2h or 1.5h")
        return float(found[1]) * {"m": 1 / 60, "h": 1, "d": 24}[found[2]]


SWEEP_FLAGS: dict[str, tuple[str, Any, str]] = {
    "sweep.trials": ("--trials", int, "Trials in all."),
    "sweep.search": ("--search", str, "optuna, random or grid."),
    "sweep.scheduler": ("--scheduler", str, "asha, hyperband, median, pbt or none."),
    "sweep.concurrent": ("--concurrent", int, "Trials at once."),
    "sweep.time_limit": ("--time-limit", Hours(), "End after so long (2h, 90m); the best so far counts."),
    "sweep.refit": ("--refit/--no-refit", bool, "Train the best settings once more, on all images."),
    "sweep.warm_from": ("--warm-from", str, "A past sweep whose results the search knows."),
}
"""The same for what only sweeps have."""


class Commands(click.Group):
    """`launch …` without a command is `launch run …`, and errors are told the same way everywhere."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if first and first not in self.commands and first not in ("--help", "-h", "--version"):
            if not first.startswith("-"):
                _check_spec_file(first, self.commands)
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """In the order in which they are needed."""
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except LaunchError as error:
            _fail(error)
        except Exception as error:
            _bug(error)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader of a pipe (head, less) went away: not an error of ours, and nothing more can be said.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(Exit.DONE)
        except (KeyboardInterrupt, click.Abort):
            click.echo("\ninterrupted", err=True)
            sys.exit(Exit.INTERRUPTED)


def _check_spec_file(name: str, commands: Iterable[str]) -> None:
    """What stands where a command or a spec file should: tells a typo, and data, from a file."""
    path = Path(name)
    if "://" in name or path.is_dir() or name.endswith((".csv", ".jsonl", ".parquet")):
        raise UserError("this is data, not a spec file", where=name, hint=f"launch --data {shlex.quote(name)}")
    if not path.exists() and not name.endswith((".yaml", ".yml", ".json")):
        close = closest(name, commands)
        hint = f"did you mean launch {close}?" if close else "launch --help lists the commands"
        raise UserError(f"there is no command or spec file {name}", hint=hint)


def _fail(error: LaunchError) -> NoReturn:
    where = f"{error.where}: " if error.where else ""
    click.echo(f"{click.style('error', fg='red', bold=True)}: {printable(where + error.what)}", err=True)
    if error.hint:
        click.echo(f"{click.style('next', bold=True)}:  {printable(error.hint)}", err=True)
    sys.exit(error.exit_code)


def _bug(error: Exception) -> NoReturn:
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="raylaunch-", suffix=".txt", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    click.echo(f"error: a bug in raylaunch: {type(error).__name__}: {printable(str(error))}", err=True)
    click.echo(f"next:  please report it with {file.name}; runs that were started go on", err=True)
    sys.exit(Exit.BUG)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="launch")
def main() -> None:
    """Fine-tune an image classifier with one command: launch --data FOLDER.

    \b
    launch --data sample://digits            try it on a built-in data set
    launch --data s3://bucket/flowers        one folder for each class
    launch spec.yaml --dry-run               say what would be done, and why
    launch sweep --data FOLDER --trials 32   find the best settings
    launch --cluster gpu-pool --data s3://…  on Kubernetes; launch pools lists the pools

    Without a command, `launch` is `launch run`.
    """


def _spec_flags(*keys: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the flags of some spec fields, and --set."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option("--set", "sets", multiple=True, metavar="FIELD=VALUE",
                               help="Any field of the spec (launch schema lists them).")(command)  # fmt: skip
        known = FLAGS | SWEEP_FLAGS
        for key in reversed(keys):
            flag, kind, text = known[key]
            command = click.option(flag, key.replace(".", "__"), type=kind, default=None, help=text)(command)
        return command

    return add


class Single(click.Command):
    """Tells a flag of `launch sweep` from a typo."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if any(error.option_name in flag.split("/") for flag, _, _ in SWEEP_FLAGS.values()):
                raise UserError("only a sweep has this", where=error.option_name,
                                hint=f"launch sweep … {error.option_name} …") from None  # fmt: skip
            raise


def _start_options(*keys: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What `launch run` and `launch sweep` have in common, with the flags of some spec fields."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        options = (
            click.argument("spec_file", required=False, metavar="[SPEC.yaml]"), _spec_flags(*keys), where_options,
            click.option("--dry-run", is_flag=True,
                         help="Say what would be done and why; print it (see below); start nothing."),
            click.option("-d", "--detach", is_flag=True, help="Return as soon as the run has started."),
            click.option("-y", "--yes", is_flag=True, help="Do not ask before a run that may cost much."),
            manage.output_option,
        )  # fmt: skip
        for option in reversed(options):
            command = option(command)
        return command

    return add


@main.command(cls=Single)
@_start_options(*FLAGS)
def run(spec_file: str | None, sets: tuple[str, ...], **given: Any) -> None:
    """Fine-tune a model, here or on a pool, and watch it.

    --dry-run prints the whole spec; with --cluster, what `kubectl apply -f -` takes.
    """
    draft = _draft(spec_file)
    asked = [text.partition("=")[0].strip() for text in sets]
    if not draft.sweep and (foreign := [key for key in asked if key.partition(".")[0] == "sweep"]):
        raise UserError("only a sweep has this", where=f"--set {foreign[0]}", hint="launch sweep … --set …")
    _launch(draft, sets, **given)


@main.command()
@_start_options(*SWEEP_FLAGS, *FLAGS)
def sweep(spec_file: str | None, sets: tuple[str, ...], **given: Any) -> None:
    """Search for the best settings: many trials, the bad ones stopped early, the best one kept.

    \b
    launch sweep --data s3://bucket/flowers --trials 32
    launch sweep sweep.yaml --cluster gpu-pool --max-cost 40 --time-limit 2h
    launch sweep --data FOLDER --set sweep.space='{optim.lr: {loguniform: [1e-3, 1]}}'

    Without a sweep.space, what matters most for the model is searched; --dry-run says what and why, and what it will
    take. It prints the whole spec; with --cluster, what `kubectl apply -f -` takes.
    """
    draft = _draft(spec_file)
    draft.sweep = True
    _launch(draft, sets, **given)


def _draft(spec_file: str | None) -> Draft:
    from launcher.specfile import Draft

    draft = Draft()
    if spec_file:
        draft.read(Path(spec_file))
    return draft


def _launch(
    draft: Draft, sets: tuple[str, ...], *, where: Where, dry_run: bool, detach: bool, yes: bool, output: str,
    **flags: Any,
) -> None:  # fmt: skip
    from launcher.preflight import prepare

    _take(draft, flags, sets)
    if where.storage:
        draft.put("storage", where.storage, "--storage")
    pool = where.pool()
    plan, index = prepare(draft, pool)
    here = _run_of(plan)
    if dry_run:
        _print_dry_run(plan, here, output)
        return
    _show_plan(plan, here)
    operate.agree(plan, yes=yes)
    here.create(plan.spec, plan.to_json())
    if index is not None:
        index.save(here.store)
    try:
        _start(here, pool, detach, output)
    except (SiteError, UserError):
        here.delete()  # nothing was started: the name is free again
        raise


def _take(draft: Draft, flags: dict[str, Any], sets: tuple[str, ...]) -> None:
    for key, value in flags.items():
        if value is not None:
            dotted = key.replace("__", ".")
            draft.put(dotted, value, (FLAGS | SWEEP_FLAGS)[dotted][0].partition("/")[0])
    for text in sets:
        draft.assign(text)


def _run_of(plan: Plan) -> Run:
    from launcher.runs import Run

    return Run(plan.spec.storage or "", plan.spec.name or "")


def _show_plan(plan: Plan, here: Run) -> None:
    from launcher import show, show_schedule

    show.plan_table(plan, here.uri, manage.console(), every=False)
    show_schedule.sweep_plan(plan, manage.console())
    operate.show_outlook(plan)


def _print_dry_run(plan: Plan, here: Run, output: str) -> None:
    from launcher import show, show_schedule
    from launcher.specfile import dump

    show.plan_table(plan, here.uri, manage.console(), every=True)
    show_schedule.sweep_plan(plan, manage.console())
    if output == "json":
        click.echo(json.dumps({"spec": plan.spec.model_dump(mode="json"), **plan.to_json()}, indent=1))
    elif plan.layout:
        operate.show_outlook(plan)
        click.echo(operate.manifest_text(plan, here.uri), nl=False)
    else:
        click.echo(dump(plan.spec), nl=False)


def _start(here: Run, pool: Pool, detach: bool, output: str) -> None:
    from launcher.backends import backend

    engine = backend(pool)
    try:
        engine.submit(here)
    except KeyboardInterrupt:
        if pool.site is None:
            manage.detached(here)
        click.echo(f"\ninterrupted; launch status {here.name} says whether it was submitted", err=True)
        sys.exit(Exit.INTERRUPTED)
    if detach:
        from launcher.show import typed

        click.echo(f"{here.name} is {'submitted' if pool.site else 'running'}; launch attach {typed(here)} watches it",
                   err=True)  # fmt: skip
        if output == "json":
            click.echo(json.dumps(manage.summary(here, engine.status(here)), indent=1))
        return
    manage.watch(here, engine, output)


@main.command()
@manage.name_argument
@_spec_flags(
    "train.epochs",
    "resources.workers",
    "limits.max_hours",
    "limits.max_cost",
    "sweep.trials",
    "sweep.concurrent",
    "sweep.time_limit",
)
@click.option("-d", "--detach", is_flag=True, help="Return as soon as the run has started.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before a run that may cost much.")
@where_options
@manage.output_option
def resume(name: str, detach: bool, yes: bool, where: Where, output: str, sets: tuple[str, ...], **flags: Any) -> None:
    """Go on with a run, or make it longer: --epochs for a training, --trials for a sweep.

    It begins at its last checkpoint; no trial that has ended is trained again.
    """
    from launcher.backends import backend
    from launcher.preflight import prepare_resume
    from launcher.specfile import Draft

    here = where.run(name)
    pool = where.pool(here.pool())
    state = backend(pool).status(here)
    if not state.status.final:
        raise UserError(f"{name} is {state.status.lower()}", where=here.uri, hint=f"launch attach {name} watches it")
    draft = Draft()
    _take(draft, flags, sets)
    plan, changes = prepare_resume(here, draft, pool)
    if state.status.name == "SUCCEEDED" and (more := _finished(plan, here)):
        raise UserError(f"{name} has finished", where=here.uri, hint=f"launch resume {name} {more}")
    for key, (before, after) in changes.items():
        click.echo(f"changed  {key}: {before} -> {after}", err=True)
    operate.agree(plan, yes=yes)
    if changes:
        here.set_spec(plan.spec, plan.to_json())
    _start(here, pool, detach, output)


def _finished(plan: Plan, here: Run) -> str:
    """What would make a run longer that did all it was to do; nothing if there is something left."""
    from launcher.sweeps import Ledger

    wanted = plan.spec.sweep
    if wanted is None:
        done = (plan.spec.train.epochs or 0) <= len(here.metrics().get("epochs", []))
        return "--epochs N makes it longer" if done else ""
    ledger = Ledger.load(here)
    over = len(ledger.trials) >= wanted.trials and all(trial.outcome.final for trial in ledger.trials)
    done = over and (ledger.refit is not None or not wanted.refit)
    return "--trials N makes it longer" if done else ""


@main.command()
def schema() -> None:
    """Print the JSON schema of the spec."""
    from launcher.spec import Spec

    click.echo(json.dumps(Spec.model_json_schema(), indent=1))


for _command in (*manage.COMMANDS, *datasets.COMMANDS, *bench_data.COMMANDS, *operate.COMMANDS):
    main.add_command(_command)
