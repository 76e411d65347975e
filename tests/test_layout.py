"""Workers become pods that a node holds, all alike; a run costs what it says, and ends by every clock it has."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launcher.errors import UserError
from launcher.layout import Layout, lay_out
from launcher.plan import CLUSTER_FIELDS, Plan, resolve
from launcher.pools import Pool
from launcher.site import NodeType, Offer, Site, quantity, read_site
from launcher.spec import Data, Spec
from tests.pools import FACTS, plan, pool, site

KINDS = st.builds(
    NodeType, name=st.just("kind"), gpus=st.integers(0, 16), cpus=st.floats(0.5, 256).map(lambda cpus: round(cpus, 2)),
    memory=st.integers(1, 2048).map(lambda size: f"{size}Gi"), max_nodes=st.integers(1, 64),
    on_demand=st.builds(Offer, price_per_hour=st.none() | st.floats(0.01, 100)),
)  # fmt: skip
ASKED = st.fixed_dictionaries({
    "resources.workers": st.integers(1, 512), "resources.cpus_per_worker": st.integers(1, 64),
    "resources.gpus_per_worker": st.integers(0, 1), "resources.spot": st.just(False),
    "limits.max_hours": st.floats(0.01, 1_000), "limits.max_cost": st.none() | st.floats(0.01, 10_000),
    "limits.start_minutes": st.floats(0.1, 600), "limits.idle_minutes": st.floats(0.1, 600),
})  # fmt: skip


def make_site(kind: NodeType, head_price: float = 0.0) -> Site:
    return site("cpu-pool", head={"price_per_hour": head_price}).model_copy(update={"node_types": (kind,)})


def make_spec(**asked: Any) -> Spec:
    return Spec(data=Data(uri="s3://data/flowers")).updated(asked)


def why_not(spec: Spec, where: Site, spent: float = 0.0) -> UserError:
    """The refusal, which always says where and what to do instead."""
    with pytest.raises(UserError) as raised:
        lay_out(spec, where, spent)
    assert raised.value.where
    assert raised.value.hint
    return raised.value


@settings(max_examples=300, deadline=None)
@given(kind=KINDS, asked=ASKED, head_price=st.floats(0, 5), spent=st.floats(0, 100))
def test_every_layout_is_whole_even_and_within_its_nodes(
    kind: NodeType, asked: dict[str, Any], head_price: float, spent: float
) -> None:
    spec, where = make_spec(**asked), make_site(kind, head_price)
    refusal, made = None, None
    try:
        made = lay_out(spec, where, spent)
    except UserError as error:
        refusal = error
    if made is None:
        assert refusal is not None
        assert refusal.where
        assert refusal.hint
        return
    workers, cpus = asked["resources.workers"], asked["resources.cpus_per_worker"]
    # The split is even: pods are alike, so it is enough that they add up.
    assert made.pods * made.workers == workers
    assert made.cpus == made.workers * cpus <= kind.cpus
    assert made.gpus == (made.workers if asked["resources.gpus_per_worker"] else 0) <= kind.gpus
    assert 0 < made.memory <= quantity(kind.memory)
    # Pods that share a node fit on it together, and the nodes there can be hold them all.
    together = min(kind.cpus // made.cpus, kind.gpus // made.gpus if made.gpus else math.inf)
    assert made.pods <= kind.max_nodes * together
    share = made.gpus / kind.gpus if made.gpus else made.cpus / kind.cpus
    assert made.memory <= quantity(kind.memory) * share
    assert_price_and_clocks(made, asked, share, head_price, spent)
    assert json.loads(json.dumps(made.to_json()))["workers_per_pod"] == made.workers


def assert_price_and_clocks(made: Layout, asked: dict[str, Any], share: float, head_price: float, spent: float) -> None:
    each = made.offer.price_per_hour
    if each is None:
        assert made.price_per_hour is made.most is None
    else:
        assert made.price_per_hour == pytest.approx(made.pods * share * each + head_price)
    # A clock is rounded to a second, and is never 0, which Kubernetes would take for none.
    assert 1 <= made.max_seconds <= max(1, asked["limits.max_hours"] * 3600 + 0.5)
    assert made.start_seconds == max(1, round(asked["limits.start_minutes"] * 60))
    assert made.idle_seconds == max(1, round(asked["limits.idle_minutes"] * 60))
    cap = asked["limits.max_cost"]
    if cap is not None:
        assert made.most is not None
        assert made.price_per_hour is not None
        assert spent + made.most <= cap + made.price_per_hour / 3600 + 1e-9


@settings(deadline=None)
@given(kind=KINDS, workers=st.integers(1, 512), cpus=st.integers(1, 64))
def test_as_few_pods_as_there_are_nodes_for(kind: NodeType, workers: int, cpus: int) -> None:
    asked = {"resources.workers": workers, "resources.cpus_per_worker": cpus, "resources.gpus_per_worker": 0}
    spec, fits = make_spec(**asked, **{"limits.max_hours": 1.0}), int(kind.cpus // cpus)
    if workers > kind.max_nodes * fits:
        why_not(spec, make_site(kind))
        return
    # What the nodes hold is never refused.
    made = lay_out(spec, make_site(kind))
    sizes = [workers // pods for pods in range(1, made.pods) if workers % pods == 0]
    assert all(size > fits or workers // size > kind.max_nodes * (fits // size) for size in sizes)


@pytest.mark.parametrize(("workers", "pods", "each"), [(8, 1, 8), (16, 2, 8), (12, 2, 6), (11, 11, 1), (30, 15, 2)])
def test_an_odd_number_of_workers_shares_the_nodes(workers: int, pods: int, each: int) -> None:
    """30 workers on 4 nodes of 8 GPUs: 5 pods of 6 would need a fifth node, 15 pods of 2 do not."""
    asked = {**A10G, "resources.node_type": "h100", "resources.spot": True, "resources.workers": workers}
    made = lay_out(make_spec(**asked), site("gpu-pool"))
    assert (made.pods, made.workers, made.gpus) == (pods, each, each)


@pytest.mark.parametrize(
    ("workers", "at_once", "sharing", "pods", "each", "gpus"),
    [
        (4, 4, 1, 2, 8, 8), (4, 3, 1, 3, 4, 4), (3, 2, 1, 1, 6, 6), (1, 8, 4, 1, 8, 2), (1, 7, 4, 1, 8, 2),
        (1, 24, 2, 2, 12, 6), (16, 2, 1, 4, 8, 8), (5, 3, 1, 3, 5, 5),
    ],
)  # fmt: skip
def test_the_trials_of_a_sweep_stay_within_a_pod_where_they_can(
    workers: int, at_once: int, sharing: int, pods: int, each: int, gpus: int
) -> None:
    asked = {**A10G, "resources.node_type": "h100", "resources.spot": True, "resources.workers": workers}
    searched = {"sweep.concurrent": at_once, "sweep.trials_per_gpu": sharing, "sweep.trials": 40}
    made = lay_out(make_spec(**asked, **searched), site("gpu-pool"))
    assert (made.pods, made.workers, made.gpus) == (pods, each, gpus)
    assert made.cpus == each
    assert made.price_per_hour == pytest.approx(24.5 * pods * gpus / 8 + 0.12)


def test_sixteen_workers_fill_two_nodes_of_eight() -> None:
    spec = make_spec(**{
        "resources.node_type": "h100", "resources.spot": True, "resources.workers": 16, "limits.max_hours": 2.0,
        "resources.cpus_per_worker": 23, "resources.gpus_per_worker": 1, "limits.start_minutes": 20.0,
        "limits.idle_minutes": 30.0,
    })  # fmt: skip
    made = lay_out(spec, site("gpu-pool"))
    assert (made.pods, made.workers, made.gpus, made.cpus, made.memory) == (2, 8, 8, 184, 1900 * 2**30)
    assert made.price_per_hour == pytest.approx(2 * 24.5 + 0.12)
    assert (made.max_seconds, made.start_seconds, made.idle_seconds) == (7200, 1200, 1800)
    assert made.most == pytest.approx(98.24)
    assert made.to_json() == {
        "node_type": "h100", "spot": True, "pods": 2, "workers_per_pod": 8, "gpus_per_pod": 8, "cpus_per_pod": 184,
        "memory_per_pod": 1900 * 2**30, "price_per_hour": made.price_per_hour, "currency": "EUR", "max_hours": 2.0,
    }  # fmt: skip


ONE = {"resources.workers": 1, "resources.cpus_per_worker": 1, "limits.max_hours": 10.0}
A10G = {**ONE, "resources.node_type": "a10g", "resources.gpus_per_worker": 1}


@pytest.mark.parametrize(
    ("asked", "spent", "said", "where"),
    [
        (
            {**A10G, "resources.cpus_per_worker": 8}, 0.0,
            "a worker with 8 cores does not fit on a node of a10g, which has 7.5", "resources.cpus_per_worker",
        ),
        (
            {**A10G, "resources.workers": 9}, 0.0,
            "9 workers, but 8 nodes of a10g hold 8", "resources.workers",
        ),
        (
            {**A10G, "resources.node_type": "h100", "resources.spot": True, "resources.workers": 33}, 0.0,
            "33 workers, but 4 nodes of h100 hold 32", "resources.workers",
        ),
        ({**A10G, "limits.max_cost": 5.0}, 5.0, "the run has cost 5.00 of 5.00 already", "limits.max_cost"),
        ({**A10G, "resources.spot": True, "resources.node_type": "a100"}, 0.0, "no node type a100", "--gpu"),
        ({**A10G, "resources.node_type": "h100"}, 0.0, "h100 is not offered on demand", "resources.spot"),
    ],
)  # fmt: skip
def test_what_can_never_be_is_refused_in_numbers(asked: dict[str, Any], spent: float, said: str, where: str) -> None:
    error = why_not(make_spec(**asked), site("gpu-pool"), spent)
    assert said in error.what
    assert error.where == where


def test_a_cap_on_the_cost_needs_a_price() -> None:
    error = why_not(make_spec(**ONE, **{"limits.max_cost": 5.0}), site("cpu-pool"))
    assert error.what == "the pool names no price for these nodes"
    assert "--max-hours" in error.hint


@pytest.mark.parametrize(("spent", "seconds"), [(0.0, 5 * 3600), (2.66, 3 * 3600), (6.6499, 1)])
def test_what_was_spent_shortens_the_next_attempt(spent: float, seconds: int) -> None:
    """1.33 an hour, of 6.65 in all."""
    made = lay_out(make_spec(**A10G, **{"limits.max_cost": 6.65}), site("gpu-pool"), spent)
    assert made.max_seconds == seconds


# -- the plan on a Kubernetes pool


def test_a_run_takes_the_gpus_of_one_node_by_default() -> None:
    one = plan(pool("gpu-pool"))
    assert (one.spec.resources.node_type, one.spec.resources.spot, one.workers) == ("a10g", False, 1)
    assert one.layout is not None
    assert (one.layout.pods, one.layout.gpus, one.layout.cpus) == (1, 1, 7)
    eight = plan(pool("gpu-pool"), resources__node_type="h100")
    assert eight.spec.resources.spot is True, "there is no other offer"
    assert (eight.workers, eight.spec.resources.cpus_per_worker, eight.spec.train.precision) == (8, 23, "bf16")
    assert eight.layout is not None
    assert (eight.layout.pods, eight.layout.gpus) == (1, 8)
    none = plan(pool("cpu-pool"))
    assert (none.workers, none.spec.resources.cpus_per_worker, none.spec.resources.gpus_per_worker) == (1, 4, 0)


def test_the_clocks_are_the_pools_unless_the_user_asks_for_less() -> None:
    usual = plan(pool("gpu-pool")).spec.limits
    assert (usual.max_hours, usual.start_minutes, usual.idle_minutes, usual.max_cost) == (24, 20, 30, None)
    short = plan(pool("gpu-pool"), limits__max_hours=1.5, limits__max_cost=100.0)
    assert short.spec.limits.max_hours == 1.5
    assert short.layout is not None
    assert short.layout.max_seconds == 5400


@pytest.mark.parametrize("clock", ["max_hours", "start_minutes", "idle_minutes"])
def test_a_clock_above_the_pools_is_refused(clock: str) -> None:
    limit = getattr(site("gpu-pool").limits, clock)
    plan(pool("gpu-pool"), **{f"limits__{clock}": limit})
    with pytest.raises(UserError) as raised:
        plan(pool("gpu-pool"), **{f"limits__{clock}": limit + 0.5})
    assert raised.value.what == f"gpu-pool allows {limit:g} at most"
    assert raised.value.where == f"limits.{clock}"


def test_no_run_takes_more_gpus_than_the_pool_allows_one() -> None:
    assert plan(pool("gpu-pool"), resources__node_type="h100", resources__workers=16).workers == 16
    with pytest.raises(UserError) as raised:
        plan(pool("gpu-pool"), resources__node_type="h100", resources__workers=17)
    assert raised.value.what == "17 workers on 17 GPUs, but gpu-pool allows 16 GPUs a run"
    assert raised.value.hint.startswith("--workers 16, or ")


def test_the_default_is_within_what_the_pool_allows_one_run() -> None:
    where = pool("gpu-pool", limits={"max_gpus": 4})
    assert plan(where, resources__node_type="h100", resources__workers=4).workers == 4
    assert plan(where, resources__node_type="h100").workers == 4


def test_no_run_takes_more_gpus_than_there_can_be() -> None:
    with pytest.raises(UserError) as raised:
        plan(pool("gpu-pool"), resources__workers=9)
    assert raised.value.what == "9 workers on 9 GPUs, but gpu-pool has 8 GPUs"
    with pytest.raises(UserError, match="cpu-pool has no GPU"):
        plan(pool("cpu-pool"), resources__gpus_per_worker=1)


OFFERED = {"resources.node_type": "a10g", "resources.spot": False, "resources.priority": "high",
           "limits.max_hours": 1.0, "limits.max_cost": 1.0, "limits.start_minutes": 1.0,
           "limits.idle_minutes": 1.0}  # fmt: skip


@pytest.mark.parametrize("key", CLUSTER_FIELDS)
def test_what_only_a_cluster_has_is_refused_on_this_machine(key: str) -> None:
    spec = make_spec(**{key: OFFERED[key]})
    with pytest.raises(UserError, match="only runs on a cluster have this") as raised:
        on_this_machine(spec)
    assert raised.value.where == key
    assert "--cluster" in raised.value.hint
    assert on_this_machine(make_spec()).layout is None


def on_this_machine(spec: Spec) -> Plan:
    return resolve(
        spec, Pool("local", 8, 2**34), facts=FACTS, given={}, defaults={"name": "run", "storage": "/runs"},
        model_facts=lambda _: {},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["gpu-pool", "cpu-pool"])
def test_the_plan_is_json_and_leaves_nothing_open(name: str) -> None:
    made = plan(pool(name))
    document = json.loads(json.dumps(made.to_json()))
    assert made.layout is not None
    assert document["layout"] == made.layout.to_json()
    assert document["pool"] == name
    assert document["machine"]["nodes"] == made.layout.node_type.max_nodes
    open_fields = [key for key, value in made.spec.flat().items() if value is None]
    assert open_fields == ["data.val_split", "data.classes", "data.cache_gb", "data.pixels_gb", "resources.priority",
                           "limits.max_cost"]  # fmt: skip
    assert made.warnings == ()


@settings(deadline=None)
@given(gpus=st.integers(0, 16), cpus=st.floats(1, 256), nodes=st.integers(1, 20))
def test_a_plan_without_a_wish_fits_every_pool(gpus: int, cpus: float, nodes: int) -> None:
    """Fewer cores than GPUs are the one thing that no default can mend."""
    assume(cpus >= gpus)
    kind = NodeType(name="kind", gpus=gpus, cpus=cpus, memory="64Gi", max_nodes=nodes, spot=Offer())
    made = plan(Pool.of("pool", make_site(kind)))
    assert made.layout is not None
    assert made.layout.pods == 1
    assert made.workers == max(1, gpus)


def test_the_same_plan_follows_from_the_same_words() -> None:
    """What the user sees in a dry run is what is submitted later."""
    again = read_site(json.dumps(site("gpu-pool").model_dump(mode="json")), "again")
    assert plan(Pool.of("gpu-pool", again)) == replace(plan(pool("gpu-pool")))
