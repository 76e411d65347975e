"""An emulation that no longer works fails the test that waits for it, at once and with the reason."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.kube import controllers, raynode
from tests.kube.apiserver import ApiServer
from tests.kube.controllers import Controllers
from tests.kube.kubelet import ScriptedKubelet
from tests.kube.manifests import rayjob
from tests.kube.patience import WATCHED, until
from tests.kube.processes import ProcessKubelet


class Broken(ScriptedKubelet):
    """A kubelet that does something else than look at its pods."""

    def __init__(self, api: ApiServer, instead: Callable[[], object]) -> None:
        super().__init__(api)
        self.instead = instead

    def step(self) -> None:
        self.instead()


def divide() -> None:
    """Fails."""
    _ = 1 / 0


def test_a_thread_that_dies_ends_the_wait_and_the_test() -> None:
    wait = pytest.raises(AssertionError, match=r"thread kubelet has died:\n(.*\n)*.*divide(.*\n)*ZeroDivisionError")
    with pytest.raises(ZeroDivisionError), ApiServer() as api, Controllers(api, Broken(api, divide)), wait:
        until(lambda: False, 60)
    assert WATCHED == []


def test_a_thread_that_hangs_ends_the_wait_and_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controllers, "LONGEST_STEP", 0.2)
    released = threading.Event()

    def hang() -> None:
        released.wait()

    wait = pytest.raises(AssertionError, match=r"hangs: thread kubelet(.*\n)*.*in hang")
    with pytest.raises(RuntimeError, match="hangs"), ApiServer() as api, Controllers(api, Broken(api, hang)), wait:
        until(lambda: False, 60)
    released.set()


def test_a_wait_in_vain_tells_what_the_cluster_looks_like() -> None:
    with ApiServer() as api:
        kubelet = ScriptedKubelet(api)
        with Controllers(api, kubelet):
            api.create("rayjobs", rayjob("run"))
            until(lambda: (api.get("rayjobs", "default", "run") or {}).get("status", {}).get("dashboardURL"))
            until(lambda: api.list("pods", labels="job-name=run"))
            api.log("default", api.list("pods", labels="job-name=run")[0]["metadata"]["name"], "what it last said")
            with pytest.raises(AssertionError) as caught:
                until(lambda: False, 0)
    seen = str(caught.value)
    states = {"rayjobs default/run: {", '"jobDeploymentStatus": "Running"', "HeadPodReady=True", ": Running PodReady"}
    reasons = {"ray-head: {", "what it last said", "CreatedHeadPod", "thread controllers is", "thread kubelet is"}
    assert [part for part in states | reasons if part not in seen] == []


def test_looking_at_a_cluster_again_and_again_takes_no_more_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    fresh = raynode.free_port

    def free_port() -> int:
        taken.append(fresh())
        return taken[-1]

    monkeypatch.setattr(raynode, "free_port", free_port)
    kubelet = ProcessKubelet(ApiServer(), [])
    ray_cluster = {"metadata": {"namespace": "default", "name": "run"}, "spec": {}}
    for _ in range(10):
        with pytest.raises(OSError, match="refused"):
            kubelet.ray_job(ray_cluster, "run")
    kubelet.close()
    assert len(taken) == 3


def test_ports_come_again_only_after_all_others() -> None:
    found = [raynode.free_port() for _ in range(13_000)]
    assert len(set(found[:11_000])) == 11_000
    assert all(20_000 <= port < 32_000 for port in found)
