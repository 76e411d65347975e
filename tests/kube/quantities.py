"""Kubernetes quantities ("500m", "8Gi"), what pods ask for, and what quotas allow."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from tests.kube.cluster import Cluster
from tests.kube.errors import ApiError
from tests.kube.schema import Object

GPU = "nvidia.com/gpu"

Amounts = dict[str, Fraction]

_UNITS = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5}


def amount(text: object) -> Fraction:
    """The number a quantity stands for."""
    match = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?\d+)?)([a-zA-Z]*)", str(text))
    if match is None:
        raise ApiError(
            422, "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
        )
    number, unit = Fraction(match[1]), match[2]
    return number * 1024 ** _BINARY[unit] if unit in _BINARY else number * Fraction(10) ** _UNITS[unit]


def shown(value: Fraction) -> str:
    """A number as a quantity, good enough for messages."""
    if value.denominator != 1:
        return f"{int(value * 1000)}m"
    for unit, power in reversed(_BINARY.items()):
        if value and value % 1024**power == 0:
            return f"{value // 1024**power}{unit}"
    return str(value)


def requests(pod: Object, kind: str = "requests") -> Amounts:
    """What a pod asks for: the sum over its containers, or the largest init container if that is more."""
    total: Counter[str] = Counter()
    for container in pod["spec"]["containers"]:
        total.update(_container_amounts(container, kind))
    result: Amounts = {name: Fraction(value) for name, value in total.items()}
    for container in pod["spec"].get("initContainers") or []:
        for name, value in _container_amounts(container, kind).items():
            result[name] = max(result.get(name, Fraction(0)), value)
    return result


def _container_amounts(container: Object, kind: str) -> Amounts:
    resources = container.get("resources") or {}
    limits, wanted = resources.get("limits") or {}, resources.get("requests") or {}
    merged = limits if kind == "limits" else {**limits, **wanted}
    return {name: amount(value) for name, value in merged.items()}


def alive(pod: Object) -> bool:
    """Whether a pod still holds its resources."""
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def check_quota(cluster: Cluster, pod: Object) -> None:
    """Refuses a pod that would exceed a ResourceQuota, as admission does."""
    namespace = pod["metadata"]["namespace"]
    for quota in cluster.list("resourcequotas", namespace):
        hard = {name: amount(value) for name, value in (quota["spec"].get("hard") or {}).items()}
        others = [other for other in cluster.list("pods", namespace) if alive(other)]
        used, asked = _usage(others, hard), _usage([pod], hard)
        over = [name for name in sorted(hard) if asked.get(name, 0) and used.get(name, 0) + asked[name] > hard[name]]
        if over:
            parts = [
                f"{label}: " + ",".join(f"{name}={shown(Fraction(values.get(name, 0)))}" for name in over)
                for label, values in (("requested", asked), ("used", used), ("limited", hard))
            ]
            name = pod["metadata"].get("name", "")
            message = f'pods "{name}" is forbidden: exceeded quota: {quota["metadata"]["name"]}, {", ".join(parts)}'
            raise ApiError(403, message, details={"name": name, "kind": "pods"})


def _usage(pods: list[Object], hard: Amounts) -> Amounts:
    usage: Counter[str] = Counter()
    for pod in pods:
        usage["pods"] += 1
        for kind in ("requests", "limits"):
            for name, value in requests(pod, kind).items():
                usage[f"{kind}.{name}"] += value  # type: ignore[assignment]
                if kind == "requests" and name in ("cpu", "memory"):
                    usage[name] += value  # type: ignore[assignment]
    return {name: Fraction(value) for name, value in usage.items() if name in hard}
