"""The way to Ray's dashboard: every byte, both ways, from this machine only, to whichever head the run has now."""

from __future__ import annotations

import gc
import hashlib
import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from base64 import b64decode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.errors import NotFinishedError, SiteError, UserError
from launcher.runs import Run
from launcher.tunnel import Tunnel
from tests.contract.grounds import until
from tests.kube.kubelet import unschedulable_pod
from tests.kube.site import NAMESPACE, Site
from tests.test_kuberay import SPEED, planned, starts, submitted

BIG = os.urandom(3_000_000)


class Dashboard:
    """A head's dashboard: says its name, sends much, and tells a digest of what it is sent."""

    def __init__(self, name: str) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(handler) -> None:
                handler.reply(BIG if handler.path == "/big" else name.encode())

            def do_POST(handler) -> None:
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                handler.reply(hashlib.sha256(body).hexdigest().encode())

            def reply(handler, body: bytes) -> None:
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a visitor that goes without a word
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(tmp_path, f"{bucket}/runs", speed=SPEED) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        monkeypatch.setenv("RAYLAUNCH_STORAGE", str(tmp_path / "here"))
        monkeypatch.delenv("RAYLAUNCH_CLUSTER", raising=False)
        yield made


@pytest.fixture
def run(site: Site) -> Run:
    made = submitted(site)
    starts(site, made)
    return made


@pytest.fixture
def dashboard(site: Site, run: Run) -> Iterator[Callable[[str], None]]:
    """Puts a dashboard of that name into the present head."""
    made: list[Dashboard] = []

    def put(name: str) -> None:
        made.append(Dashboard(name))
        head = site.pods(run.name, "head")[0]
        site.api.pod_ports[NAMESPACE, head] = {8265: made[-1].server.server_port}

    yield put
    for each in made:
        each.close()


@pytest.fixture
def tunnel(site: Site, run: Run) -> Iterator[Tunnel]:
    made = Tunnel.to_dashboard(site.cluster(), run.name, 0)
    server = threading.Thread(target=made.serve)
    server.start()
    yield made
    made.close()
    server.join(10)
    assert not server.is_alive()


def get(tunnel: Tunnel, path: str = "/", data: bytes | None = None) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{tunnel.port}{path}", data, timeout=20) as answer:
        body: bytes = answer.read()
        return body


def answer_of(connection: socket.socket) -> bytes:
    """Everything until the other side is done."""
    connection.settimeout(20)
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


def test_every_byte_arrives_both_ways(tunnel: Tunnel, dashboard: Callable[[str], None]) -> None:
    dashboard("first")
    assert get(tunnel) == b"first"
    assert get(tunnel, "/big") == BIG
    assert get(tunnel, "/", BIG) == hashlib.sha256(BIG).hexdigest().encode()


def test_a_visitor_that_reads_slowly_loses_nothing_when_the_dashboard_hangs_up(
    tunnel: Tunnel, dashboard: Callable[[str], None]
) -> None:
    dashboard("first")
    with socket.create_connection(("127.0.0.1", tunnel.port)) as visitor:
        visitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        visitor.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        threading.Event().wait(0.5)
        assert answer_of(visitor).endswith(b"\r\n\r\n" + BIG)


def test_one_connection_carries_many_requests_and_many_connections_do_not_disturb_each_other(
    tunnel: Tunnel, dashboard: Callable[[str], None]
) -> None:
    dashboard("first")
    with socket.create_connection(("127.0.0.1", tunnel.port)) as visitor:
        for _ in range(3):
            visitor.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            seen = b""
            while not seen.endswith(b"first"):
                seen += visitor.recv(4096)
    with ThreadPoolExecutor(8) as threads:
        bodies = [str(number).encode() * 50_000 for number in range(16)]
        digests = list(threads.map(lambda body: get(tunnel, "/", body), bodies))
    assert digests == [hashlib.sha256(body).hexdigest().encode() for body in bodies]


def test_the_token_is_that_of_the_cluster_and_the_port_is_on_the_loopback(site: Site, tunnel: Tunnel, run: Run) -> None:
    job = site.api.get("rayjobs", NAMESPACE, run.name)
    assert job is not None
    secret = site.api.get("secrets", NAMESPACE, job["status"]["rayClusterName"])
    assert secret is not None
    assert tunnel.token == b64decode(secret["data"]["auth_token"]).decode() != ""
    listening = [item.laddr.ip for item in psutil.Process().net_connections("inet")
                 if item.status == psutil.CONN_LISTEN and item.laddr.port == tunnel.port]  # fmt: skip
    assert listening == ["127.0.0.1"]


def test_the_next_connection_reaches_a_replaced_head(
    site: Site, tunnel: Tunnel, run: Run, dashboard: Callable[[str], None]
) -> None:
    dashboard("first")
    assert get(tunnel) == b"first"
    old = site.pods(run.name, "head")
    site.kubelet.play("head", unschedulable_pod())
    site.api.delete("pods", NAMESPACE, old[0], grace=0)
    until(lambda: site.pods(run.name, "head") not in ([], old))
    with pytest.raises(urllib.error.HTTPError, match="502") as caught:
        get(tunnel)
    with caught.value as error:
        assert error.read() == b"run: the run has no head now\n"
    site.kubelet.play(site.pods(run.name, "head")[0], _runs())
    until(lambda: _phase(site, run) == "Running")
    dashboard("second")
    assert get(tunnel) == b"second"


def _runs() -> Any:
    from tests.kube.kubelet import run as play

    return play()


def _phase(site: Site, run: Run) -> str:
    pod = site.api.get("pods", NAMESPACE, site.pods(run.name, "head")[0]) or {}
    return str((pod.get("status") or {}).get("phase"))


def test_a_dashboard_that_is_not_up_yet_is_told_to_the_visitor(tunnel: Tunnel) -> None:
    with pytest.raises(urllib.error.HTTPError, match="502") as caught:
        get(tunnel)
    with caught.value as error:
        assert b"error forwarding port 8265 to pod" in error.read()


def test_a_server_that_goes_away_ends_the_connections_and_the_next_ones_work_again(
    site: Site, tunnel: Tunnel, dashboard: Callable[[str], None]
) -> None:
    dashboard("first")
    with socket.create_connection(("127.0.0.1", tunnel.port)) as visitor:
        visitor.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert visitor.recv(4096).startswith(b"HTTP/1.1 200")
        site.api.stop()
        until(lambda: _ended(visitor))
    with pytest.raises(urllib.error.HTTPError, match="502") as caught:
        get(tunnel)
    with caught.value as error:
        assert b"does not answer" in error.read()
    site.api.start()
    assert get(tunnel) == b"first"


def _ended(visitor: socket.socket) -> bool:
    visitor.settimeout(0.1)
    try:
        return visitor.recv(4096) == b""
    except TimeoutError:
        return False


def test_nothing_stays_open(site: Site, tunnel: Tunnel, dashboard: Callable[[str], None]) -> None:
    dashboard("first")
    for path in ("/", "/big", "/"):
        get(tunnel, path)
    with socket.create_connection(("127.0.0.1", tunnel.port)) as visitor:
        visitor.sendall(b"GET /big HTTP/1.1\r\n")  # and goes without another word
    stay = [socket.create_connection(("127.0.0.1", tunnel.port)) for _ in range(3)]
    for each in stay:
        each.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert each.recv(4096)
    tunnel.close()
    for each in stay:
        answer_of(each)
        each.close()
    # The server notes how it answered when it has done so.
    ways = [request for request in site.api.requests if request.path.endswith("/portforward")]
    assert len(ways) == 7
    until(lambda: all(request.status == 101 for request in ways), 10)
    gc.collect()  # a socket that is only forgotten is a ResourceWarning, and with it an error


# -- what cannot be


def test_a_run_without_a_cluster_has_no_dashboard_now(site: Site) -> None:
    for name in ("run", planned(site).name):
        with pytest.raises(NotFinishedError, match="no Ray cluster now") as caught:
            Tunnel.to_dashboard(site.cluster(), name, 0)
        assert caught.value.hint == "launch status run says why"


def test_a_token_that_may_not_be_read_is_said_so(site: Site, run: Run) -> None:
    site.api.denied.add(("get", "secrets"))
    with pytest.raises(SiteError, match="secrets") as caught:
        Tunnel.to_dashboard(site.cluster(), run.name, 0)
    assert "launch doctor" in caught.value.hint


def test_a_port_that_is_taken_is_the_users(site: Site, run: Run, tunnel: Tunnel) -> None:
    with pytest.raises(UserError, match=f"port {tunnel.port} cannot be used: Address already in use") as caught:
        Tunnel.to_dashboard(site.cluster(), run.name, tunnel.port)
    assert (caught.value.where, "another --port" in caught.value.hint) == ("--port", True)


# -- the command


def test_the_command_says_where_and_with_which_token_until_ctrl_c(
    site: Site, run: Run, dashboard: Callable[[str], None]
) -> None:
    dashboard("first")
    command = [sys.executable, "-u", "-m", "launcher", "dashboard", run.name]
    client = subprocess.Popen(command, env=os.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert client.stdout is not None
    url = client.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert answer.read() == b"first"
    client.send_signal(signal.SIGINT)
    out, err = client.communicate(timeout=20)
    assert (client.returncode, out) == (0, "")
    token = Tunnel.to_dashboard(site.cluster(), run.name, 0)
    token.close()
    assert err.strip() == f"token  {token.token}  (the page asks for it once; Ctrl-C closes the way)"


def test_the_command_says_what_is_wrong(tunnel: Tunnel) -> None:
    for words, code, says in (
        (("run", "--port", str(tunnel.port)), 2, "cannot be used"),
        (("rum",), 102, "there is no run rum"),
    ):
        result = CliRunner().invoke(main, ["dashboard", *words])
        assert (result.exit_code, says in result.stderr) == (code, True), result.stderr
        assert result.stderr.splitlines()[-1].startswith("next:  ")
