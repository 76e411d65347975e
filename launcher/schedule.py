"""What a sweep will do before it does it: rungs, trials at once, epochs in all, hours and price. Pure.

`worst` is the most it can take: every trial runs to its end. `expected` holds if the trials come in any order; a search
that gets better as it goes stops fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from launcher.errors import UserError
from launcher.layout import Layout
from launcher.pools import Pool
from launcher.space import Sweep
from launcher.spec import Spec

MOST_ON_CPU = 4
"""Trials at once without a GPU, unless the user asks for more: each holds its own copy of torch."""


@dataclass(frozen=True)
class Speed:
    """How fast an earlier run of the same kind was: `seconds` for each training image of an epoch, with evaluation."""

    run: str
    seconds: float


@dataclass(frozen=True)
class Rung:
    """An epoch at which trials are compared, how many are expected to come to it, and how many to go on."""

    epoch: int
    reached: float
    survive: float


@dataclass(frozen=True)
class Schedule:
    """Numbers of a sweep before it begins; `expected` figures are None where nothing can be said.

    Hours and costs are None without a measured speed (`speed_of` names the run) or a price. `caps` says what ends the
    sweep in any case.
    """

    trials: int
    at_once: int
    gpus: float
    epochs: int
    rungs: tuple[Rung, ...]
    epochs_worst: int
    epochs_expected: float | None
    note: str
    speed_of: str = ""
    hours_worst: float | None = None
    hours_expected: float | None = None
    cost_worst: float | None = None
    cost_expected: float | None = None
    currency: str = ""
    caps: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self)


def concurrency(spec: Spec, pool: Pool) -> tuple[int, str]:
    """How many trials there are at once, and why.

    Raises `UserError` where the pool can never hold what is asked for, or not even one trial.
    """
    sweep, each = spec.sweep, spec.resources
    assert sweep is not None
    workers, sharing, on_gpu = each.workers or 1, sweep.trials_per_gpu, bool(each.gpus_per_worker)
    if sharing > 1 and not (on_gpu and workers == 1):
        raise UserError("only trials of one worker with a GPU can share it", where="sweep.trials_per_gpu",
                        hint="leave it out, or set resources.workers=1 on a pool with GPUs")  # fmt: skip
    cpus = each.cpus_per_worker or 1
    on_node = min(pool.gpus, pool.cpus // (cpus * sharing)) * sharing if on_gpu else pool.cpus // cpus
    most, usual = on_node * pool.nodes, on_node
    allowed = pool.site.limits.max_gpus if pool.site else None
    if on_gpu and allowed is not None:
        most, usual = min(most, allowed * sharing), min(usual, allowed * sharing)
    most //= workers
    if most < 1:
        raise UserError(f"not even one trial fits on {pool.name}: {workers} x {cpus} cores, of {pool.cpus} on each of "
                        f"{pool.nodes} nodes", where="resources.workers", hint="fewer workers or cores")  # fmt: skip
    if sweep.concurrent is not None:
        if sweep.concurrent > min(most, sweep.trials):
            has = f"{pool.name} can hold {most}" if sweep.concurrent > most else f"the sweep has {sweep.trials} in all"
            raise UserError(f"{sweep.concurrent} trials at once, but {has}", where="sweep.concurrent",
                            hint=f"at most --concurrent {min(most, sweep.trials)}")  # fmt: skip
        return sweep.concurrent, ""
    if on_gpu:
        why = f"{usual} places on the GPUs that one run takes, {workers} for each trial"
    else:
        usual, why = min(usual, MOST_ON_CPU * workers), f"at most {MOST_ON_CPU}, with whole cores for each"
    return max(1, min(usual // workers, sweep.trials)), why


def schedule(spec: Spec, layout: Layout | None, images: int | None, speed: Speed | None = None) -> Schedule:
    """The schedule of a resolved sweep on a pool, for so many training images."""
    sweep, each = spec.sweep, spec.resources
    assert sweep is not None
    trials, at_once, epochs = sweep.trials, sweep.concurrent or 1, spec.train.epochs or 1
    expected, rungs, note = _expected(sweep, epochs)
    worst = trials * epochs
    gpus = at_once * (each.workers or 1) * (each.gpus_per_worker or 0) / sweep.trials_per_gpu
    hours: dict[str, float | None] = {"worst": None, "expected": None}
    if speed is not None and images:
        for key, total in (("worst", worst), ("expected", expected)):
            if total is not None:
                # The last trials run beside empty places, and none is shorter than itself.
                rounds = max(total / at_once, epochs)
                hours[key] = rounds * images * speed.seconds / 3600
    price = layout.price_per_hour if layout else None
    ends = _ends(spec, layout)
    capped = {key: None if value is None else min([value, *ends.values()]) for key, value in hours.items()}
    cost = {key: None if value is None or price is None else value * price for key, value in capped.items()}
    return Schedule(
        trials, at_once, gpus, epochs, rungs, worst, expected, note, speed.run if speed and images else "",
        capped["worst"], capped["expected"], cost["worst"], cost["expected"], layout.currency if layout else "",
        tuple(f"{flag} after {value:.3g} h" for flag, value in ends.items()),
    )  # fmt: skip


def _ends(spec: Spec, layout: Layout | None) -> dict[str, float]:
    """Hours after which the sweep ends in any case, by what says so."""
    found = {}
    if spec.sweep and spec.sweep.time_limit:
        found["--time-limit"] = spec.sweep.time_limit
    if layout is not None:
        hours = layout.max_seconds / 3600
        by_cost = hours < (spec.limits.max_hours or hours) - 1 / 3600
        found["--max-cost" if by_cost else "--max-hours"] = hours
    return found


def _expected(sweep: Sweep, epochs: int) -> tuple[float | None, tuple[Rung, ...], str]:
    """Epochs in all that are to be expected, the rungs, and how to read them."""
    everything = float(sweep.trials * epochs)
    if sweep.scheduler == "asha":
        rungs = tuple(_asha(sweep, epochs))
        if not rungs:
            return everything, (), "too few epochs for a rung: no trial is stopped early"
        return (
            _epochs(rungs, sweep.trials, epochs),
            rungs,
            f"asha: at a rung a trial waits until it is among the best 1 in {sweep.reduction} of those that came there",
        )
    if sweep.scheduler == "hyperband":
        return _hyperband(sweep, epochs), (), "hyperband: brackets, from many short trials to few long ones"
    if sweep.scheduler == "median":
        least = sweep.trials * min(sweep.grace_epochs or 1, epochs)
        return None, (), f"median: a trial below the median stops; between {least:,} epochs in all and the worst"
    if sweep.scheduler == "pbt":
        return everything, (), "pbt: all trials run to the end; the weakest take over weights and settings of the best"
    return everything, (), "no scheduler: all trials run to the end"


def _asha(sweep: Sweep, epochs: int) -> Iterator[Rung]:
    reached, always = float(sweep.trials), sweep.search != "grid"
    for epoch in sweep.rungs(epochs):
        survive = asha_survivors(reached, sweep.reduction)
        # The trial with the settings of launch goes on in any case.
        survive += (1 - survive / reached) * always
        yield Rung(epoch, round(reached, 1), round(survive, 1))
        reached = survive


def asha_survivors(trials: float, reduction: int) -> float:
    """How many of the trials that come to a rung one after another are expected to go on.

    In the end one in r is among the best. Those that were so for a while went on too: how many there are walks up with
    each better one that comes and down with each place that opens, and never below none, as a reflected random walk.
    """
    share = 1 / reduction
    walk = math.sqrt(2 / math.pi * share * (1 - share) * trials)
    return min(trials, max(1.0, trials * share + walk - 0.5))


def _epochs(rungs: tuple[Rung, ...], trials: int, epochs: int) -> float:
    total, before, going = 0.0, 0, float(trials)
    for rung in rungs:
        total += going * (rung.epoch - before)
        before, going = rung.epoch, rung.survive
    return round(total + going * (epochs - before), 1)


def _hyperband(sweep: Sweep, epochs: int) -> float:
    """Li et al. 2018, as Ray fills its brackets: the longest trials first."""
    rate = sweep.reduction
    brackets = round(math.log(epochs) / math.log(rate)) + 1
    left, total, bracket = sweep.trials, 0.0, 0
    while left > 0:
        first = int(epochs * rate**-bracket)
        if first:
            size = min(left, math.ceil(brackets / (bracket + 1) * rate**bracket))
            left -= size
            total += _halved(size, first, epochs, rate)
        bracket = (bracket + 1) % brackets
    return total


def _halved(size: int, first: int, epochs: int, rate: int) -> float:
    """Epochs of one bracket of successive halving, in which each round is longer than the one before."""
    total, at, more = 0.0, 0, first
    while size and at < epochs:
        reach = min(at + more, epochs)
        total += size * (reach - at)
        at, more, size = reach, more * rate, math.ceil(size / rate)
    return total
