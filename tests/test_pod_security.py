"""Pods run under the strictest standard that Kubernetes has, without a right to its API, and carry no secret."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from launcher.operate import manifest_text
from tests.pools import plan, pool
from tests.pools.manifests import CASES, Object, objects, templates, words

every_case = pytest.mark.parametrize("case", CASES)

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SAFE_SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}  # fmt: skip
SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary-4711-secret",
    "AWS_ACCESS_KEY_ID": "canary-4711-id",
    "AWS_SESSION_TOKEN": "canary-4711-session",
    "HF_TOKEN": "canary-4711-hub",
    "RAY_AUTH_TOKEN": "canary-4711-ray",
    "WANDB_API_KEY": "canary-4711-wandb",
}


def violations(pod: Object) -> Iterator[str]:
    """What the Pod Security Standard `restricted` has against the spec of a pod (kubernetes.io, as of v1.36)."""
    own = pod.get("securityContext") or {}
    yield from (name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name))
    yield from (f"sysctl {item['name']}" for item in own.get("sysctls") or [] if item["name"] not in SAFE_SYSCTLS)
    if own.get("runAsUser") == 0:
        yield "runAsUser"
    for volume in pod.get("volumes") or []:
        yield from (f"volume {kind}" for kind in volume.keys() - {"name"} - VOLUMES)
    for part in ("containers", "initContainers", "ephemeralContainers"):
        for container in pod.get(part) or []:
            yield from _container_violations(container, own)


def _container_violations(container: Object, pod: Object) -> Iterator[str]:
    own = container.get("securityContext") or {}
    dropped, added = ((own.get("capabilities") or {}).get(part) or [] for part in ("drop", "add"))
    rules = {
        "privileged": not own.get("privileged"),
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
        "capabilities": "ALL" in dropped and set(added) <= {"NET_BIND_SERVICE"},
        "procMount": own.get("procMount", "Default") == "Default",
        "runAsNonRoot": own.get("runAsNonRoot", pod.get("runAsNonRoot")) is True,
        "runAsUser": own.get("runAsUser") != 0,
        "seccompProfile": _profile("seccompProfile", own, pod) in ("RuntimeDefault", "Localhost"),
        "appArmorProfile": _profile("appArmorProfile", own, pod) in ("", "RuntimeDefault", "Localhost"),
        "seLinuxOptions": all(_ordinary(context.get("seLinuxOptions") or {}) for context in (own, pod)),
        "hostProcess": not any((context.get("windowsOptions") or {}).get("hostProcess") for context in (own, pod)),
        "hostPort": not any(port.get("hostPort") for port in container.get("ports") or []),
    }
    yield from (name for name, kept in rules.items() if not kept)


def _profile(name: str, container: Object, pod: Object) -> str:
    return str((container.get(name) or pod.get(name) or {}).get("type", ""))


def _ordinary(selinux: Object) -> bool:
    return selinux.get("type", "") in SELINUX_TYPES and not selinux.get("user") and not selinux.get("role")


@every_case
def test_every_pod_is_restricted(case: str) -> None:
    _, job = objects(case)
    assert {role: list(violations(template["spec"])) for role, template in templates(job).items()} == {
        "submitter": [], "head": [], "worker": [],
    }  # fmt: skip


LOOSENED: list[tuple[str, Object, Object, str]] = [
    ("host network", {"hostNetwork": True}, {}, "hostNetwork"),
    ("host path", {"volumes": [{"name": "root", "hostPath": {"path": "/"}}]}, {}, "volume hostPath"),
    ("root", {"securityContext": {"runAsUser": 0}}, {}, "runAsUser"),
    ("perhaps root", {"securityContext": {"runAsNonRoot": None}}, {}, "runAsNonRoot"),
    ("no seccomp", {"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, {}, "seccompProfile"),
    ("sysctl", {"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}, {}, "sysctl kernel.msgmax"),
    ("selinux", {"securityContext": {"seLinuxOptions": {"type": "spc_t"}}}, {}, "seLinuxOptions"),
    ("privileged", {}, {"privileged": True}, "privileged"),
    ("escalation", {}, {"allowPrivilegeEscalation": None}, "allowPrivilegeEscalation"),
    ("kept capability", {}, {"capabilities": {"drop": ["KILL"]}}, "capabilities"),
    ("added capability", {}, {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}, "capabilities"),
    ("root container", {}, {"runAsUser": 0}, "runAsUser"),
    ("proc", {}, {"procMount": "Unmasked"}, "procMount"),
    ("apparmor", {}, {"appArmorProfile": {"type": "Unconfined"}}, "appArmorProfile"),
]


@pytest.mark.parametrize(("pod", "container", "found"), [row[1:] for row in LOOSENED], ids=[row[0] for row in LOOSENED])
def test_a_pod_that_is_looser_is_noticed(pod: Object, container: Object, found: str) -> None:
    """The check above is worth something only if it fails for what it forbids."""
    spec = copy.deepcopy(templates(objects("gpu")[1])["worker"]["spec"])
    spec["securityContext"] |= pod.get("securityContext", {})
    spec |= {key: value for key, value in pod.items() if key != "securityContext"}
    spec["containers"][0]["securityContext"] |= container
    assert list(violations(spec)) == [found]


@every_case
def test_no_pod_may_speak_to_the_api(case: str) -> None:
    _, job = objects(case)
    for template in templates(job).values():
        assert template["spec"]["automountServiceAccountToken"] is False
        assert not [volume for volume in template["spec"]["volumes"] if "projected" in volume]
        # Names and ports of every service of the namespace are no business of a pod either.
        assert template["spec"]["enableServiceLinks"] is False


@every_case
def test_nothing_of_the_users_environment_is_in_the_manifest(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    made = CASES[case]()
    said = manifest_text(made, f"{made.spec.storage}/{made.spec.name}")
    assert "canary-4711" not in said
    assert not [name for name in CANARIES if name in said]


def test_a_secret_is_named_and_never_read() -> None:
    _, job = objects("secret")
    for template in templates(job).values():
        (container,) = template["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "s3-credentials"}}]
        assert all(set(item) == {"name", "value"} for item in container["env"])
    for case in CASES.keys() - {"secret"}:
        assert not [word for word in words(objects(case)[1]) if word in ("secretRef", "secretKeyRef", "secretName")]


def test_settings_of_the_site_reach_every_container() -> None:
    env = {"AWS_REGION": "eu-north-1", "RAY_USAGE_STATS_ENABLED": "1"}
    made = plan(pool("cpu-pool", env=env))
    _, job = yaml.safe_load_all(manifest_text(made, "s3://runs/run"))
    for template in templates(job).values():
        listed: list[dict[str, Any]] = template["spec"]["containers"][0]["env"]
        names = [item["name"] for item in listed]
        assert len(names) == len(set(names)), "of two values of a name, which one counts is not said"
        assert env.items() <= {item["name"]: item["value"] for item in listed}.items()
