"""The Role for those who launch allows every request that the launcher makes, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from launcher.cli import main
from launcher.doctor import NEEDED
from launcher.labels import RUN_LABEL
from launcher.leaks import find_leaks
from launcher.runs import Run, Status
from launcher.tunnel import Tunnel
from tests.contract.grounds import until
from tests.kube.kubelet import crash_loop
from tests.kube.kubelet import run as run_pod
from tests.kube.site import NAMESPACE, Site
from tests.test_kuberay import drives, engine, planned, starts

ROLE, VIEWER = yaml.safe_load_all((Path(__file__).parent.parent / "k8s" / "base" / "launcher-role.yaml").read_text())


def allowed(document: dict[str, object]) -> set[tuple[str, str, str]]:
    """The (group, resource, verb) that a Role allows."""
    rules = document["rules"]
    assert isinstance(rules, list)
    return {
        (group, resource, verb)
        for rule in rules for group in rule["apiGroups"] for resource in rule["resources"] for verb in rule["verbs"]
    }  # fmt: skip


@pytest.fixture
def site(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(tmp_path, f"{bucket}/runs", speed=60, queue="gpu-queue") as made:
        made.controllers.enable_kueue(16, namespace=NAMESPACE)
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        yield made


def use_everything(site: Site) -> None:
    """Each command once, on a run that waits, runs, and is cancelled."""
    run = planned(site)
    # Before there are pods: workers that were once ready would make it a run that trains.
    site.kubelet.play("worker", crash_loop())
    engine(site).submit(run)
    watching = engine(site)
    until(lambda: "crash" in watching.status(run).reason)
    watches = {("", "events", "watch"), ("kueue.x-k8s.io", "workloads", "watch")}
    until(lambda: bool(watching.status(run)) and watches <= requested(site))
    site.kubelet.play("worker", run_pod())
    starts(site, run)
    until(lambda: watching.status(run).status is Status.RUNNING)
    Tunnel.to_dashboard(site.cluster(), "run", 0).close()
    for words in (["pools"], ["doctor", "--cluster", "gpu-pool"], ["list", "--cluster", "gpu-pool"], ["status", "run"],
                  ["--cluster", "gpu-pool", "--data", "sample://digits", "--dry-run"]):  # fmt: skip
        CliRunner().invoke(main, words)
    find_leaks(site.cluster(), "nvidia.com/gpu", 0.0)
    drives(run)
    engine(site).cancel(run, force=True)
    engine(site).delete(run)
    assert not Run(site.storage, "run").exists()


def requested(site: Site) -> set[tuple[str, str, str]]:
    """What was asked of the server, in the terms of a Role; reviews of one's own rights need none."""
    found = set()
    for request in site.api.requests:
        place = re.fullmatch(r"/(?:api/v1|apis/([^/]+)/[^/]+)(/namespaces/[^/]+)?/([^/]+)(?:/[^/]+(?:/([^/]+))?)?",
                             request.path)  # fmt: skip
        if place and place[3] != "selfsubjectaccessreviews":
            resource = f"{place[3]}/{place[4]}" if place[4] else place[3]
            found.add((place[1] or "", resource, request.verb))
    return found


def test_every_request_is_allowed_and_nothing_else_is(site: Site) -> None:
    use_everything(site)
    asked, role, viewer = requested(site), allowed(ROLE), allowed(VIEWER)
    assert asked - role - viewer == set()
    # What this run of all commands does not come to: removing a leaked cluster, a refused create's ConfigMap, a port.
    spared = {("ray.io", "rayclusters", "delete"), ("", "configmaps", "delete"), ("", "configmaps", "get"),
              ("", "pods/portforward", "create"), ("", "pods/portforward", "get")}  # fmt: skip
    assert role - asked <= spared
    # Asked for only where a pool has no node yet.
    assert viewer - asked <= {("apps", "daemonsets", "list")}


def test_what_doctor_asks_for_is_in_the_role() -> None:
    role = allowed(ROLE)
    for kind, verbs, sub, _ in NEEDED:
        resource = f"{kind.plural}/{sub}" if sub else kind.plural
        assert {(kind.group, resource, verb) for verb in verbs.split()} <= role, resource


def test_runs_are_found_by_their_label_alone(site: Site) -> None:
    run = planned(site)
    engine(site).submit(run)
    until(lambda: bool(site.pods("run")))
    for plural in ("rayjobs", "rayclusters", "pods", "configmaps"):
        assert site.api.list(plural, NAMESPACE, f"{RUN_LABEL}=run"), plural
