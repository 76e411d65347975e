"""The command line: what is typed becomes calls, what goes wrong becomes one message and an exit code.

Everything beyond click is imported by the command that needs it, so that help is instant.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from launcher import __version__, manage, operate
from launcher.errors import Exit, LaunchError, SiteError, UserError, closest, printable
from launcher.where import Where, where_options

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.pools import Pool
    from launcher.runs import Run
    from launcher.specfile import Draft

FLAGS = {
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
    launch --cluster gpu-pool --data s3://…  on Kubernetes; launch pools lists the pools

    Without a command, `launch` is `launch run`.
    """


def _spec_flags(*keys: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the flags of some spec fields, and --set."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option("--set", "sets", multiple=True, metavar="FIELD=VALUE",
                               help="Any field of the spec (launch schema lists them).")(command)  # fmt: skip
        for key in reversed(keys or tuple(FLAGS)):
            flag, kind, text = FLAGS[key]
            command = click.option(flag, key.replace(".", "__"), type=kind, default=None, help=text)(command)
        return command

    return add


@main.command()
@click.argument("spec_file", required=False, metavar="[SPEC.yaml]")
@_spec_flags()
@where_options
@click.option("--dry-run", is_flag=True, help="Say what would be done and why; print it (see below); start nothing.")
@click.option("-d", "--detach", is_flag=True, help="Return as soon as the run has started.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before a run that may cost much.")
@manage.output_option
def run(
    spec_file: str | None, where: Where, dry_run: bool, detach: bool, yes: bool, output: str, sets: tuple[str, ...],
    **flags: Any,
) -> None:  # fmt: skip
    """Fine-tune a model, here or on a pool, and watch it.

    --dry-run prints the whole spec; with --cluster, what `kubectl apply -f -` takes.
    """
    from launcher.preflight import prepare
    from launcher.specfile import Draft

    draft = Draft()
    if spec_file:
        draft.read(Path(spec_file))
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
            draft.put(dotted, value, FLAGS[dotted][0].partition("/")[0])
    for text in sets:
        draft.assign(text)


def _run_of(plan: Plan) -> Run:
    from launcher.runs import Run

    return Run(plan.spec.storage or "", plan.spec.name or "")


def _show_plan(plan: Plan, here: Run) -> None:
    from launcher import show

    show.plan_table(plan, here.uri, manage.console(), every=False)
    operate.show_outlook(plan)


def _print_dry_run(plan: Plan, here: Run, output: str) -> None:
    from launcher import show
    from launcher.specfile import dump

    show.plan_table(plan, here.uri, manage.console(), every=True)
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
@_spec_flags("train.epochs", "resources.workers", "limits.max_hours", "limits.max_cost")
@click.option("-d", "--detach", is_flag=True, help="Return as soon as the run has started.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before a run that may cost much.")
@where_options
@manage.output_option
def resume(name: str, detach: bool, yes: bool, where: Where, output: str, sets: tuple[str, ...], **flags: Any) -> None:
    """Go on with a run, or make it longer. It begins at its last checkpoint."""
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
    if state.status.name == "SUCCEEDED" and (plan.spec.train.epochs or 0) <= len(here.metrics().get("epochs", [])):
        raise UserError(f"{name} has finished", where=here.uri, hint=f"launch resume {name} --epochs N makes it longer")
    for key, (before, after) in changes.items():
        click.echo(f"changed  {key}: {before} -> {after}", err=True)
    operate.agree(plan, yes=yes)
    if changes:
        here.set_spec(plan.spec, plan.to_json())
    _start(here, pool, detach, output)


@main.command()
def schema() -> None:
    """Print the JSON schema of the spec."""
    from launcher.spec import Spec

    click.echo(json.dumps(Spec.model_json_schema(), indent=1))


for _command in (*manage.COMMANDS, *operate.COMMANDS):
    main.add_command(_command)
