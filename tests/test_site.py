"""A pool's description is read strictly: all of its mistakes are told at once, and nothing in it is ever executed."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import SiteError, UserError
from launcher.labels import POOL_LABEL
from launcher.pools import Pool
from launcher.site import Clocks, Head, Offer, Site, Toleration, quantity, read_site, site_from
from tests.pools import config_map, site

LEAST: dict[str, Any] = {
    "image": "raylaunch:0.1.0",
    "ray_version": "2.60.0",
    "storage": "s3://bucket/runs",
    "node_types": [{"name": "standard", "cpus": 4, "memory": "8Gi", "max_nodes": 1, "on_demand": {}}],
}
WHERE = "gpu/default: ConfigMap pool"


def mistakes(document: Any) -> str:
    """What the reader has to say of a description that is wrong."""
    with pytest.raises(SiteError) as raised:
        read_site(document if isinstance(document, str) else yaml.safe_dump(document), WHERE)
    assert raised.value.where == WHERE
    assert raised.value.hint
    return raised.value.what


def with_node(**changes: Any) -> dict[str, Any]:
    return {**LEAST, "node_types": [{**LEAST["node_types"][0], **changes}]}


# -- what is well


@pytest.mark.parametrize("name", ["gpu-pool", "cpu-pool"])
def test_the_example_is_a_config_map_that_says_which_pool_it_is(name: str) -> None:
    document = config_map(name)
    assert document["kind"] == "ConfigMap"
    assert document["metadata"]["labels"] == {POOL_LABEL: name}
    assert list(document["data"]) == ["pool.yaml"]
    assert site(name).image


def test_the_example_with_gpus_says_all_it_means() -> None:
    found = site("gpu-pool")
    a10g, h100 = found.node_types
    assert (a10g.name, a10g.gpus, a10g.cpus, a10g.memory, a10g.max_nodes, a10g.bf16) == ("a10g", 1, 7.5, "28Gi", 8, 1)
    assert a10g.offer(spot=False).price_per_hour == 1.21
    assert a10g.offer(spot=True).tolerations == (
        Toleration(key="example.com/spot", operator="Equal", value="true", effect="NoSchedule"),
    )
    assert (h100.name, h100.gpus, h100.on_demand) == ("h100", 8, None)
    assert [item.effect for item in h100.tolerations] == ["NoSchedule", "NoExecute"]
    assert found.queue == "vision"
    assert found.head == Head(cpus="2", memory="8Gi", price_per_hour=0.12, node_selector={"example.com/pool": "system"})
    assert found.limits == Clocks(max_gpus=16, max_hours=24, start_minutes=20, idle_minutes=30)
    seen = Pool.of("gpu-pool", found)
    assert (seen.cpus, seen.memory, seen.gpus, seen.nodes, seen.bf16) == (7, 28 * 2**30, 1, 8, True)
    assert seen.gpu_type == "NVIDIA A10G"


def test_what_is_left_out_has_a_safe_value() -> None:
    found = site("cpu-pool")
    assert found.service_account == "default"
    assert found.gpu_resource == "nvidia.com/gpu"
    assert found.head == Head()
    assert found.limits == Clocks()
    # A pool without a word about it still ends a run that waits, hangs, or goes on for ever.
    assert found.limits.max_gpus is None
    assert all(
        math.isfinite(clock)
        for clock in (found.limits.max_hours, found.limits.start_minutes, found.limits.idle_minutes)
    )
    assert found.run_as_user > 0
    assert found.queue is found.env_secret is found.context is found.namespace is None
    (standard,) = found.node_types
    assert (standard.gpus, standard.tolerations, standard.spot) == (0, (), None)
    assert standard.on_demand == Offer(price_per_hour=None)


# -- what is wrong


def test_every_mistake_is_told_at_once() -> None:
    told = mistakes({
        "imgae": "typo", "ray_version": "latest", "storage": "/tmp", "run_as_user": 0, "confirm_above": -1,
        "limits": {"max_hours": 0}, "cache_size": "a lot",
        "node_types": [
            {"name": "Big Node", "cpus": "8", "memory": "28GB", "max_nodes": 0, "spot": {"price_per_hour": -1}},
            {"name": "b", "cpus": 1, "memory": "1Gi", "max_nodes": 1},
        ],
    })  # fmt: skip
    places = [
        "image: Field required", "imgae: Extra inputs", "ray_version: ", "storage: ", "run_as_user: ",
        "confirm_above: ", "limits.max_hours: ", "cache_size: 'a lot' is not a quantity such as 28Gi or 500m",
        "node_types.0.name: ", "node_types.0.cpus: ", "node_types.0.memory: '28GB' is not a quantity",
        "node_types.0.max_nodes: ", "node_types.0.spot.price_per_hour: ",
        "node_types.1: needs on_demand, spot, or both",
    ]  # fmt: skip
    lines = told.splitlines()
    assert lines[0] == "mistakes in the description of the pool:"
    assert len(lines) == 1 + len(places)
    assert [place for place in places if not any(line.startswith(f"  {place}") for line in lines)] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"node_types": []}, "node_types: needs one node type or more"),
        ({"node_types": LEAST["node_types"] * 2}, "node_types: standard stands twice"),
        ({"image": ""}, "image: String should have at least 1 character"),
        ({"image": None}, "image: Input should be a valid string"),
        ({"ray_version": 2.6}, "ray_version: Input should be a valid string"),
        ({"storage": "s3://"}, "storage: String should match pattern"),
        ({"env": {"DEBUG": True}}, "env.DEBUG: Input should be a valid string"),
        ({"queue": "Not_a_label"}, "queue: String should match pattern"),
        ({"env_secret": ""}, "env_secret: String should match pattern"),
        ({"limits": {"max_hours": math.nan}}, "limits.max_hours: "),
        ({"limits": {"max_hours": math.inf}}, "limits.max_hours: "),
        ({"limits": {"max_gpus": 0}}, "limits.max_gpus: "),
        ({"head": {"gpus": 1}}, "head.gpus: Extra inputs are not permitted"),
        ({"head": {"cpus": "two"}}, "head.cpus: 'two' is not a quantity"),
        ({"head": {"memory": "0"}}, "head.memory: '0' is nothing"),
    ],
)
def test_a_mistake_names_its_place(changes: dict[str, Any], said: str) -> None:
    assert f"\n  {said}" in mistakes({**LEAST, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": -1}, "node_types.0.gpus: "),
        ({"gpus": True}, "node_types.0.gpus: Input should be a valid integer"),
        ({"cpus": 0}, "node_types.0.cpus: "),
        ({"memory": 1.5}, "node_types.0.memory: Input should be a valid string"),
        ({"memory": "0Gi"}, "node_types.0.memory: '0Gi' is nothing"),
        ({"tolerations": [{"operator": "Sometimes"}]}, "node_types.0.tolerations.0.operator: "),
        ({"tolerations": {"key": "a"}}, "node_types.0.tolerations: Input should be a valid tuple"),
        ({"node_selector": ["a=b"]}, "node_types.0.node_selector: Input should be a valid dictionary"),
        ({"spot": {"price": 1}}, "node_types.0.spot.price: Extra inputs are not permitted"),
        ({"on_demand": None}, "node_types.0: needs on_demand, spot, or both"),
    ],
)
def test_a_mistake_in_a_node_type_names_its_place(changes: dict[str, Any], said: str) -> None:
    assert f"\n  {said}" in mistakes(with_node(**changes))


@pytest.mark.parametrize(
    "text",
    ["", "null", "3", "text", "[]", "- image: x\n- storage: y\n", "image", "2024-01-01", "!!set {a, b}"],
)
def test_what_is_no_mapping_of_fields_is_no_pool(text: str) -> None:
    """An empty text is what a ConfigMap without the key pool.yaml comes to."""
    assert mistakes(text).startswith("mistakes in the description of the pool:\n  ")


@pytest.mark.parametrize(
    "text", ["a: [", "a: b: c", "\tx", "a: *nowhere", "a: 'x", "%", "? [a, b]\n: c\n", "[" * 5_000]
)
def test_what_is_no_yaml_is_said_so_in_one_line(text: str) -> None:
    told = mistakes(text)
    assert told.startswith("the pool is not valid YAML: ")
    assert "\n" not in told


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system", "!anything"]
)
def test_a_tag_is_never_executed(tag: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    assert "not valid YAML" in mistakes(f"image: {tag} ['touch {mark}']\n")
    assert not mark.exists()


# -- names and offers


def test_a_node_type_is_found_by_name_and_an_unknown_one_names_the_nearest() -> None:
    found = site("gpu-pool")
    assert found.node_type(None).name == "a10g"
    assert found.node_type("h100").name == "h100"
    with pytest.raises(UserError) as raised:
        found.node_type("h10")
    assert raised.value.what == "the pool has no node type h10; did you mean h100?"
    assert (raised.value.where, raised.value.hint) == ("--gpu", "it has a10g, h100")
    with pytest.raises(UserError, match=r"the pool has no node type tpu-v5$"):
        found.node_type("tpu-v5")


@pytest.mark.parametrize(
    ("read", "spot", "what", "hint"),
    [
        (lambda: site("gpu-pool").node_type("h100"), False, "h100 is not offered on demand, only spot", "--spot"),
        (lambda: site("cpu-pool").node_type(None), True, "standard is not offered spot, only on demand", "--no-spot"),
    ],
)
def test_an_offer_there_is_not_names_the_one_there_is(
    read: Callable[[], Any], spot: bool, what: str, hint: str
) -> None:
    with pytest.raises(UserError) as raised:
        read().offer(spot)
    assert (raised.value.what, raised.value.where, raised.value.hint) == (what, "resources.spot", hint)
    assert read().offer(not spot)


# -- quantities


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0), ("7", 7), (7, 7), (3.5, 3.5), ("0.5", 0.5), ("500m", 0.5), ("3920m", 3.92), ("1k", 1000),
        ("2M", 2e6), ("3G", 3e9), ("4T", 4e12), ("5P", 5e15), ("6E", 6e18), ("1Ki", 1024), ("28Gi", 28 * 2**30),
        ("1.5Mi", 1.5 * 2**20), ("2Ti", 2 * 2**40), ("1Pi", 2**50), ("1Ei", 2**60), ("16063406080m", 16063406.08),
        ("100u", 1e-4), ("7n", 7e-9), ("129e6", 129e6), ("12E2", 1200), ("1e-3", 0.001),
    ],
)  # fmt: skip
def test_a_quantity_is_the_number_that_kubernetes_takes_it_for(text: str | float, number: float) -> None:
    assert quantity(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "Gi", ".", "1.2.3", "-1", "+1Gi", "1 Gi", "1GB", "1gi", "0x10", "1_000", "١", "nan", "inf", "1Gi\n", "1e"],
)
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity such as 28Gi or 500m"):
        quantity(text)


SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@given(number=st.integers(0, 10**9), suffix=st.sampled_from(sorted(SUFFIXES)))
def test_a_quantity_comes_back_from_its_text(number: int, suffix: str) -> None:
    assert quantity(f"{number}{suffix}") == float(number * SUFFIXES[suffix])
    assert quantity(f"{number}m") == float(Decimal(number) / 1000)


@given(number=st.decimals(0, 10**6, places=3, allow_nan=False))
def test_a_fraction_comes_back_from_its_text(number: Decimal) -> None:
    assert quantity(str(number)) == float(number)


@given(text=st.text(max_size=12))
def test_any_text_is_a_quantity_or_refused(text: str) -> None:
    said = ""
    try:
        assert quantity(text) >= 0
    except ValueError as error:
        said = str(error)
    assert not said or "is not a quantity" in said


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(key=st.sampled_from(sorted(Site.model_fields)), value=VALUES)
def test_any_value_is_taken_or_refused_by_name(key: str, value: Any) -> None:
    said = ""
    try:
        site_from({**LEAST, key: value}, WHERE)
    except SiteError as error:
        said = error.what
    assert not said or f"\n  {key}" in said
