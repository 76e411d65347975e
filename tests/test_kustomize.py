"""What `kubectl apply -k` sends, byte for byte: valid, complete, and with every value from where it is known.

The golden files are the overlays as they are rendered. After a change that is meant, `RAYLAUNCH_GOLDEN=write pytest
tests/test_kustomize.py` writes them anew; the diff in git is then what has to be looked at.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from click.testing import CliRunner

from launcher.cli import main
from launcher.labels import POOL_LABEL, QUEUE_LABEL
from launcher.operate import manifest_text
from launcher.pools import Place, Pool, find_pool
from launcher.site import quantity
from tests.kube.apiserver import ApiServer
from tests.kube.schema import CRD_FOLDER, validator
from tests.kube.selection import labels_match
from tests.pools import manifests, plan
from tests.rendered import K8S, LOADER, OVERLAYS, ROOT, SITE, Object, kustomize, objects, one, templates, text

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
KUEUE = "kueue.x-k8s.io"


# -- what it is, and what a cluster makes of it


@every_overlay
def test_the_overlay_is_the_golden_text(overlay: str) -> None:
    golden, now = SITE.with_name(f"k8s_{overlay}.yaml"), text(overlay)
    if os.environ.get("RAYLAUNCH_GOLDEN") == "write":
        golden.write_text(now)
    wanted = golden.read_text() if golden.exists() else ""
    difference = difflib.unified_diff(wanted.splitlines(), now.splitlines(), golden.name, "now", lineterm="")
    assert now == wanted, "\n".join(["", *difference])


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in SITE.parent.glob("k8s_*")} == {f"k8s_{name}.yaml" for name in [*OVERLAYS, "site"]}


@pytest.mark.parametrize("version", ["1.35", "1.37"])
@every_overlay
def test_every_object_is_valid_for_kubernetes(overlay: str, version: str) -> None:
    for item in objects(overlay):
        if not item["apiVersion"].startswith(KUEUE):
            kubernetes_validate.validate(item, version, strict=True)


def test_every_object_of_the_queue_is_valid_for_kueue() -> None:
    found = [item for item in objects("eks") if item["apiVersion"].startswith(KUEUE)]
    assert {item["kind"] for item in found} == {"ResourceFlavor", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass"}
    for item in found:
        plural = item["kind"].lower().replace("class", "classe") + "s"
        checker = validator(KUEUE, item["apiVersion"].partition("/")[2], plural)
        if checker is None:
            pytest.skip(f"Kueue's definitions are not at {CRD_FOLDER}")
        assert checker.errors(item) == []
        assert checker.errors({**item, "spek": {}}) == ['unknown field "spek"']


@every_overlay
def test_every_object_is_named_once_and_stands_in_a_namespace_that_is_there(overlay: str) -> None:
    found = objects(overlay)
    names = [(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in found]
    assert len(names) == len(set(names))
    made = {item["metadata"]["name"] for item in found if item["kind"] == "Namespace"}
    assert {namespace for _, namespace, _ in names if namespace} <= made | {"kube-system"}


# -- where values come from


def test_no_value_of_a_site_is_written_into_the_files() -> None:
    _, site = yaml.safe_load_all(SITE.read_text())
    own = {name: value for name, value in site["data"].items() if name not in ("NAMESPACE", "SERVICE_ACCOUNT")}
    assert own.pop("LAUNCHER_GROUP") in (K8S / "base" / "launcher-bindings.yaml").read_text(), "without Terraform"
    del own["MAX_GPUS"], own["MAX_HEADS"]  # any figure stands somewhere
    written = "\n".join(path.read_text() for path in K8S.rglob("*.yaml") if path.name != "site.yaml")
    assert [value for value in own.values() if re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", written)] == []


def test_other_values_of_a_site_reach_every_place_that_they_are_for() -> None:
    config, site = yaml.safe_load_all(SITE.read_text())
    changed = {"CLUSTER_NAME": "other", "AWS_REGION": "eu-north-1", "QUEUE": "team-a", "MAX_GPUS": "777",
               "LAUNCHER_GROUP": "people"}  # fmt: skip
    assert changed.keys() <= site["data"].keys()
    found = objects("eks", yaml.safe_dump_all([config, {**site, "data": site["data"] | changed}]))
    scaler = one(found, "Deployment", "cluster-autoscaler")["spec"]["template"]["spec"]["containers"][0]
    assert scaler["env"] == [{"name": "CLUSTER_NAME", "value": "other"}, {"name": "AWS_REGION", "value": "eu-north-1"}]
    assert sum("$(CLUSTER_NAME)" in word for word in scaler["command"]) == 1
    assert one(found, "ResourceQuota", "gpus")["spec"]["hard"] == {"requests.nvidia.com/gpu": "777"}
    assert _quota(found)["nvidia.com/gpu"] == "777"
    assert one(found, "LocalQueue", "team-a")
    for kind, name in (("RoleBinding", "raylaunch"), ("ClusterRoleBinding", "raylaunch-viewer")):
        assert [subject["name"] for subject in one(found, kind, name)["subjects"]] == ["people"]
    assert not [item for item in found if item["metadata"]["name"] == "site"], "only kustomize reads it"


def test_what_terraform_and_kustomize_both_name_is_named_alike() -> None:
    _, site = yaml.safe_load_all(SITE.read_text())
    found = objects("eks")
    accounts = {(item["metadata"]["namespace"], item["metadata"]["name"]) for item in found
                if item["kind"] == "ServiceAccount"}  # fmt: skip
    assert (site["data"]["NAMESPACE"], site["data"]["SERVICE_ACCOUNT"]) in accounts
    terraform = "\n".join(path.read_text() for path in (ROOT / "terraform").rglob("*.tf"))
    assert ("kube-system", "cluster-autoscaler") in accounts
    assert re.search(
        r'autoscaler\s*= \{ namespace = "kube-system", service_account = "cluster-autoscaler" \}', terraform
    )
    variables = (ROOT / "terraform" / "aws" / "variables.tf").read_text()
    (minor,) = re.findall(r'variable "kubernetes_version" \{[^}]*?default\s*= "([\d.]+)"', variables)
    scaler = one(found, "Deployment", "cluster-autoscaler")["spec"]["template"]["spec"]["containers"][0]
    assert f"/cluster-autoscaler:v{minor}." in scaler["image"]
    for _, template in templates(found):
        for label, value in template["spec"].get("nodeSelector", {}).items():
            assert re.search(rf'"{re.escape(label)}"\s*= "{re.escape(value)}"', terraform), label
        for item in template["spec"].get("tolerations", []):
            assert re.search(rf'taints\s*= \{{ "{re.escape(item["key"])}"', terraform), item


# -- what runs find there


@pytest.fixture
def eks(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """The pool that the overlay of Terraform's outputs describes, as the launcher finds it in a cluster."""
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path, namespace="raylaunch")))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("RAYLAUNCH_STORAGE", str(tmp_path))
    api.add_namespace("raylaunch")
    for item in objects("eks"):
        if item["kind"] == "ConfigMap":
            api.create("configmaps", item)
    return find_pool("gpu-pool", Place())


def test_the_pool_that_terraform_describes_is_loaded_unchanged(eks: Pool) -> None:
    config, _ = yaml.safe_load_all(SITE.read_text())
    rendered = one(objects("eks"), "ConfigMap", "gpu-pool")
    assert rendered["data"] == config["data"]
    assert rendered["metadata"]["labels"][POOL_LABEL] == "gpu-pool"
    assert eks.site is not None
    assert [kind.name for kind in eks.site.node_types] == ["a10g"]
    shown = CliRunner().invoke(main, ["pools", "-o", "json"])
    assert shown.exit_code == 0, shown.stderr
    assert "gpu-pool" in [entry["pool"] for entry in json.loads(shown.stdout)]


def test_the_pool_for_a_laptop_is_loaded_too(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path, namespace="raylaunch")))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    api.add_namespace("raylaunch")
    api.create("configmaps", one(objects("kind"), "ConfigMap", "cpu-pool"))
    pool = find_pool("cpu-pool", Place())
    assert (pool.gpus, pool.cpus) == (0, 2)


def _run(pool: Pool) -> tuple[Object, dict[str, Object]]:
    """A RayJob of two workers there, and its pod templates by role."""
    made = plan(pool, resources__workers=2, resources__priority="training-high")
    _, job = yaml.safe_load_all(manifest_text(made, f"{made.spec.storage}/{made.spec.name}"))
    return job, manifests.templates(job)


def test_what_a_run_names_is_there(eks: Pool) -> None:
    job, pods = _run(eks)
    found = objects("eks")
    assert one(found, "LocalQueue", job["metadata"]["labels"][QUEUE_LABEL])
    assert one(found, "WorkloadPriorityClass", job["metadata"]["labels"][f"{KUEUE}/priority-class"])
    assert one(found, "PriorityClass", "training-high"), "for pools without Kueue"
    for template in pods.values():
        assert one(found, "ServiceAccount", template["spec"]["serviceAccountName"])


def test_priorities_mean_the_same_with_kueue_and_without() -> None:
    values = {kind: {item["metadata"]["name"]: item["value"] for item in objects("eks") if item["kind"] == kind}
              for kind in ("PriorityClass", "WorkloadPriorityClass")}  # fmt: skip
    assert values["PriorityClass"] == values["WorkloadPriorityClass"] != {}


def _quota(found: list[Object]) -> dict[str, str]:
    (group,) = one(found, "ClusterQueue", "raylaunch")["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert group["coveredResources"] == [entry["name"] for entry in flavor["resources"]]
    return {entry["name"]: entry["nominalQuota"] for entry in flavor["resources"]}


def test_the_queue_covers_all_that_pods_ask_for(eks: Pool) -> None:
    """Kueue refuses a workload that asks for anything else."""
    quota = {name: quantity(amount) for name, amount in _quota(objects("eks")).items()}
    assert eks.site is not None
    wanted = sum(kind.gpus * kind.max_nodes for kind in eks.site.node_types)
    assert quota["nvidia.com/gpu"] == wanted
    for template in _run(eks)[1].values():
        for name, amount in template["spec"]["containers"][0]["resources"]["requests"].items():
            assert quantity(amount) * 1000 <= quota[name] or name == "nvidia.com/gpu"


def test_network_policies_let_runs_do_what_they_do_and_nothing_else_in(eks: Pool) -> None:
    policies = [item["spec"] for item in objects("eks") if item["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    ours = [item for item in policies if item["podSelector"]]
    for template in _run(eks)[1].values():
        labels = template["metadata"]["labels"]
        for policy in ours:
            (expression,) = policy["podSelector"]["matchExpressions"]
            assert expression["operator"] == "Exists"
            assert labels_match(expression["key"], labels)
    sources = [source for policy in ours for rule in policy.get("ingress", []) for source in rule["from"]]
    assert sources == [
        {"podSelector": ours[0]["podSelector"]},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}}},
    ]
    for rule in (rule for policy in ours for rule in policy.get("egress", [])):
        for block in (target["ipBlock"] for target in rule.get("to", []) if "ipBlock" in target):
            open_to_all = block["cidr"].endswith("/0")
            assert not open_to_all or (block["except"] == ["169.254.169.254/32"] and rule["ports"])


# -- operators


def _operators() -> dict[str, Object]:
    return {path.parent.name: yaml.safe_load(path.read_text())
            for path in sorted((K8S / "operators").glob("*/kustomization.yaml"))}  # fmt: skip


def test_operators_are_pinned_and_nothing_else_needs_the_network() -> None:
    assert set(_operators()) == {"kuberay", "kueue"}
    for document in _operators().values():
        (remote,) = (item for item in document["resources"] if "://" in item)
        assert re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+//[\w/-]+\?ref=[0-9a-f]{40}", remote)
        (image,) = document["images"]
        assert re.match(r"v\d+\.\d+\.\d+(@sha256:[0-9a-f]{64})?$", image["newTag"])
    for path in K8S.rglob("kustomization.yaml"):
        document = yaml.safe_load(path.read_text())
        listed = [*document.get("resources", []), *document.get("components", [])]
        assert path.parent.parent.name == "operators" or not [item for item in listed if "://" in item], path


@pytest.mark.parametrize("name", ["kuberay", "kueue"])
def test_the_changes_to_an_operator_fit_its_source(name: str, tmp_path: Path) -> None:
    """`RAYLAUNCH_UPSTREAM` names a folder with checkouts `kuberay` and `kueue` of the commits that are pinned."""
    upstream = Path(os.environ.get("RAYLAUNCH_UPSTREAM", "/nowhere")) / name
    if not upstream.is_dir():
        pytest.skip("RAYLAUNCH_UPSTREAM names no checkout of it")
    document = _operators()[name]
    (remote,) = (item for item in document["resources"] if "://" in item)
    folder = tmp_path / name
    (tmp_path / "source").symlink_to(upstream)
    folder.mkdir()
    local = f"../source/{remote.partition('//')[2].partition('//')[2].partition('?')[0]}"
    document["resources"] = [local if item == remote else item for item in document["resources"]]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(document))
    for extra in (K8S / "operators" / name).glob("namespace.yaml"):
        (folder / extra.name).write_text(extra.read_text())
    found = list(yaml.load_all(kustomize(folder), LOADER))
    (made,) = (item for item in found if item["kind"] == "Deployment")
    (container,) = made["spec"]["template"]["spec"]["containers"]
    (image,) = document["images"]
    assert container["image"] == f"{image['newName']}:{image['newTag']}"
    assert made["metadata"]["namespace"] == f"{name}-system"
    assert one(found, "Namespace", f"{name}-system")
    if name == "kuberay":
        assert {"name": "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS", "value": "1800"} in container["env"]
        assert made["metadata"]["labels"]["app.kubernetes.io/name"] == "kuberay", "by which doctor finds it"
