"""The commands as one types them against a cluster, an emulated one whose pods do what the test says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from launcher.cli import main
from launcher.labels import RUN_LABEL
from launcher.runs import Run, Status
from tests.contract.grounds import until
from tests.kube.kubelet import unschedulable_pod
from tests.kube.site import NAMESPACE, POOL, Site
from tests.test_kuberay import SPEED, drives

DIGITS = ("--cluster", POOL, "--data", "sample://digits", "--name", "first", "--model", "test_resnet")


@pytest.fixture
def site(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(tmp_path, f"{bucket}/runs", speed=SPEED, confirm_above=5.0) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        monkeypatch.setenv("RAYLAUNCH_STORAGE", str(tmp_path / "here"))
        monkeypatch.delenv("RAYLAUNCH_CLUSTER", raising=False)
        monkeypatch.chdir(tmp_path)
        yield made


def launch(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception}"
    return result


def started(site: Site, *flags: str) -> Run:
    launch(*DIGITS, "-d", *flags)
    run = Run(site.storage, "first")
    site.kubelet.set_job("RUNNING")
    until(lambda: bool(site.pods("first", "submitter")))
    drives(run)
    return run


def test_a_dry_run_prints_what_kubectl_takes_and_nothing_else(site: Site) -> None:
    shown = launch(*DIGITS, "--dry-run")
    config, job = yaml.safe_load_all(shown.stdout)
    assert (config["kind"], job["kind"], job["metadata"]["namespace"]) == ("ConfigMap", "RayJob", NAMESPACE)
    assert json.loads(config["data"]["spec.json"])["name"] == "first"
    assert shown.stdout == launch(*DIGITS, "--dry-run").stdout, "the same plan is the same text"
    assert "fits now" in shown.stderr
    assert site.api.list("rayjobs") == []
    assert not Run(site.storage, "first").exists()
    if shutil.which("kubectl"):
        done = subprocess.run(["kubectl", "apply", "-f", "-"], input=shown.stdout, text=True, capture_output=True,
                              env=os.environ, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert site.api.get("rayjobs", NAMESPACE, "first") is not None


def test_a_dear_run_is_not_submitted_unasked(site: Site) -> None:
    dear = (*DIGITS, "--gpu", "a10g", "--workers", "16")
    refused = launch(*dear, code=2)
    assert "the run may cost up to 8.00 USD (4.00 an hour), more than 5.00" in refused.stderr
    assert "--yes agrees, --max-cost or --max-hours caps it" in refused.stderr
    assert not Run(site.storage, "first").exists()
    launch(*dear, "--max-cost", "4", "-d")
    (job,) = site.api.list("rayjobs", NAMESPACE)
    assert job["spec"]["activeDeadlineSeconds"] == 3600
    launch("cancel", "first", "--force")
    launch("rm", "first", "-y")
    launch(*dear, "-y", "-d")


def test_a_run_is_found_from_anywhere_and_is_watched_cancelled_and_removed(site: Site) -> None:
    run = started(site)
    until(lambda: json.loads(launch("status", "first", "-o", "json").stdout)["status"] == "RUNNING")
    assert [row["name"] for row in json.loads(launch("list", "--cluster", POOL, "-o", "json").stdout)] == ["first"]
    assert json.loads(launch("list", "-o", "json").stdout) == [], "the default storage is another place"
    assert "first is still running" in launch("rm", "first", "-y", code=101).stderr
    run.store.write("logs/submitter.log.000001", b"2026-11-24T20:00:00Z submitted\n")
    assert "[submitter] 2026-11-24T20:00:00Z submitted" in launch("logs", "first").stdout
    launch("cancel", "first", "--force")
    until(lambda: not site.pods("first"))
    assert launch("attach", "first", code=103).exit_code == 103
    launch("rm", "first", "-y")
    assert "there is no run first" in launch("status", "first", code=102).stderr


def test_what_cannot_be_is_told_before_anything_is_made(site: Site) -> None:
    for flags, code, words in (
        (("--gpu", "a100"), 2, "the pool has no node type a100; did you mean a10g?"),
        (("--gpu", "a10g", "--workers", "17"), 2, "17 workers on 17 GPUs, but gpu-pool has 16 GPUs"),
        (("--spot",), 2, "cpu is not offered spot, only on demand"),
        (("--max-hours", "3"), 2, "gpu-pool allows 2 at most"),
        (("--max-cost", "0"), 2, "limits.max_cost: should be greater than 0"),
        (("--storage", "/tmp/runs"), 2, "which is on this machine"),
        (("--data", "./flowers"), 2, "which is on this machine"),
        (("--namespace", "nowhere"), 102, "there is no pool gpu-pool"),
        (("--context", "fike"), 2, "the kubeconfig has no context fike; did you mean fake?"),
        (("--cluster", "gpu-poll"), 102, "there is no pool gpu-poll; did you mean gpu-pool?"),
    ):
        shown = launch(*DIGITS, *flags, code=code).stderr
        assert words in shown, shown
        assert "next:" in shown
        assert "Traceback" not in shown
    assert site.api.list("rayjobs") == []
    assert not Run(site.storage, "first").exists()


def test_a_refused_submission_leaves_the_name_free(site: Site) -> None:
    site.api.denied.add(("create", "configmaps"))
    assert "forbidden" in launch(*DIGITS, "-d", code=100).stderr
    assert not Run(site.storage, "first").exists()
    site.api.denied.clear()
    launch(*DIGITS, "-d")
    assert "first" in launch(*DIGITS, "-d", code=2).stderr


def test_a_cancelled_run_is_resumed_on_its_pool(site: Site) -> None:
    run = started(site)
    launch("cancel", "first", "--force")
    site.kubelet.forget_job()
    launch("resume", "first", "-d", "--max-hours", "1")
    (job,) = site.api.list("rayjobs", NAMESPACE)
    assert job["spec"]["activeDeadlineSeconds"] == 3600
    assert run.state().status is Status.PENDING
    assert "first is" in launch("resume", "first", code=2).stderr


@pytest.mark.slow
def test_logs_are_followed_through_all_that_api_servers_and_pods_do(site: Site) -> None:
    run = started(site)
    log = run.store.append("logs/rank-0.log")
    client = subprocess.Popen([sys.executable, "-u", "-m", "launcher", "logs", "first", "-f", "--rank", "0"],
                              env=os.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert client.stdout is not None
    troubles: list[Callable[[], object]] = [
        lambda: None, site.api.compact, lambda: site.api.compact(open_watches=True), site.api.drop_connections,
        site.api.stop, lambda: None, site.api.start,
        lambda: site.api.delete("pods", NAMESPACE, site.pods("first", "head")[0], grace=0), lambda: None,
    ]  # fmt: skip
    for number, trouble in enumerate(troubles):
        trouble()
        log.write(b"line %d\n" % number)
        log.flush()
        assert client.stdout.readline() == f"line {number}\n"
    log.close()
    run.update(status=Status.SUCCEEDED, ended=1.0)
    rest, _ = client.communicate(timeout=60)
    assert (rest, client.returncode) == ("", 0)


def test_ctrl_c_detaches_and_the_run_goes_on(site: Site) -> None:
    site.kubelet.play("worker", unschedulable_pod())
    client = subprocess.Popen([sys.executable, "-u", "-m", "launcher", *DIGITS], env=os.environ, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert client.stdout is not None
    seen = ""
    while "workers:" not in seen and "worker:" not in seen and "1 of 1" not in seen:
        line = client.stdout.readline()
        assert line, seen
        seen += line
    client.send_signal(signal.SIGINT)
    rest, _ = client.communicate(timeout=30)
    assert client.returncode == 130
    assert f"launch attach first --cluster {POOL} comes back" in rest
    assert site.api.list("rayjobs", NAMESPACE, f"{RUN_LABEL}=first")
