"""What is free is what ready nodes have, less what their living pods ask for; one line says what that means."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.capacity import Free, free_nodes, outlook, room
from launcher.layout import Layout
from launcher.site import NodeType
from tests.pools import plan, pool, site

GPU = "nvidia.com/gpu"
SPOT = {"node.kubernetes.io/instance-type": "p5.48xlarge", "karpenter.sh/capacity-type": "spot"}
H100 = site("gpu-pool").node_type("h100")
EMPTY = Free(cpus=192, memory=2000 * 2**30, gpus=8, all_gpus=8)


def node(name: str = "node-1", labels: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    """A ready h100 node; `changes` replace parts of its status, or `spec`."""
    has = {"cpu": "192", "memory": "2000Gi", GPU: "8", "pods": "110"}
    status = {"allocatable": has, "conditions": [{"type": "Ready", "status": "True"}], **changes}
    made = {"metadata": {"name": name, "labels": SPOT if labels is None else labels}, "spec": {}, "status": status}
    return made | {"spec": status.pop("spec", {})}


def pod(on: str = "node-1", phase: str = "Running", **asks: str) -> dict[str, Any]:
    asked: dict[str, Any] = {"cpu": "1", **{key.replace("gpu", GPU): value for key, value in asks.items()}}
    containers = [{"name": "main", "resources": {"requests": asked}}]
    return {"metadata": {"name": "pod"}, "spec": {"nodeName": on, "containers": containers}, "status": {"phase": phase}}


def free(nodes: list[dict[str, Any]], *pods: dict[str, Any], kind: NodeType = H100) -> list[Free]:
    return free_nodes(nodes, pods, kind, GPU)


def layout(workers: int = 16) -> Layout:
    asked: dict[str, Any] = {
        "resources__node_type": "h100",
        "resources__workers": workers,
        "resources__cpus_per_worker": 1,
    }
    made = plan(pool("gpu-pool"), **asked).layout
    assert made is not None
    return made


# -- nodes


def test_an_empty_node_is_free() -> None:
    assert free([node()]) == [EMPTY]
    assert free([node("node-1"), node("node-2")]) == [EMPTY, EMPTY]
    assert free([]) == []


@pytest.mark.parametrize(
    "unfit",
    [
        node(spec={"unschedulable": True}),
        node(conditions=[{"type": "Ready", "status": "False"}]),
        node(conditions=[{"type": "Ready", "status": "Unknown"}]),
        node(conditions=[{"type": "MemoryPressure", "status": "True"}]),
        node(conditions=None),
        node(labels={}),
        node(labels={**SPOT, "node.kubernetes.io/instance-type": "g5.2xlarge"}),
        node(labels={**SPOT, "karpenter.sh/capacity-type": "on-demand"}),
        node(labels={"node.kubernetes.io/instance-type": "p5.48xlarge"}),
        {"metadata": {"name": "new"}},
        {"metadata": {"name": "new", "labels": SPOT}, "spec": None, "status": None},
    ],
    ids=["cordoned", "not ready", "lost", "ready unsaid", "no conditions", "no labels", "other machine",
         "other offer", "no offer", "bare", "only labels"],
)  # fmt: skip
def test_a_node_that_takes_no_pod_of_the_run_does_not_count(unfit: dict[str, Any]) -> None:
    assert free([unfit, node("node-2")]) == [EMPTY]


def test_a_node_counts_as_what_it_is_offered_as() -> None:
    kind = site("gpu-pool").node_type("a10g")
    machine = {"node.kubernetes.io/instance-type": "g5.2xlarge"}
    offers = [node(str(name), {**machine, "karpenter.sh/capacity-type": name}) for name in ("spot", "on-demand", "odd")]
    assert len(free(offers, kind=kind)) == 2
    # A type without a selector is any node: a pool of one kind need not say which.
    assert len(free(offers, kind=site("cpu-pool").node_type(None))) == 3


# -- pods


@pytest.mark.parametrize(
    ("pods", "left"),
    [
        ([pod(cpu="8", memory="64Gi", gpu="2")], (184, 1936, 6)),
        ([pod(cpu="500m", memory="512Mi")] * 3, (190.5, 1998.5, 8)),
        ([pod(cpu="1500m", gpu="1"), pod(cpu="100m", gpu="7")], (190.4, 2000, 0)),
        ([pod(phase="Succeeded", gpu="8"), pod(phase="Failed", gpu="8")], (192, 2000, 8)),
        ([pod(phase="Pending", gpu="8")], (191, 2000, 0)),
        ([pod(on="node-2", gpu="8"), pod(on="", gpu="8")], (192, 2000, 8)),
        ([{"metadata": {"name": "bare"}}, {"spec": {"nodeName": "node-1"}}], (192, 2000, 8)),
        # A device plugin that lost a GPU: what runs is more than what there is.
        ([pod(gpu="8"), pod(gpu="1")], (190, 2000, -1)),
    ],
    ids=["one", "small", "full", "ended", "starting", "elsewhere", "bare", "too many"],
)
def test_pods_that_live_on_a_node_take_from_it(pods: list[dict[str, Any]], left: tuple[float, float, int]) -> None:
    cpus, memory, gpus = left
    assert free([node()], *pods) == [Free(cpus, memory * 2**30, gpus, 8)]


def test_a_limit_counts_where_there_is_no_request_and_the_largest_init_container_counts() -> None:
    busy = pod(cpu="2")
    busy["spec"]["containers"][0]["resources"]["limits"] = {GPU: "4", "cpu": "64"}
    busy["spec"]["initContainers"] = [{"name": "wait", "resources": {"requests": {"cpu": "6"}}}]
    assert free([node()], busy) == [Free(186, 2000 * 2**30, 4, 8)]


@pytest.mark.parametrize(
    ("allocatable", "left"),
    [
        (None, Free(0, 0, 0, 0)),
        ({}, Free(0, 0, 0, 0)),
        ({"cpu": "3920m", "memory": "16063406080m"}, Free(3.92, 16063406.08, 0, 0)),
        ({"cpu": 4, "memory": "32780268Ki", GPU: "1"}, Free(4, 32780268 * 1024, 1, 1)),
        ({"cpu": "4", "memory": "129e6", "smarter-devices/fuse": "20"}, Free(4, 129e6, 0, 0)),
    ],
    ids=["none", "empty", "milli", "kibi", "exponent"],
)
def test_a_node_says_what_it_has_in_any_notation(allocatable: Any, left: Free) -> None:
    """A node whose device plugin is not up yet has no GPUs: it counts, and has none."""
    assert free([node(allocatable=allocatable)]) == [left]


@given(shares=st.lists(st.integers(1, 100), max_size=20))
def test_fractions_of_a_core_add_up(shares: list[int]) -> None:
    """3.3 cores less three times 0.1 are 3 cores, and a pod of 3 cores fits."""
    spare = sum(shares) / 10 + 3
    pods = [pod(cpu=f"{share * 100}m") for share in shares]
    found = free([node(allocatable={"cpu": f"{spare * 1000:.0f}m", "memory": "64Gi"})], *pods)
    assert found[0].cpus == 3


# -- room


@pytest.mark.parametrize(
    ("nodes", "workers", "pods"),
    [
        ([], 16, 0),
        ([EMPTY], 16, 1),
        ([EMPTY, EMPTY, EMPTY], 16, 3),
        ([Free(192, 2000 * 2**30, 7, 8)], 16, 0),
        ([Free(7.9, 2000 * 2**30, 8, 8)], 16, 0),
        ([Free(192, 1899 * 2**30, 8, 8)], 16, 0),
        # Pods of one GPU: several share a node.
        ([EMPTY], 11, 8),
        ([Free(3.5, 2000 * 2**30, 8, 8)], 11, 3),
        ([Free(192, 500 * 2**30, 8, 8)], 11, 2),
        ([Free(-1, -1, -1, 8), EMPTY], 16, 1),
    ],
)
def test_room_is_how_many_pods_fit(nodes: list[Free], workers: int, pods: int) -> None:
    assert room(nodes, layout(workers)) == pods


def test_pods_without_gpus_leave_gpus_aside() -> None:
    made = plan(pool("cpu-pool")).layout
    assert made is not None
    assert room([Free(8, 64 * 2**30, 0, 0), Free(3.9, 64 * 2**30, 0, 0)], made) == 2


# -- outlook


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (None, "the nodes may not be read, so it is not known whether it fits now"),
        ([EMPTY] * 2, "fits now, on 2 nodes of h100"),
        ([EMPTY] * 4, "fits now, on 4 nodes of h100"),
        ([], "no pod fits now; h100 must scale up (it has no node, at most 4)"),
        ([Free(0, 0, 0, 8)], "no pod fits now; h100 must scale up (it has 1 node, at most 4)"),
        ([EMPTY, Free(0, 0, 0, 8)], "1 of 2 pods fit now; h100 must scale up (it has 2 nodes, at most 4)"),
        ([EMPTY] + [Free(0, 0, 0, 8)] * 3, "waits for others: 1 of 2 pods fit on all 4 nodes of h100"),
        ([Free(0, 0, 0, 8)] * 5, "waits for others: 0 of 2 pods fit on all 4 nodes of h100"),
    ],
)
def test_one_line_says_when_the_pods_find_a_place(nodes: list[Free] | None, said: str) -> None:
    assert outlook(nodes, layout()) == said
