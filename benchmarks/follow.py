"""What it costs to follow a run of 64 workers: requests to the API server and to the storage, memory, CPU.

    python benchmarks/follow.py [SECONDS]

The client is real (`launch attach` on a terminal); the cluster is emulated: 64 nodes of one GPU, whose pods all report
something new every ten seconds. Measured for a minute each, or SECONDS, after ten to begin with: while the workers wait
for nodes, while they train, and then a loop around `kubectl get`.
"""

from __future__ import annotations

import logging
import os
import pty
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from moto.server import ThreadedMotoServer

sys.path.insert(0, str(Path(__file__).parents[1]))
from launcher.backends.kuberay import KubeRayBackend
from launcher.journal import Journal
from launcher.runs import Owner, Status
from launcher.s3 import s3_client
from tests.contract.grounds import until
from tests.kube.kubelet import ScriptedKubelet, run, unschedulable_pod
from tests.kube.scheduler import Node
from tests.kube.site import NAMESPACE, POOL, Site, description
from tests.kube.wire import Exchange
from tests.tiny import new_run

WORKERS, NAME = 64, "followed"
KIND = {**description("")["node_types"][1], "gpus": 1, "max_nodes": WORKERS}
GPU_NODE = partial(Node, cpu="16", memory="64Gi", gpus=1, tainted=True, labels=KIND["node_selector"])
KUBELET = partial(ScriptedKubelet, nodes=(Node("head-0"), *(GPU_NODE(f"gpu-{number}") for number in range(WORKERS))))
ATTACH = [sys.executable, "-m", "launcher", "attach", NAME, "--cluster", POOL]
POLL = ["sh", "-c", f"while kubectl get rayjob,pods -n {NAMESPACE} -o json >/dev/null; do sleep 2; done"]
traffic: list[tuple[float, str, int]] = []
"""When one of the servers was asked or answered, for whom, and the bytes of an API server's answer."""


def record_traffic(storage: Any) -> None:
    """Fills `traffic` from now on."""
    app, write = storage._server.app, Exchange._write

    def asked(environ: dict[str, str], respond: Any) -> Any:
        traffic.append((time.time(), environ.get("HTTP_USER_AGENT", ""), 0))
        return app(environ, respond)

    def written(self: Exchange, data: bytes) -> None:
        traffic.append((time.time(), self.headers.get("User-Agent", ""), len(data)))
        write(self, data)

    storage._server.app, Exchange._write = asked, written  # type: ignore[method-assign]


@contextmanager
def every(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Does something again and again, meanwhile."""
    over = threading.Event()

    def turn() -> None:
        while not over.wait(seconds):
            action()

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    yield
    over.set()
    thread.join()


def follow(site: Site, what: str, command: list[str], agent: str, seconds: float, shows: str = "") -> None:
    """Measures a client, which must show on its terminal that it sees what there is, and prints a line of the table."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "AWS_SDK_UA_APP_ID": "follower"}
    seen, peak, began = bytearray(), [0], time.time()
    client = psutil.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)

    def look() -> None:
        with suppress(BlockingIOError, psutil.Error):
            peak[0] = max(peak[0], sum(one.memory_info().rss for one in (client, *client.children(recursive=True))))
            seen.extend(os.read(ours, 65536))

    def asked(since: float, end: float) -> Counter[str]:
        mine = [one for one in list(site.api.requests) if one.user_agent.startswith(agent) and since <= one.time < end]
        return Counter(f"{one.verb} {one.path.split('/')[-2 if one.verb == 'get' else -1]}" for one in mine)

    with every(0.05, look):
        time.sleep(10)
        used, since = sum(client.cpu_times()[:4]), time.time()
        time.sleep(seconds)
        used, end = sum(client.cpu_times()[:4]) - used, time.time()
    client.kill()
    client.wait()
    assert shows.encode() in seen, seen.decode(errors="replace")
    found, minutes = [entry for entry in list(traffic) if since <= entry[0] < end], (end - since) / 60
    read = sum(size for _, who, size in found if who.startswith(agent)) / 1e6
    stored = sum("app/follower" in who for _, who, _ in found)
    print(f"{what:<26}{asked(since, end).total() / minutes:8.1f}{read / minutes:9.2f}{stored / minutes:9.0f}"
          f"{used / minutes:7.2f}{peak[0] / 1e6:9.0f}\n    at first {dict(asked(began, since))},"
          f" then in {end - since:.0f} s {dict(asked(since, end))}", flush=True)  # fmt: skip


def main() -> None:
    """Makes a run, and measures in its two phases."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    storage = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    storage.start()
    record_traffic(storage)
    os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*storage.get_host_and_port())
    os.environ |= {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "me", "AWS_DEFAULT_REGION": "us-east-1"}
    s3_client().create_bucket(Bucket="runs")
    with tempfile.TemporaryDirectory() as folder, Site(Path(folder), "s3://runs/a", KUBELET, node_types=[KIND]) as site:
        os.environ |= {"KUBECONFIG": str(site.kubeconfig), "KUBECACHEDIR": f"{folder}/kubectl"}
        here = new_run(site.storage, NAME, site.pool(), resources__workers=WORKERS, train__batch_size=256)
        journal = Journal(here.store, "progress.jsonl", every=1.0)
        site.kubelet.play("worker", unschedulable_pod())
        KubeRayBackend(site.pool(), site.cluster()).submit(here)
        until(lambda: len(site.pods(NAME, "worker")) == WORKERS)

        def churn() -> None:
            for pod in site.pods(NAME, "worker"):
                site.api.update_status("pods", NAMESPACE, pod, {"message": f"told at {time.time()}"})

        def drive() -> None:
            here.hold(Owner("head", "boot", 1, 0.0))
            journal.write("step", epoch=1, at=1, of=9, batch=64, loss=1, images_per_second=64, data_wait=0, memory=4e9)

        print("a minute                  requests  MB read  storage  CPU s  peak MB", flush=True)
        with every(10, churn):
            follow(site, "attach, waiting for nodes", ATTACH, "raylaunch", seconds, "no node has 1 free GPU")
            site.kubelet.play("worker", run())
            site.kubelet.set_job("RUNNING")
            until(lambda: "'jobDeploymentStatus': 'Running'" in str(site.api.get("rayjobs", NAMESPACE, NAME)))
            here.update(status=Status.RUNNING, attempt=1)
            with every(1, drive):
                follow(site, "attach, training", ATTACH, "raylaunch", seconds, "images/s")
                if shutil.which("kubectl"):
                    follow(site, "kubectl get, sleep 2", POLL, "kubectl", seconds)
                else:
                    print("kubectl get, sleep 2: skipped, there is no kubectl")
            journal.close()


if __name__ == "__main__":
    main()
