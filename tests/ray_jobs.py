"""The far end of Ray's Jobs REST API: an HTTP server that keeps jobs as a head does, and can be lost like one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Answer = tuple[int, str]


class Dashboard:
    """Answers as `ray.dashboard.modules.job` does.

    `requests` are those that were let in, as (method, path). `before` is called with each of them before it is carried
    out, and `after` before it is answered; either may return False, and the connection is cut without an answer.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.jobs: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.refused = 0
        self.broken = ""
        self.before: Callable[[str], object] = lambda _: None
        self.after: Callable[[str], object] = lambda _: None
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listens; after a `stop` on the same port."""
        dashboard = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                dashboard._serve(self)

            do_POST = do_DELETE = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                """Tests read `requests`."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Listens no more; the jobs stay."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def replace(self) -> None:
        """A new head in the place of the old one: it knows of no job."""
        self.jobs.clear()

    def end(self, status: str, code: int | None, message: str = "") -> None:
        """The driver of every job ends."""
        for job in self.jobs.values():
            job.update(status=status, driver_exit_code=code, message=message, end_time=time.time_ns() // 10**6)

    def count(self, method: str, path: str) -> int:
        """How many such requests were let in."""
        return self.requests.count((method, path))

    @property
    def submissions(self) -> int:
        return self.count("POST", "/api/jobs/")

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        body = json.loads(handler.rfile.read(length) or b"{}")
        if handler.headers.get("Authorization") != f"Bearer {self.token}":
            self.refused += 1
            _send(handler, (403, "Forbidden: Invalid authentication token"))
            return
        line = f"{handler.command} {handler.path}"
        self.requests.append((handler.command, handler.path))
        if self.before(line) is False:
            handler.close_connection = True
            return
        answer = (500, self.broken) if self.broken else self._answer(handler.command, handler.path, body)
        if self.after(line) is False:
            handler.close_connection = True
            return
        _send(handler, answer)

    def _answer(self, method: str, path: str, body: dict[str, Any]) -> Answer:
        if path == "/api/version":
            return 200, json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"})
        if (method, path) == ("POST", "/api/jobs/"):
            return self._submit(body)
        name, _, verb = path.removeprefix("/api/jobs/").partition("/")
        job = self.jobs.get(name)
        if job is None:
            return 404, f"Job {name} does not exist"
        over = job["status"] in ("STOPPED", "SUCCEEDED", "FAILED")
        if (method, verb) == ("GET", ""):
            return 200, json.dumps(job)
        if (method, verb) == ("POST", "stop"):
            if not over:
                job.update(status="STOPPED", message="Job was intentionally stopped.")
            return 200, json.dumps({"stopped": not over})
        if (method, verb) == ("DELETE", ""):
            if not over:
                return 500, f"Job '{name}' is still running: stop it first"
            del self.jobs[name]
            return 200, json.dumps({"deleted": True})
        return 404, "404: Not Found"

    def _submit(self, body: dict[str, Any]) -> Answer:
        name = body["submission_id"]
        if name in self.jobs:
            said = f"Job with submission_id {name} already exists. Please use a different submission_id."
            return 400, f"Traceback (most recent call last):\nValueError: {said}"
        self.jobs[name] = {
            "type": "SUBMISSION", "job_id": None, "submission_id": name, "driver_info": None, "status": "RUNNING",
            "entrypoint": body["entrypoint"], "message": "Job is currently running.", "error_type": None,
            "start_time": time.time_ns() // 10**6, "end_time": None, "metadata": body.get("metadata") or {},
            "runtime_env": body.get("runtime_env") or {}, "driver_agent_http_address": None, "driver_node_id": None,
            "driver_exit_code": None,
        }  # fmt: skip
        return 200, json.dumps({"job_id": name, "submission_id": name})


def _send(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    status, text = answer
    data = text.encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json" if status == 200 else "text/plain")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
