"""What Terraform says of the pool is what the launcher reads, and the nodes that come are those that runs ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from launcher.cli import main
from launcher.operate import manifest_text
from launcher.pools import Place, Pool, find_pool
from tests.kube.cluster import Cluster
from tests.kube.scheduler import schedule
from tests.kube.site import Site
from tests.pools import plan as plan_of_a_run
from tests.pools.manifests import templates
from tests.terraforming.policy import Object, of, resources

HINT = "k8s.io/cluster-autoscaler/node-template/"


def outputs(plan: Object) -> dict[str, Any]:
    """What the next step takes, by name; all of it is known before anything is built."""
    found = plan["planned_values"]["outputs"]
    return {name: found[name]["value"] for name in ("overlay", "pool_config", "site")}


@pytest.fixture
def found(tmp_path: Path, plan: Object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """The pool that the launcher finds on an emulated cluster, where the ConfigMap of the output is as it came."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("RAYLAUNCH_CLUSTER", raising=False)
    with Site(tmp_path, "s3://bucket/runs") as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        config, _ = yaml.safe_load_all(outputs(plan)["overlay"])
        made.api.add_namespace(config["metadata"]["namespace"])
        made.api.create("configmaps", config)
        yield find_pool(config["metadata"]["name"], Place(namespace=config["metadata"]["namespace"]))


def test_the_launcher_finds_the_pool_in_the_config_map_as_it_came(found: Pool) -> None:
    assert (found.name, found.gpu_type, found.bf16, found.gpus) == ("gpu-pool", "NVIDIA A10G", True, 1)
    assert (found.cpus, found.memory, found.nodes) == (7, 28 << 30, 4)
    assert found.site is not None
    assert found.site.storage == "s3://gpu-pool-runs-123456789012/runs"


def test_launch_pools_lists_it(found: Pool) -> None:
    result = CliRunner().invoke(main, ["pools", "--namespace", "raylaunch", "-o", "json"])
    assert result.exit_code == 0, result.stderr
    (row,) = [row for row in json.loads(result.stdout) if row["pool"] == found.name]
    asked = ("node_type", "gpus", "max_nodes", "price_per_hour", "spot_price")
    assert [row[key] for key in asked] == ["a10g", 4, 4, 1.21, 0.55]


def test_the_next_step_needs_one_file_and_no_value_by_hand(plan: Object) -> None:
    config, values = yaml.safe_load_all(outputs(plan)["overlay"])
    assert config["data"]["pool.yaml"] == outputs(plan)["pool_config"]
    assert values["data"] == outputs(plan)["site"]
    assert all(isinstance(each, str) and each for each in values["data"].values()), "kustomize fills in texts"
    pool = yaml.safe_load(outputs(plan)["pool_config"])
    assert (pool["service_account"], pool["queue"]) == (values["data"]["SERVICE_ACCOUNT"], values["data"]["QUEUE"])


def future_nodes(plan: Object) -> Iterator[tuple[str, Object]]:
    """A node of every group as the autoscaler imagines it while there is none: from the tags of its group alone.

    Cores and memory are the launcher's, which are less than the machine's.
    """
    kinds = {each["name"]: each for each in yaml.safe_load(outputs(plan)["pool_config"])["node_types"]}
    hints: dict[str, dict[str, str]] = {}
    for address, values in of(resources(plan), "aws_autoscaling_group_tag"):
        (tag,) = values["tag"]
        hints.setdefault(address.rpartition(".aws_")[0], {})[tag["key"].removeprefix(HINT)] = tag["value"]
    for address, group in of(resources(plan), "aws_eks_node_group"):
        said = hints.get(address.rpartition(".aws_")[0], {})

        def part(name: str, said: dict[str, str] = said) -> dict[str, str]:
            return {key.removeprefix(f"{name}/"): value for key, value in said.items() if key.startswith(f"{name}/")}

        kind = kinds.get(part("label").get("raylaunch.dev/nodes", ""), {"cpus": 3, "memory": "14Gi"})
        taints = [
            {"key": key, "value": value.partition(":")[0], "effect": value.partition(":")[2]}
            for key, value in part("taint").items()
        ]
        assert {(each["key"], each["value"]) for each in group["taint"]} == {(it["key"], it["value"]) for it in taints}
        assert said == {} or group["labels"] == part("label"), "nodes are what was said of them"
        has = {"cpu": str(kind["cpus"]), "memory": kind["memory"], "pods": "50", **part("resources")}
        yield group["node_group_name"], {
            "metadata": {"name": group["node_group_name"], "labels": part("label") or group["labels"]},
            "spec": {"taints": taints}, "status": {"capacity": has, "allocatable": has},
        }  # fmt: skip


@pytest.mark.parametrize(("spot", "groups"), [(False, "a10g-on-demand-us-east-1"), (True, "a10g-spot-us-east-1")])
def test_every_pod_of_a_run_fits_the_nodes_that_are_for_it_and_no_others(
    found: Pool, plan: Object, spot: bool, groups: str
) -> None:
    made = plan_of_a_run(found, resources__spot=spot)
    _, job = yaml.safe_load_all(manifest_text(made, f"{made.spec.storage}/{made.spec.name}"))
    fits = {
        role: {name for name, node in future_nodes(plan) if _fits(template, node)}
        for role, template in templates(job).items()
    }
    assert {name[:-1] for name in fits["worker"]} == {groups}, "one zone is as good as another"
    assert fits["head"] == {"head"}
    assert fits["submitter"] <= {"head", "system"}, "never on a node with GPUs"
    assert fits["submitter"]


def _fits(template: Object, node: Object) -> bool:
    cluster = Cluster()
    cluster.add_namespace("raylaunch")
    cluster.create("nodes", node)
    pod = {"metadata": {"name": "pod", "namespace": "raylaunch"}, "spec": template["spec"]}
    return schedule(cluster, cluster.create("pods", pod))
