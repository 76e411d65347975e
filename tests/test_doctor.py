"""`launch doctor` names each thing that is missing and the next step; a submission stops before anything is made."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from launcher.cli import main
from launcher.doctor import NEEDED
from launcher.runs import Run
from tests.contract.grounds import until
from tests.kube.site import NAMESPACE, POOL, Site, description

AT_POOL = ("--cluster", POOL)
GOOD_IMAGE = "registry.example/raylaunch@sha256:" + "0" * 64
Break = Callable[[Site], object]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pool or storage of whoever runs the tests."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig.yaml"))
    monkeypatch.setenv("RAYLAUNCH_STORAGE", str(tmp_path / "here"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("RAYLAUNCH_CLUSTER", raising=False)
    monkeypatch.chdir(tmp_path)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)


@pytest.fixture
def site(tmp_path: Path, bucket: str) -> Iterator[Site]:
    with Site(tmp_path, f"{bucket}/runs", speed=60.0) as made:
        made.api.patch("namespaces", None, NAMESPACE, level("restricted"))
        makes("networkpolicies", "default-deny", spec={"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})(made)
        yield made


def level(name: str | None) -> dict[str, Any]:
    """What makes pods of a namespace keep to a standard; None to none."""
    return {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": name}}}


def launch(*words: str) -> Result:
    result = CliRunner().invoke(main, list(words))
    assert "Traceback" not in result.stderr, result.stderr
    return result


def describes(**changes: Any) -> Break:
    """The pool says something else of itself."""

    def change(site: Site) -> None:
        site.api.delete("configmaps", NAMESPACE, POOL)
        site.describe(POOL, description(site.storage) | changes)

    return change


def denies(*pairs: tuple[str, str]) -> Break:
    return lambda site: site.api.denied.update(pairs)


def operator(**changes: Any) -> Break:
    return lambda site: site.api.patch("deployments", "kuberay-system", "kuberay-operator", changes)


def operator_image(tag: str) -> Break:
    containers = [{"name": "kuberay-operator", "image": f"quay.io/kuberay/operator:{tag}"}]
    return operator(spec={"template": {"spec": {"containers": containers}}})


def other_labels(site: Site) -> None:
    """Those of KubeRay's kustomization; its Helm chart has others."""
    labels = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"}
    operator(metadata={"labels": labels})(site)


def together(*breaks: Break) -> Break:
    return lambda site: [each(site) for each in breaks]


def no_operator(site: Site) -> None:
    site.api.delete("deployments", "kuberay-system", "kuberay-operator")


def no_definitions(site: Site) -> None:
    for name in ("rayjobs.ray.io", "rayclusters.ray.io"):
        site.api.delete("customresourcedefinitions", None, name)


def not_served(site: Site) -> None:
    site.api.fail_next(99, 404, r"/apis/ray\.io/")


def makes(plural: str, name: str, **more: Any) -> Break:
    return lambda site: site.api.create(plural, {"metadata": {"name": name, "namespace": NAMESPACE}, **more})


def kueue(queue: str) -> Break:
    return lambda site: site.controllers.enable_kueue(8, namespace=NAMESPACE, queue=queue)


def stopped_queue(site: Site) -> None:
    kueue("team-a")(site)
    condition = {"type": "Active", "status": "False", "reason": "ClusterQueueIsInactive",
                 "message": "Can't submit new workloads to clusterQueue"}  # fmt: skip
    site.api.update_status("localqueues", NAMESPACE, "team-a", {"conditions": [condition]})


def installed(plural: str, name: str) -> Break:
    return lambda site: site.api.create(plural, {"metadata": {"name": name, "namespace": "kube-system"}, "spec": {}})


def quota(used: str | None) -> Break:
    status = {"status": {"hard": {"requests.nvidia.com/gpu": "8"}, "used": {"requests.nvidia.com/gpu": used}}}
    return makes("resourcequotas", "team", spec={"hard": {"requests.nvidia.com/gpu": "8"}}, **(status if used else {}))


def gpus_gone(site: Site) -> None:
    for node in site.api.list("nodes"):
        left = {key: value for key, value in node["status"]["allocatable"].items() if key != "nvidia.com/gpu"}
        status = {**node["status"], "allocatable": left}
        site.api.update_status("nodes", None, node["metadata"]["name"], status, replace=True)


def not_ready(site: Site) -> None:
    for number in range(4):
        condition = [{"type": "Ready", "status": "Unknown"}]
        site.api.update_status("nodes", None, f"a10g-{number}", {"conditions": condition})


OK, WRONG, NOTE = True, False, None
INSTALL = "install KubeRay 1.7"
OWNER = "the pool's owner"
CRD_DENIED = denies(("get", "customresourcedefinitions"))

CASES: dict[str, tuple[Break, str, bool | None, str, str]] = {
    "verbs denied": (denies(("create", "rayjobs"), ("delete", "rayjobs"), ("get", "pods/log")), "permissions", WRONG,
                     "you may not create delete rayjobs (start, watch and end runs); get pods/log (say why",
                     "ask for a Role with these in ml"),
    "nodes denied": (denies(("list", "nodes")), "nodes", NOTE, "you may not list nodes", "optional: a ClusterRole"),
    "no operator": (no_operator, "kuberay", WRONG, "no kuberay-operator is deployed", INSTALL),
    "old operator": (operator_image("v1.5.1"), "kuberay", WRONG, "the operator is v1.5.1, too old", INSTALL),
    "oldest operator": (operator_image("1.6.0"), "kuberay", OK, "the operator runs, 1.6.0", ""),
    "nightly operator": (operator_image("nightly"), "kuberay", OK, "operator:nightly", ""),
    "impatient operator": (operator_image("v1.7.0"), "recovery", NOTE, "whose head is away for 300 s",
                           "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS=1800"),
    "operator down": (operator(status={"readyReplicas": None}), "kuberay", WRONG, "deployed, but not running",
                      "kubectl -n kuberay-system get pods"),
    "operator by kustomize": (other_labels, "kuberay", OK, "the operator runs, v1.7.0", ""),
    "operator unseen": (denies(("list", "deployments")), "kuberay", NOTE, "you may not see the operator",
                        "1.6 or newer is needed"),
    "no definitions": (no_definitions, "kuberay", WRONG, "does not know rayjobs.ray.io, rayclusters.ray.io", INSTALL),
    "definitions unseen": (CRD_DENIED, "kuberay", OK, "the operator runs, v1.7.0", ""),
    "kind not served": (together(CRD_DENIED, not_served), "kuberay", WRONG,
                        "does not know rayjobs.ray.io, rayclusters.ray.io", INSTALL),
    "other Ray": (describes(ray_version="2.50.0"), "image", WRONG, "the pool has Ray 2.50.0", OWNER),
    "floating tag": (describes(image="x/raylaunch:latest"), "image", NOTE, "can change between the pods", "by digest"),
    "no tag": (describes(image="localhost:5000/raylaunch"), "image", NOTE, "can change between the pods", "by digest"),
    "other version": (describes(image="x/raylaunch:9.9.9"), "image", NOTE, "the image is 9.9.9, this is", OWNER),
    "other name": (describes(image="x/raylaunch:team"), "image", OK, "x/raylaunch:team with Ray 2.60.0", ""),
    "digest": (describes(image=GOOD_IMAGE), "image", OK, GOOD_IMAGE, ""),
    "no account": (describes(service_account="nobody"), "service account", WRONG,
                   "the pool names service account nobody, which is not in ml", OWNER),
    "account unseen": (denies(("get", "serviceaccounts")), "service account", NOTE,
                       "you may not see service account trainer", ""),
    "no secret": (describes(env_secret="hub"), "secret", WRONG, "secret hub, which is not in ml", OWNER),
    "secret": (together(describes(env_secret="hub"), makes("secrets", "hub")), "secret", OK, "hub is there", ""),
    "no Kueue": (describes(queue="team-a"), "queue", WRONG, "queue team-a, but Kueue is not installed",
                 "install Kueue (k8s/operators/kueue), or the pool's owner"),
    "no queue": (together(kueue("other"), describes(queue="team-a")), "queue", WRONG,
                 "the pool names queue team-a, which is not in ml", OWNER),
    "queue": (together(kueue("team-a"), describes(queue="team-a")), "queue", OK, "queue team-a is there", ""),
    "stopped queue": (together(stopped_queue, describes(queue="team-a")), "queue", WRONG,
                      "queue team-a lets no run go: Can't submit new workloads", "kubectl describe clusterqueues"),
    "no bucket": (describes(storage="s3://no-such-bucket-here/runs"), "storage", WRONG,
                  "there is no bucket no-such-bucket-here", "aws s3 ls"),
    "quota": (quota("6"), "quota", OK, "2 of 8 GPUs are left in the quota team", ""),
    "quota used up": (quota("8"), "quota", NOTE, "0 of 8 GPUs are left in the quota team", "launch list"),
    "new quota": (quota(None), "cluster", OK, "Kubernetes v1.33.5", ""),
    "no GPUs": (gpus_gone, "gpus", WRONG, "4 nodes of a10g, none offers nvidia.com/gpu", "the device plugin"),
    "no nodes": (not_ready, "gpus", OK, "a10g: no node of at most 4, 0 of 0 GPUs free", ""),
    "no autoscaler": (not_ready, "autoscaler", NOTE, "without one nobody brings a node of a10g", "docs/deploy.md"),
    "autoscaler": (together(not_ready, installed("deployments", "cluster-autoscaler")), "autoscaler", OK,
                   "cluster-autoscaler is there", ""),
    "Karpenter": (together(not_ready, installed("deployments", "karpenter")), "autoscaler", OK, "karpenter is", ""),
    "autoscaler unseen": (together(not_ready, denies(("list", "deployments"))), "autoscaler", NOTE,
                          "you may not see whether there is a node autoscaler", ""),
    "no plugin": (not_ready, "device plugin", NOTE, "nobody offers the GPUs of a new node", "docs/deploy.md"),
    "plugin": (together(not_ready, installed("daemonsets", "nvidia-device-plugin")), "device plugin", OK,
               "nvidia-device-plugin is there", ""),
    "no policies": (lambda site: site.api.delete("networkpolicies", NAMESPACE, "default-deny"), "network", NOTE,
                    "every pod of the cluster reaches Ray in ml", "k8s/base"),
    "policies unseen": (denies(("list", "networkpolicies")), "network", NOTE, "you may not see the network", ""),
    "no standard": (lambda site: site.api.patch("namespaces", None, NAMESPACE, level(None)), "pod security", NOTE,
                    "a pod in ml may do anything to its node", "k8s/base"),
    "baseline": (lambda site: site.api.patch("namespaces", None, NAMESPACE, level("baseline")), "pod security", OK,
                 "pods in ml are held to baseline", ""),
    "namespace unseen": (denies(("get", "namespaces")), "pod security", NOTE, "you may not see the labels of ml", ""),
    "quotas unseen": (denies(("list", "resourcequotas")), "cluster", NOTE, "cannot list resource", "launch doctor"),
    "busy server": (lambda site: site.api.fail_next(9, 401, "list .*resourcequotas"), "cluster", NOTE,
                    "does not accept the credentials", "renew them"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named_with_the_next_step_and_the_rest_is_looked_at_too(site: Site, case: str) -> None:
    breaks, name, ok, says, hint = CASES[case]
    breaks(site)
    result = launch("doctor", *AT_POOL, "-o", "json")
    checks = json.loads(result.stdout)
    (found,) = [check for check in checks if check["name"] == name and says in check["what"]]
    assert found["ok"] is ok
    assert hint in found["hint"]
    assert [check for check in checks if check["ok"] is False and check is not found] == []
    assert result.exit_code == (100 if ok is WRONG else 0)
    for check in checks:
        assert check["hint"] or check["ok"] is True or "you may not see" in check["what"], check
    names = {check["name"] for check in checks}
    assert {"cluster", "permissions", "kuberay", "image", "service account", "storage"} <= names


def test_a_healthy_pool_is_found_healthy_and_nothing_is_left_behind(site: Site) -> None:
    before = {plural: site.api.list(plural) for plural in ("configmaps", "rayjobs", "pods", "secrets")}
    result = launch("doctor", *AT_POOL)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * len(lines)
    for says in ("fake/ml answers, Kubernetes v1.33.5", "you may run, watch and end runs in ml",
                 "the operator runs, v1.7.0", "service account trainer is there",
                 f"{site.storage} can be written, read and deleted from here",
                 "a10g: 4 nodes of at most 4, 16 of 16 GPUs free", "cpu: 4 nodes of at most 4",
                 "network policies say who reaches the pods of ml", "pods in ml are held to restricted"):  # fmt: skip
        assert says in result.stdout
    assert {plural: site.api.list(plural) for plural in before} == before
    assert list(Run(site.storage, "x").store.list()) == []


def test_the_table_says_what_is_wrong_and_under_it_what_to_do(site: Site) -> None:
    describes(ray_version="2.50.0")(site)
    result = launch("doctor", *AT_POOL)
    assert result.exit_code == 100
    lines = result.stdout.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("wrong")]
    assert lines[at].split()[:2] == ["wrong", "image"]
    assert lines[at + 1].strip() == "next:           the pool's owner sets image and ray_version in its ConfigMap"


def test_every_right_that_is_missing_is_named(site: Site) -> None:
    pools = _pool_file(site)
    for kind, verbs, sub, why in NEEDED:
        name = f"{kind.plural}/{sub}" if sub else kind.plural
        site.api.denied.clear()
        site.api.denied |= {(verb, name) for verb in verbs.split()}
        denied = launch("doctor", "--pool-file", pools, *AT_POOL, "-o", "json")
        (check,) = [check for check in json.loads(denied.stdout) if check["name"] == "permissions"]
        assert (check["ok"], denied.exit_code) == (False, 100)
        assert f"{verbs} {name} ({why})" in check["what"]


def _pool_file(site: Site) -> str:
    path = site.folder / "pools.yaml"
    path.write_text(json.dumps({POOL: description(site.storage)}))
    return str(path)


def test_a_cluster_that_is_away_is_one_finding(site: Site) -> None:
    site.api.stop()
    result = launch("doctor", *AT_POOL, "--pool-file", _pool_file(site), "-o", "json")
    (check,) = json.loads(result.stdout)
    assert (result.exit_code, check["name"], check["ok"]) == (100, "cluster", False)
    assert "the API server does not answer" in check["what"]
    assert "VPN" in check["hint"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--cluster", "gpu-poll"), "there is no pool gpu-poll; did you mean gpu-pool?"),
        ((*AT_POOL, "--context", "fike"), "the kubeconfig has no context fike; did you mean fake?"),
    ],
)
def test_a_pool_that_is_not_there_is_one_finding(site: Site, words: tuple[str, ...], says: str) -> None:
    del site
    result = launch("doctor", *words)
    assert result.exit_code == 100
    first, second = result.stdout.splitlines()
    assert first.startswith("wrong")
    assert says in first
    assert second.strip().startswith("next:")


# -- this machine


def test_without_a_cluster_this_machine_and_its_storage_are_looked_at(tmp_path: Path) -> None:
    result = launch("doctor", "-o", "json")
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert list(checks) == ["packages", "machine", "storage"]
    assert checks["storage"]["ok"] is True
    assert str(tmp_path / "here") in checks["storage"]["what"]
    assert result.exit_code == 0
    assert [path for path in (tmp_path / "here").rglob("*") if path.is_file()] == []


@pytest.mark.usefixtures("s3")
def test_a_storage_that_cannot_be_written_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for storage in (str(tmp_path / "file" / "below"), "s3://no-such-bucket-here/runs"):
        result = launch("doctor", "--storage", storage, "-o", "json")
        check = json.loads(result.stdout)[-1]
        assert (check["name"], check["ok"], result.exit_code) == ("storage", False, 100)
        assert check["what"]
        assert check["hint"]


# -- before a submission


@pytest.mark.parametrize("case", ["other Ray", "no account", "no secret", "no Kueue", "no queue"])
def test_what_would_keep_every_pod_from_starting_stops_a_submission_before_anything_is_made(
    site: Site, case: str
) -> None:
    breaks, _, _, says, hint = CASES[case]
    breaks(site)
    before = site.api.list("configmaps")
    result = launch(*AT_POOL, "--data", "sample://digits", "--name", "first", "--model", "test_resnet", "-d")
    assert result.exit_code == 100
    assert says in result.stderr
    assert hint in result.stderr.splitlines()[-1]
    assert site.api.list("configmaps") == before
    assert site.api.list("rayjobs") == []
    assert list(Run(site.storage, "first").store.list()) == []


def test_advice_does_not_stop_a_submission(site: Site) -> None:
    together(describes(image="x/raylaunch:latest"), quota("8"), denies(("get", "serviceaccounts")))(site)
    result = launch(*AT_POOL, "--data", "sample://digits", "--name", "first", "--model", "test_resnet", "-d")
    assert result.exit_code == 0, result.stderr
    until(lambda: bool(site.api.list("rayjobs", NAMESPACE)))
