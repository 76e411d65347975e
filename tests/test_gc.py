"""`launch gc` gives the GPUs of what was left behind back, asks before it does, and touches nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from launcher import leaks as module
from launcher.cli import main
from launcher.labels import RUN_LABEL
from launcher.runs import Run, Status
from tests.contract.grounds import until
from tests.kube.site import NAMESPACE, POOL, Site
from tests.test_kuberay import SPEED, gpus, starts, submitted

LONG_AGO = datetime.fromtimestamp(time.time() - 90_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.fixture
def site(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(tmp_path, f"{bucket}/runs", speed=SPEED) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        monkeypatch.setenv("RAYLAUNCH_STORAGE", str(tmp_path / "here"))
        monkeypatch.delenv("RAYLAUNCH_CLUSTER", raising=False)
        yield made


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Nothing has time any more to go by itself."""
    return lambda: monkeypatch.setattr(module, "PATIENCE_SECONDS", -1.0)


def gc(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["gc", "--cluster", POOL, *words])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception}"
    assert "Traceback" not in result.stderr
    return result


def found() -> list[dict[str, Any]]:
    leaks: list[dict[str, Any]] = json.loads(gc("--dry-run", "-o", "json").stdout)
    return leaks


def running(site: Site, name: str = "run") -> Run:
    run = submitted(site, name)
    starts(site, run)
    return run


def says(site: Site, **status: Any) -> None:
    site.api.update_status("rayjobs", NAMESPACE, "run", status)


def _was_refused(site: Site) -> None:
    site.controllers.paused = True
    says(site, jobDeploymentStatus="ValidationFailed")


def _has_ended(site: Site) -> None:
    site.controllers.paused = True
    says(site, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", endTime=LONG_AGO)


def _is_past_its_deadline(site: Site) -> None:
    site.controllers.paused = True
    says(site, startTime=LONG_AGO)


def _is_over_in_its_directory(site: Site) -> None:
    Run(site.storage, "run").update(status=Status.SUCCEEDED, ended=time.time() - 3_000)


def _is_deleted_and_stays(site: Site) -> None:
    site.controllers.paused = True
    site.api.delete("rayjobs", NAMESPACE, "run")
    assert site.api.get("rayjobs", NAMESPACE, "run") is not None


def _has_lost_its_ray_job(site: Site) -> None:
    site.controllers.paused = True
    ray_cluster = site.api.list("rayclusters", NAMESPACE, f"{RUN_LABEL}=run")[0]
    site.api.patch("rayclusters", NAMESPACE, ray_cluster["metadata"]["name"], {"metadata": {"ownerReferences": None}})
    site.api.patch("rayjobs", NAMESPACE, "run", {"metadata": {"finalizers": None}})
    site.api.delete("rayjobs", NAMESPACE, "run")


LEAKS: dict[Callable[[Site], None], tuple[str, str]] = {
    _was_refused: ("rayjobs", "KubeRay refused it, and then does not clean up"),
    _has_ended: ("rayjobs", "it has ended, its pods are still there"),
    _is_past_its_deadline: ("rayjobs", "it is past its deadline; the KubeRay operator does not act"),
    _is_over_in_its_directory: ("rayjobs", "the run is succeeded, its pods are still there"),
    _is_deleted_and_stays: ("rayjobs", "it was deleted; the KubeRay operator does not act"),
    _has_lost_its_ray_job: ("rayclusters", "its RayJob is gone"),
}


@pytest.mark.parametrize("leaks", LEAKS, ids=lambda leaks: leaks.__name__.strip("_"))
def test_what_a_run_left_behind_is_named_and_its_gpus_come_back_with_or_without_the_operator(
    site: Site, leaks: Callable[[Site], None], later: Callable[[], None]
) -> None:
    running(site)
    healthy = running(site, "healthy")
    assert found() == []
    leaks(site)
    if leaks in (_is_deleted_and_stays, _has_lost_its_ray_job):
        assert found() == [], "it may still go by itself"
        later()
    kind, why = LEAKS[leaks]
    (row,) = found()
    assert row == {"kind": kind, "name": row["name"], "run": "run", "gpus": 8, "why": why}
    assert gpus(site) == 16
    shown = gc("--dry-run").stdout
    assert why in shown
    assert gpus(site) == 16, "a dry run removes nothing"
    result = gc("-y")
    assert result.stderr == f"removed {kind} {row['name']}\n"
    until(lambda: gpus(site) == 8, 30)
    assert site.pods(healthy.name, "worker")
    site.controllers.paused = False
    until(lambda: not site.pods("run"), 30)
    assert gc().stdout == "nothing is left behind\n"


def test_a_config_map_that_nothing_reads_goes_once_it_is_not_young(site: Site, later: Callable[[], None]) -> None:
    labels = {RUN_LABEL: "lost", "raylaunch.dev/pool": POOL}
    site.api.create("configmaps", {"metadata": {"name": "lost-1", "namespace": NAMESPACE, "labels": labels}})
    site.api.create("configmaps", {"metadata": {"name": "theirs", "namespace": NAMESPACE}})
    running(site)
    assert found() == []
    later()
    assert [(row["name"], row["why"], row["gpus"]) for row in found()] == [("lost-1", "no RayJob owns it", 0)]
    gc("--yes")
    left = {item["metadata"]["name"] for item in site.api.list("configmaps", NAMESPACE)}
    assert {"theirs", POOL} < left
    assert "lost-1" not in left
    assert len(left) == 3, "that of the run is in use"


def test_foreign_and_healthy_objects_are_never_touched(site: Site, later: Callable[[], None]) -> None:
    run = running(site)
    job = site.api.get("rayjobs", NAMESPACE, run.name)
    assert job is not None
    theirs = {"metadata": {"name": "theirs", "namespace": NAMESPACE}, "apiVersion": "ray.io/v1"}
    site.api.create("rayclusters", {**theirs, "kind": "RayCluster", "spec": job["spec"]["rayClusterSpec"]})
    site.controllers.paused = True
    site.api.create("rayjobs", {**theirs, "kind": "RayJob", "spec": job["spec"],
                                "status": {"jobDeploymentStatus": "ValidationFailed"}})  # fmt: skip
    later()
    before = len(site.api.requests)
    assert gc("-y").stdout == "nothing is left behind\n"
    assert {request.verb for request in site.api.requests[before:]} == {"list"}


def test_nothing_is_removed_unless_somebody_agrees(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    running(site)
    _was_refused(site)
    refused = gc(code=2)
    assert "there is no terminal to ask on" in refused.stderr
    assert refused.stderr.splitlines()[-1] == "next:  --yes removes them"
    assert json.loads(gc("-o", "json", code=2).stdout)[0]["name"] == "run", "what it would have been is told"
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    for answer, code in (("n\n", 101), ("y\n", 0)):
        result = CliRunner().invoke(main, ["gc", "--cluster", POOL], input=answer)
        assert result.exit_code == code, result.stderr
        assert "remove 1 objects and what they hold?" in result.stderr
        assert ("deletionTimestamp" in (site.api.get("rayjobs", NAMESPACE, "run") or {"metadata": {}})["metadata"]) is (
            code == 0
        )


def test_json_is_all_there_is_on_stdout(site: Site) -> None:
    running(site)
    _was_refused(site)
    result = gc("-y", "-o", "json")
    assert [row["gpus"] for row in json.loads(result.stdout)] == [8]
    assert "removed rayjobs run" in result.stderr


def test_what_took_the_name_in_the_meantime_stays(site: Site, later: Callable[[], None]) -> None:
    """Between the list and the deletion somebody removed the leak and used its name again."""
    labels = {RUN_LABEL: "lost"}
    thing = {"metadata": {"name": "lost", "namespace": NAMESPACE, "labels": labels}}
    site.api.create("configmaps", thing)
    later()

    def again() -> None:
        site.api.delete("configmaps", NAMESPACE, "lost")
        site.api.create("configmaps", thing)

    site.api.crash_after("list", "rayjobs", lambda: None)
    site.api.crash_after("list", "configmaps", lambda: None)  # the pool's
    site.api.crash_after("list", "configmaps", again)
    gc("-y")
    assert site.api.get("configmaps", NAMESPACE, "lost") is not None


def test_a_pool_is_asked_for_and_a_cluster_that_refuses_says_so(site: Site) -> None:
    result = CliRunner().invoke(main, ["gc"])
    assert (result.exit_code, "name a pool" in result.stderr) == (2, True)
    site.api.denied.add(("list", "rayclusters"))
    assert "cannot list resource" in gc(code=100).stderr
    site.api.denied.clear()
    running(site)
    _was_refused(site)
    site.api.denied.add(("delete", "rayjobs"))
    refused = gc("-y", code=100)
    assert "cannot delete resource" in refused.stderr
    assert "removed" not in refused.stderr
