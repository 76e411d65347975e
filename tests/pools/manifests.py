"""Six runs on the example pools as the objects that carry them out, for tests of what is submitted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from launcher.operate import manifest_text
from launcher.plan import Plan
from tests.pools import plan, pool

Object = dict[str, Any]


def _two_cpu_workers() -> Plan:
    return plan(pool("cpu-pool"), resources__workers=2, resources__cpus_per_worker=3)


def _one_gpu_on_demand() -> Plan:
    return plan(pool("gpu-pool"))


def _two_spot_nodes_in_a_queue() -> Plan:
    asked: dict[str, Any] = {"resources__node_type": "h100", "resources__workers": 16, "resources__priority": "high"}
    return plan(pool("gpu-pool"), limits__max_cost=500.0, **asked)


def _priority_without_a_queue() -> Plan:
    return plan(pool("gpu-pool", queue=None), resources__priority="research-high", resources__spot=True)


def _secret_environment() -> Plan:
    return plan(pool("cpu-pool", env_secret="s3-credentials", service_account="trainer", namespace="team-a"))


def _two_trials_of_four_workers() -> Plan:
    asked: dict[str, Any] = {"resources__node_type": "h100", "resources__workers": 4, "limits__max_cost": 200.0}
    return plan(pool("gpu-pool"), sweep__trials=32, sweep__time_limit=2.0, **asked)


CASES = {
    "cpu": _two_cpu_workers,
    "gpu": _one_gpu_on_demand,
    "spot_queue": _two_spot_nodes_in_a_queue,
    "priority": _priority_without_a_queue,
    "secret": _secret_environment,
    "sweep": _two_trials_of_four_workers,
}


@cache
def text(case: str) -> str:
    made = CASES[case]()
    return manifest_text(made, f"{made.spec.storage}/{made.spec.name}")


def objects(case: str) -> tuple[Object, Object]:
    """The ConfigMap and the RayJob, as a cluster would read them."""
    config, job = yaml.safe_load_all(text(case))
    return config, job


def templates(job: Object) -> dict[str, Object]:
    """The pod templates of a RayJob by role."""
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return {
        "submitter": job["spec"]["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        "worker": workers["template"],
    }


def words(value: Any) -> Iterator[str]:
    """Every text within."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from words(item)
    elif isinstance(value, list):
        for item in value:
            yield from words(item)
    else:
        yield str(value)
