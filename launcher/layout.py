"""How the workers of a run become pods on a Kubernetes pool, what that costs, and when it ends. Pure.

Every worker pod of a run has the same share of a node, so the workers are split evenly over the pods. The workers of a
sweep are those of all the trials it trains at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from launcher.errors import UserError
from launcher.site import NodeType, Offer, Site, quantity
from launcher.spec import Spec


@dataclass(frozen=True)
class Layout:
    """`pods` worker pods, each with `workers` workers on `gpus` GPUs, `cpus` cores and `memory` bytes of a node.

    `price_per_hour` is that of all pods and the head, None where the pool names no price. The three clocks are in
    seconds: holding nodes at all, waiting for them, and running without a sign of progress.
    """

    node_type: NodeType
    spot: bool
    pods: int
    workers: int
    gpus: int
    cpus: int
    memory: int
    price_per_hour: float | None
    currency: str
    max_seconds: int
    start_seconds: int
    idle_seconds: int

    @property
    def offer(self) -> Offer:
        """What it runs on."""
        return self.node_type.offer(self.spot)

    @property
    def most(self) -> float | None:
        """What an attempt can cost at most."""
        return None if self.price_per_hour is None else self.price_per_hour * self.max_seconds / 3600

    def to_json(self) -> dict[str, Any]:
        """For plan.json."""
        return {
            "node_type": self.node_type.name, "spot": self.spot, "pods": self.pods, "workers_per_pod": self.workers,
            "gpus_per_pod": self.gpus, "cpus_per_pod": self.cpus, "memory_per_pod": self.memory,
            "price_per_hour": self.price_per_hour, "currency": self.currency, "max_hours": self.max_seconds / 3600,
        }  # fmt: skip


def lay_out(spec: Spec, site: Site, spent: float = 0.0) -> Layout:
    """The layout of a resolved spec; `spent` is what earlier attempts of the run have cost.

    Raises `UserError` where the pool can never hold the run, or where nothing is left of its cost.
    """
    each, kind = spec.resources, site.node_type(spec.resources.node_type)
    spot = bool(each.spot)
    offer = kind.offer(spot)
    workers, on_gpu = each.workers or 1, bool(each.gpus_per_worker)
    at_once, sharing = (spec.sweep.concurrent or 1, spec.sweep.trials_per_gpu) if spec.sweep else (1, 1)
    # Trials that share a GPU take one place together.
    places, cpus = math.ceil(at_once * workers / sharing), (each.cpus_per_worker or 1) * sharing
    fits = min(int(kind.cpus // cpus), kind.gpus if on_gpu else places)
    if fits < 1:
        raise UserError(f"a worker with {cpus} cores does not fit on a node of {kind.name}, which has {kind.cpus:g}",
                        where="resources.cpus_per_worker", hint=f"at most {int(kind.cpus)}")  # fmt: skip
    most = kind.max_nodes * fits
    if places > most:
        raise UserError(f"{places} workers, but {kind.max_nodes} nodes of {kind.name} hold {most}",
                        where="resources.workers", hint=f"at most --workers {most}, or another --gpu")  # fmt: skip
    # An even split, so that no pod waits for another: the fewest pods for which there are nodes, and of those of a
    # sweep first those that hold whole trials.
    sizes = [size for size in range(fits, 0, -1) if places % size == 0]
    sizes.sort(key=lambda size: size % workers != 0 and workers % size != 0)
    per_pod = next(size for size in sizes if places // size <= kind.max_nodes * (fits // size))
    pods = places // per_pod
    gpus = per_pod if on_gpu else 0
    share = gpus / kind.gpus if on_gpu else per_pod * cpus / kind.cpus
    price = None if offer.price_per_hour is None else pods * share * offer.price_per_hour + site.head.price_per_hour
    memory = math.floor(quantity(kind.memory) * min(share, 1.0))
    return Layout(
        kind, spot, pods, per_pod * sharing, gpus, per_pod * cpus, memory, price, site.currency,
        _max_seconds(spec, price, spent), _seconds(spec.limits.start_minutes), _seconds(spec.limits.idle_minutes),
    )  # fmt: skip


def trial_drivers(spec: Spec) -> int:
    """How many trials are at once driven from the head: those of several workers have a driver of their own there."""
    return spec.sweep.concurrent or 1 if spec.sweep and (spec.resources.workers or 1) > 1 else 0


def _seconds(minutes: float | None) -> int:
    return max(1, round((minutes or 0) * 60))


def _max_seconds(spec: Spec, price: float | None, spent: float) -> int:
    hours, cost = spec.limits.max_hours or 0.0, spec.limits.max_cost
    if cost is not None:
        if not price:
            raise UserError("the pool names no price for these nodes", where="limits.max_cost",
                            hint="--max-hours caps the run without one")  # fmt: skip
        if spent >= cost:
            raise UserError(f"the run has cost {spent:.2f} of {cost:.2f} already", where="limits.max_cost",
                            hint="a higher --max-cost")  # fmt: skip
        hours = min(hours, (cost - spent) / price)
    return max(1, round(hours * 3600))
