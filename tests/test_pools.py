"""Pools are found where they are described, one that is described badly hides no other, and what is free is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from launcher.cli import main
from launcher.errors import LaunchError, NotFoundError, SiteError, UserError
from launcher.pools import Place, Pool, cluster_pools, find_pool
from tests.contract.grounds import until
from tests.kube.site import NAMESPACE, POOL, Site, description
from tests.scripted import failure

STORAGE = "s3://bucket/runs"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pool of whoever runs the tests."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig.yaml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("RAYLAUNCH_STORAGE", str(tmp_path / "here"))
    monkeypatch.delenv("RAYLAUNCH_CLUSTER", raising=False)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Site(tmp_path, STORAGE, speed=60.0) as made:
        yield made


def launch(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception}"
    assert "Traceback" not in result.stderr
    return result


def rows(*words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(launch("pools", *words, "-o", "json").stdout)
    return found


def pool_file(folder: Path, text: str = "", **pools: Any) -> Path:
    path = folder / "pools.yaml"
    path.write_text(yaml.safe_dump(pools) if pools else text)
    return path


def of_namespace(site: Site, namespace: str, name: str, **changes: Any) -> None:
    site.api.add_namespace(namespace)
    site.api.create("configmaps", {
        "metadata": {"name": name, "namespace": namespace, "labels": {"raylaunch.dev/pool": name}},
        "data": {"pool.yaml": yaml.safe_dump(description(STORAGE) | changes)},
    })  # fmt: skip


def image(pool: Pool) -> str:
    assert pool.site is not None
    return pool.site.image


# -- in the cluster


def test_a_pool_is_found_in_the_namespace_of_the_context(site: Site) -> None:
    pool = find_pool(POOL)
    assert pool.site is not None
    assert (pool.name, pool.site.context, pool.site.namespace, pool.site.storage) == (POOL, "fake", NAMESPACE, STORAGE)
    of_namespace(site, "other", "far-pool")
    assert [name for name, _ in cluster_pools()] == [POOL], "who has pools sees these"
    assert [name for name, _ in cluster_pools(Place(namespace="other"))] == ["far-pool"]


def test_where_there_is_none_other_namespaces_are_looked_at_if_that_is_allowed(site: Site) -> None:
    site.api.delete("configmaps", NAMESPACE, POOL)
    of_namespace(site, "other", "far-pool")
    pool = find_pool("far-pool")
    assert pool.site is not None
    assert pool.site.namespace == "other"
    asked = [request.path for request in site.api.requests]
    assert asked == ["/api/v1/namespaces/ml/configmaps", "/api/v1/configmaps"]
    error = failure(lambda: find_pool("far-pool", Place(namespace=NAMESPACE)), NotFoundError)
    assert "--namespace" in error.hint


def test_of_two_pools_of_one_name_none_is_taken_by_chance(site: Site) -> None:
    site.api.delete("configmaps", NAMESPACE, POOL)
    of_namespace(site, "one", "twin")
    of_namespace(site, "two", "twin", image="other")
    with pytest.raises(UserError, match="more than one ConfigMap describes it") as raised:
        find_pool("twin")
    assert "one, two" in raised.value.hint
    assert image(find_pool("twin", Place(namespace="two"))) == "other"


def test_where_other_namespaces_are_forbidden_there_are_none(site: Site) -> None:
    site.api.delete("configmaps", NAMESPACE, POOL)
    site.api.fail_next(9, 403, "list /api/v1/configmaps")
    error = failure(lambda: find_pool(POOL), NotFoundError)
    assert error.hint == "the pools are: local; --context and --namespace look elsewhere"
    assert [row["pool"] for row in rows()] == ["local"]


def test_where_even_ones_own_namespace_is_forbidden_that_is_said(site: Site) -> None:
    site.api.denied.add(("list", "configmaps"))
    assert "cannot list resource" in failure(lambda: find_pool(POOL)).what
    local, trouble = rows()
    assert local["pool"] == "local"
    assert "cannot list resource" in trouble["trouble"]
    assert "launch doctor" in trouble["trouble"]


def test_an_unknown_pool_names_the_nearest_and_all_there_are(site: Site) -> None:
    site.describe("cpu-pool", description(STORAGE))
    error = failure(lambda: find_pool("gpu-poll"), NotFoundError)
    assert str(error) == "--cluster: there is no pool gpu-poll; did you mean gpu-pool?"
    assert error.hint == "the pools are: local, cpu-pool, gpu-pool; --context and --namespace look elsewhere"


def test_the_config_map_of_a_run_is_no_pool(site: Site) -> None:
    labels = {"raylaunch.dev/pool": "ghost", "raylaunch.dev/run": "first"}
    site.api.create("configmaps", {"metadata": {"name": "first-1", "namespace": NAMESPACE, "labels": labels}})
    assert [name for name, _ in cluster_pools()] == [POOL]


def test_a_description_that_is_broken_tells_all_its_mistakes_to_whoever_wants_it(site: Site) -> None:
    site.describe("broken", description("/on/a/laptop", image="", ray_version="2", nodes=1))
    site.api.create("configmaps", {"metadata": {"name": "empty", "namespace": NAMESPACE,
                                                "labels": {"raylaunch.dev/pool": "empty"}}})  # fmt: skip
    with pytest.raises(SiteError) as caught:
        find_pool("broken")
    assert caught.value.where == "fake/ml: ConfigMap broken"
    for key in ("storage: ", "image: ", "ray_version: ", "nodes: "):
        assert f"\n  {key}" in caught.value.what
    result = launch("--cluster", "broken", "--data", "sample://digits", code=100)
    assert "nodes: " in result.stderr
    with pytest.raises(SiteError, match="mistakes in the description"):
        find_pool("empty")
    assert find_pool(POOL).name == POOL


# -- in a file


def test_a_file_wins_over_the_cluster_and_adds_to_it(site: Site, tmp_path: Path) -> None:
    (tmp_path / "config" / "raylaunch").mkdir(parents=True)
    ours = description(STORAGE) | {"image": "mine:1.0"}
    pool_file(
        tmp_path / "config" / "raylaunch", text=yaml.safe_dump({POOL: ours, "more": ours | {"namespace": "other"}})
    )
    before = len(site.api.requests)
    assert image(find_pool(POOL)) == "mine:1.0"
    assert len(site.api.requests) == before, "for these nobody is asked"
    found = dict(cluster_pools())
    assert list(found) == [POOL, "more"]
    assert isinstance(found["more"], Pool)
    assert found["more"].site is not None
    assert found["more"].site.namespace == "other"
    named = pool_file(tmp_path, third=ours)
    assert list(dict(cluster_pools(Place(pool_file=named)))) == [POOL, "third"], "a named file stands for the usual"
    pool = find_pool("third", Place("here", "there", named))
    assert pool.site is not None
    assert (pool.site.context, pool.site.namespace) == ("here", "there")


def test_a_file_stands_in_where_no_cluster_describes_a_pool_or_answers(site: Site, tmp_path: Path) -> None:
    site.api.delete("configmaps", NAMESPACE, POOL)
    path = str(pool_file(tmp_path, mine=description(STORAGE)))
    found = rows("--pool-file", path)
    assert [(row["pool"], row["free"]) for row in found] == [("local", found[0]["free"]), ("mine", 0), ("mine", 16)]
    site.api.stop()
    found = rows("--pool-file", path)
    assert [(row["pool"], row.get("free")) for row in found[1:]] == [("mine", None), ("mine", None), ("", None)]
    assert all("does not answer" in row["trouble"] for row in found[1:])
    (tmp_path / "kubeconfig.yaml").unlink()
    assert [row["pool"] for row in rows("--pool-file", path)] == ["local", "mine", "mine", ""]


@pytest.mark.usefixtures("site")
def test_one_pool_that_leads_nowhere_does_not_hide_the_next(tmp_path: Path) -> None:
    lost = description(STORAGE) | {"context": "nowhere"}
    found = rows("--pool-file", str(pool_file(tmp_path, astray=lost)))
    assert [row["pool"] for row in found] == ["local", "astray", "astray", POOL, POOL]
    assert "no context nowhere" in found[1]["trouble"]
    assert found[-1]["trouble"] == ""
    shown = launch("pools", "--pool-file", str(tmp_path / "pools.yaml")).stdout
    assert "16 of 16" in shown
    assert "no context nowhere" in shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "a mapping from names to pools"),
        ("", "a mapping from names to pools"),
        ("A B: {}", "cannot be the name of a pool"),
        (None, "cannot be read: No such file"),
    ],
)
@pytest.mark.usefixtures("site")
def test_a_file_that_is_none_is_the_users(text: str | None, says: str, tmp_path: Path) -> None:
    path = pool_file(tmp_path, text) if text is not None else tmp_path / "not there"
    error = failure(lambda: find_pool(POOL, Place(pool_file=path)), UserError)
    assert says in error.what
    assert error.where == str(path)
    local, trouble = rows("--pool-file", str(path))
    assert local["pool"] == "local"
    assert says in trouble["trouble"]


@pytest.mark.usefixtures("site")
def test_a_mistake_in_the_file_names_file_and_pool(tmp_path: Path) -> None:
    path = pool_file(tmp_path, broken={"image": "x"})
    with pytest.raises(SiteError) as caught:
        find_pool("broken", Place(pool_file=path))
    assert caught.value.where == f"{path}: broken"
    assert "node_types: Field required" in caught.value.what
    assert {name: isinstance(found, LaunchError) for name, found in cluster_pools(Place(pool_file=path))} == {
        "broken": True, POOL: False,
    }  # fmt: skip


# -- what is shown


def test_one_broken_description_does_not_hide_the_others(site: Site) -> None:
    site.describe("a-broken", description(STORAGE, nodes=1))
    site.describe("z-broken", description(STORAGE, image=""))
    found = rows()
    assert [row["pool"] for row in found] == ["local", "a-broken", POOL, POOL, "z-broken"]
    assert "nodes: Extra inputs are not permitted" in found[1]["trouble"]
    shown = launch("pools").stdout
    for says in ("a-broken: ", "nodes: Extra inputs", "z-broken: ", "16 of 16"):
        assert says in shown


def test_free_gpus_and_nodes_are_shown_as_they_are_now(site: Site) -> None:
    gpu = {"name": POOL, "namespace": "default"}
    for number in range(3):
        asks = {"nvidia.com/gpu": "2", "cpu": "1"}
        container = {"name": "c", "image": "x", "resources": {"requests": asks, "limits": asks}}
        tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
        site.api.create("pods", {"metadata": {**gpu, "name": f"p{number}"},
                                 "spec": {"containers": [container], "tolerations": tolerations}})  # fmt: skip
    until(lambda: all((pod.get("status") or {}).get("phase") == "Running" for pod in site.api.list("pods")), 20)
    site.api.patch("nodes", None, "a10g-3", {"spec": {"unschedulable": True}})
    _, cpu, a10g = rows()
    assert cpu | {"gpus": 0, "free": 0, "nodes": 4, "gpu": "", "where": "fake/ml"} == cpu
    assert a10g | {"gpus": 16, "free": 6, "nodes": 3, "max_nodes": 4, "gpu": "NVIDIA A10G", "price_per_hour": 1.0,
                   "spot_price": 0.4, "trouble": ""} == a10g  # fmt: skip
    line = next(line for line in launch("pools").stdout.splitlines() if "a10g" in line)
    for cell in ("gpu-pool", "a10g (NVIDIA A10G)", "3 of 4", "6 of 16", "1.00", "0.40", "fake/ml"):
        assert cell in line
    for pod in site.api.list("pods"):
        site.api.update_status("pods", "default", pod["metadata"]["name"], {"phase": "Succeeded"})
    assert rows()[2]["free"] == 12


@pytest.mark.parametrize("denied", [("list", "nodes"), ("list", "pods")])
def test_what_may_not_be_seen_is_a_question_mark(site: Site, denied: tuple[str, str]) -> None:
    site.api.denied.add(denied)
    _, _, a10g = rows()
    assert (a10g["free"], a10g["nodes"]) == (None, None)
    assert f'cannot list resource "{denied[1]}"' in a10g["trouble"]
    shown = launch("pools").stdout
    assert "? of 4" in shown
    assert "? of 16" in shown


def test_without_any_cluster_this_machine_is_shown_and_what_to_do_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    shown = launch("pools").stdout
    assert "this machine" in shown
    assert "there is no usable kubeconfig" in shown
    assert "aws eks update-kubeconfig" in shown
