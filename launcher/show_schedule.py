"""How a sweep looks before it begins: what it searches and why, and what that will take. Changes nothing."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.errors import printable
from launcher.plan import Plan, count
from launcher.schedule import Schedule
from launcher.show import say, seconds


def sweep_plan(plan: Plan, console: Console) -> None:
    """The search space as a table, and the schedule in lines; nothing for a single training."""
    sweep, ahead = plan.spec.sweep, plan.schedule
    if sweep is None or ahead is None:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("searched", "domain", "why"):
        table.add_column(heading, overflow="fold")
    table.columns[0].no_wrap = True
    for key, domain in (sweep.space or {}).items():
        only = "".join(f", if {other} is {wanted}" for other, wanted in (domain.when or {}).items())
        table.add_row(key, Text(printable(domain.describe() + only)), Text(printable(plan.searched.get(key, ""))))
    console.print(table)
    metric, mode = sweep.objective
    more = f"; beside it {', '.join(list(sweep.objectives)[1:])}" if len(sweep.objectives) > 1 else ""
    first = "each combination once" if sweep.search == "grid" else "the first has the settings of launch"
    say(console, "search", f"{sweep.search} for the {'highest' if mode == 'max' else 'lowest'} {metric}{more}, "
                           f"in {count(ahead.trials, 'trial')}; {first}")  # fmt: skip
    say(console, "at once", _at_once(plan, ahead))
    for rung in ahead.rungs:
        say(console, "", f"epoch {rung.epoch:>3}: about {rung.reached:.0f} trials come to it, {rung.survive:.0f} go on")
    say(console, "", ahead.note)
    expected = "" if ahead.epochs_expected is None else f"about {ahead.epochs_expected:,.0f} expected, "
    say(console, "epochs", f"{expected}{ahead.epochs_worst:,} at worst ({ahead.trials} x {ahead.epochs})")
    say(console, "time", _time(ahead))


def _at_once(plan: Plan, ahead: Schedule) -> str:
    gpus = f" on {ahead.gpus:g} GPU{'s' * (ahead.gpus != 1)}" if ahead.gpus else ""
    each = plan.spec.resources
    return (f"{count(ahead.at_once, 'trial')}{gpus}, each {count(plan.workers, 'worker')} with "
            f"{count(each.cpus_per_worker or 0, 'core')}")  # fmt: skip


def _time(ahead: Schedule) -> str:
    """Hours and cost where they can be told, and what ends the sweep in any case."""
    caps = f"; ended by {', '.join(ahead.caps)}" if ahead.caps else ""
    if ahead.hours_worst is None:
        ends = caps or "; --time-limit 2h would end it"
        return f"not known before the first trial: no run like it in the storage{ends}"
    worst, expected = seconds(ahead.hours_worst * 3600), ahead.hours_expected
    text = (
        f"about {seconds(expected * 3600)} expected, {worst} at worst" if expected is not None else f"{worst} at worst"
    )
    if ahead.cost_worst is not None:
        cost = "" if ahead.cost_expected is None else f"about {ahead.cost_expected:,.2f} expected, "
        text += f"; {cost}{ahead.cost_worst:,.2f} {ahead.currency} at worst"
    return f"{text} (from the speed of {ahead.speed_of}){caps}"
