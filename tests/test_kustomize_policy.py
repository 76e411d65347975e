"""What no object that is applied may be, whoever renders it; every exception is written down here, with its reason."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pools import manifests
from tests.pools.manifests import CASES
from tests.rendered import K8S, OVERLAYS, PODS, Object, objects, one, templates, text
from tests.test_pod_security import violations

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)

EXCEPTIONS = {
    # The kubelet looks for plugins in a folder of the node that only root may write. It keeps no capability.
    "nvidia-device-plugin": {"volume hostPath", "runAsUser", "runAsNonRoot"},
}
HARMLESS = {"ConfigMap", "LimitRange", "Namespace", "NetworkPolicy", "PriorityClass", "ResourceQuota", "ServiceAccount"}
BOUND = {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
QUEUE = {"ResourceFlavor", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass"}
SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|hf_[A-Za-z0-9]{20}|(?i:password|secret_access_key|token)\s*[:=]\s*\S"
)


def pods() -> list[tuple[str, Object]]:
    """Every pod template: of the overlays, and of the runs that the launcher submits."""
    found = [pair for overlay in OVERLAYS for pair in templates(objects(overlay))]
    return found + [(f"run {case}, {role}", template) for case in CASES
                    for role, template in manifests.templates(manifests.objects(case)[1]).items()]  # fmt: skip


@every_overlay
def test_every_kind_of_object_is_one_that_these_rules_know(overlay: str) -> None:
    assert {item["kind"] for item in objects(overlay)} <= HARMLESS | BOUND | QUEUE | PODS.keys()


def test_no_pod_may_do_more_than_the_strictest_standard_but_those_written_down() -> None:
    found = {name: set(violations(template["spec"])) for name, template in pods()}
    assert {name: said for name, said in found.items() if said} == EXCEPTIONS


def test_no_image_floats() -> None:
    for name, template in pods():
        for container in template["spec"]["containers"]:
            tag = container["image"].partition("@")[0].rpartition("/")[2].partition(":")[2]
            assert "@sha256:" in container["image"] or re.fullmatch(r"v?\d+\.\d+(\.\d+)?([.-]\w+)*", tag), name
    for overlay in OVERLAYS:
        for _, template in templates(objects(overlay)):
            assert all("@sha256:" in item["image"] for item in template["spec"]["containers"])


def test_every_container_says_what_it_takes() -> None:
    for name, template in pods():
        for container in template["spec"]["containers"]:
            resources = container["resources"]
            assert resources["requests"].keys() >= {"cpu", "memory"}, name
            assert "memory" in resources["limits"], name


def test_every_run_pod_keeps_to_the_namespace_it_is_made_for() -> None:
    level = one(objects("eks"), "Namespace", "raylaunch")["metadata"]["labels"]
    assert level["pod-security.kubernetes.io/enforce"] == "restricted"


def test_nothing_secret_is_in_plain_text() -> None:
    assert not [overlay for overlay in OVERLAYS if SECRETS.search(str(objects(overlay)))]
    assert not [case for case in CASES if SECRETS.search(str(manifests.objects(case)))]
    for name, template in pods():
        for container in template["spec"]["containers"]:
            assert not [item for item in container.get("env", []) if re.search("KEY|TOKEN|SECRET", item["name"])], name


# -- what a linter for security says (checkov; no part of what is installed for tests, for it brings 100 packages)

SCALER, PLUGIN, IMAGE = (
    "Deployment.kube-system.cluster-autoscaler",
    "DaemonSet.kube-system.nvidia-device-plugin",
    "image",
)
OBJECTIONS = {
    ("CKV_K8S_11", SCALER): "a limit on cores makes it slow when it matters, and its requests are set",
    ("CKV_K8S_11", PLUGIN): "as above",
    ("CKV_K8S_38", SCALER): "it works through the API server",
    ("CKV_K8S_23", PLUGIN): "see EXCEPTIONS",
    ("CKV_K8S_40", PLUGIN): "see EXCEPTIONS",
    ("CKV_K8S_22", PLUGIN): "as its maker ships it",
    ("CKV_K8S_8", PLUGIN): "it has no port to ask; the kubelet notices when its socket is gone",
    ("CKV_K8S_9", PLUGIN): "nobody sends it requests",
    ("CKV_DOCKER_2", IMAGE): "probes are KubeRay's, and other for a head than for a worker",
    ("CKV_DOCKER_7", IMAGE): "the base is pinned by digest, in an argument that checkov does not look into",
}


@pytest.mark.slow
def test_checkov_objects_to_nothing_but_this(tmp_path: Path) -> None:
    if shutil.which("checkov") is None:
        pytest.skip("checkov is not on this machine")
    found = set()
    for overlay in OVERLAYS:
        (tmp_path / f"{overlay}.yaml").write_text(text(overlay))
    for framework, place in (("kubernetes", tmp_path), ("dockerfile", K8S / "image")):
        words = ["checkov", "--framework", framework, "-d", str(place), "-o", "json", "--skip-download"]
        said = json.loads(subprocess.run(words, capture_output=True, text=True, timeout=300, check=False).stdout)
        assert said["summary"]["passed"] > 100
        found |= {(item["check_id"], IMAGE if framework == "dockerfile" else item["resource"])
                  for item in said["results"]["failed_checks"]}  # fmt: skip
    assert found == OBJECTIONS.keys()


# -- rights


def rules(found: list[Object]) -> list[Object]:
    return [rule for item in found if item["kind"] in ("Role", "ClusterRole") for rule in item["rules"]]


def too_much(rule: Object) -> bool:
    """Whether a rule of RBAC allows what nobody here needs: anything at all, all secrets, or more rights."""
    words = {*rule["verbs"], *rule["resources"], *rule["apiGroups"]}
    secrets = "secrets" in rule["resources"] and set(rule["verbs"]) & {"list", "watch", "update", "patch", "create"}
    inside = {"pods/exec", "pods/attach", "pods/ephemeralcontainers", "serviceaccounts/token"} & words
    return bool({"*", "escalate", "bind", "impersonate"} & words or secrets or inside
                or "rbac.authorization.k8s.io" in words)  # fmt: skip


@every_overlay
def test_nobody_gets_a_right_that_is_not_needed(overlay: str) -> None:
    found = rules(objects(overlay))
    assert found
    assert [rule for rule in found if too_much(rule)] == []


@every_overlay
def test_rights_go_to_those_who_launch_and_to_the_autoscaler_alone(overlay: str) -> None:
    found = objects(overlay)
    given = {
        (item["roleRef"]["name"], subject["kind"], subject["name"], subject.get("namespace"))
        for item in found if item["kind"].endswith("Binding") for subject in item["subjects"]
    }  # fmt: skip
    people = {(name, "Group", "raylaunch-launchers", None) for name in ("raylaunch", "raylaunch-viewer")}
    scaler = {("cluster-autoscaler", "ServiceAccount", "cluster-autoscaler", "kube-system")}
    assert given == people | (scaler if overlay == "eks" else set())
    roles = {item["metadata"]["name"] for item in found if item["kind"] in ("Role", "ClusterRole")}
    assert roles == {name for name, *_ in given}


@every_overlay
def test_an_account_of_a_run_has_no_token_to_ask_with(overlay: str) -> None:
    """So no request of the submitter, the driver or a worker needs a Role: none could be made."""
    accounts = [item for item in objects(overlay) if item["kind"] == "ServiceAccount"]
    ours = [item for item in accounts if item["metadata"]["namespace"] == "raylaunch"]
    assert {item["metadata"]["name"] for item in ours} == {"default", "trainer"}
    assert all(item["automountServiceAccountToken"] is False for item in ours)


# -- the rules above are worth something only if they fail for what they forbid


LOOSE: dict[str, Callable[[Object], Any]] = {
    "any verb": lambda rule: rule["verbs"].append("*"),
    "any resource": lambda rule: rule["resources"].append("*"),
    "any group": lambda rule: rule["apiGroups"].append("*"),
    "all secrets": lambda rule: (rule["resources"].append("secrets"), rule["verbs"].append("list")),
    "a shell": lambda rule: rule["resources"].append("pods/exec"),
    "more rights": lambda rule: rule["verbs"].append("escalate"),
    "roles": lambda rule: rule["apiGroups"].append("rbac.authorization.k8s.io"),
}


@pytest.mark.parametrize("case", LOOSE)
def test_a_rule_that_is_looser_is_noticed(case: str) -> None:
    rule = copy.deepcopy(rules(objects("eks"))[0])
    assert not too_much(rule)
    LOOSE[case](rule)
    assert too_much(rule)


@pytest.mark.parametrize("secret", ["AKIAIOSFODNN7EXAMPLE", "password: x", "token=abc", "-----BEGIN RSA KEY"])
def test_a_secret_in_plain_text_is_noticed(secret: str) -> None:
    assert SECRETS.search(f"some {secret} here")
