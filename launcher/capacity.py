"""What of a pool is free: the nodes there are, less what their pods ask for. Pure; the objects are the API's JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.diagnose.scheduling import requests
from launcher.layout import Layout
from launcher.plan import count
from launcher.site import NodeType, Offer, quantity


@dataclass(frozen=True)
class Free:
    """What is left of one node, and the GPUs it has in all. Memory is in bytes."""

    cpus: float
    memory: float
    gpus: int
    all_gpus: int


def free_nodes(
    nodes: Iterable[dict[str, Any]], pods: Sequence[dict[str, Any]], kind: NodeType, gpu_resource: str,
    only: Offer | None = None,
) -> list[Free]:  # fmt: skip
    """The ready nodes of a type, as it is offered in any way or in `only` one, less what runs on them."""
    offers = [offer for offer in ((kind.on_demand, kind.spot) if only is None else (only,)) if offer is not None]
    found = []
    for node in nodes:
        if not _ready(node) or not any(_selects(kind, offer, node) for offer in offers):
            continue
        name, has = node["metadata"]["name"], (node.get("status") or {}).get("allocatable") or {}
        here = [requests(pod) for pod in pods if _holds(pod, name)]
        used = {key: sum(pod.get(key, 0.0) for pod in here) for key in ("cpu", "memory", gpu_resource)}
        total = {key: quantity(has.get(key, 0)) for key in used}
        found.append(Free(
            # In whole millicores: sums of fractions would leave 2.9999999999999996 of 3 cores.
            round(total["cpu"] - used["cpu"], 3), total["memory"] - used["memory"],
            round(total[gpu_resource] - used[gpu_resource]), round(total[gpu_resource]),
        ))  # fmt: skip
    return found


def room(free: Iterable[Free], layout: Layout) -> int:
    """How many pods of the layout fit on what is free."""
    fits = 0
    for node in free:
        limits = [int(node.cpus // layout.cpus), int(node.memory // layout.memory)]
        if layout.gpus:
            limits.append(node.gpus // layout.gpus)
        fits += max(0, min(limits))
    return fits


def outlook(free: Sequence[Free] | None, layout: Layout) -> str:
    """One line on when the pods of the layout will find a place; `free` is None where nodes may not be read."""
    kind = layout.node_type
    if free is None:
        return "the nodes may not be read, so it is not known whether it fits now"
    fits = room(free, layout)
    if fits >= layout.pods:
        return f"fits now, on {count(len(free), 'node')} of {kind.name}"
    if len(free) < kind.max_nodes:
        now = f"{fits} of {layout.pods} pods fit now" if fits else "no pod fits now"
        return f"{now}; {kind.name} must scale up (it has {count(len(free), 'node')}, at most {kind.max_nodes})"
    return f"waits for others: {fits} of {layout.pods} pods fit on all {kind.max_nodes} nodes of {kind.name}"


def _ready(node: dict[str, Any]) -> bool:
    if (node.get("spec") or {}).get("unschedulable"):
        return False
    conditions = (node.get("status") or {}).get("conditions") or []
    return any(item.get("type") == "Ready" and item.get("status") == "True" for item in conditions)


def _selects(kind: NodeType, offer: Offer, node: dict[str, Any]) -> bool:
    labels = node["metadata"].get("labels") or {}
    return (kind.node_selector | offer.node_selector).items() <= labels.items()


def _holds(pod: dict[str, Any], node: str) -> bool:
    phase = (pod.get("status") or {}).get("phase")
    return (pod.get("spec") or {}).get("nodeName") == node and phase not in ("Succeeded", "Failed")
