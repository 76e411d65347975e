"""What the operator asks a real Ray dashboard, over HTTP and with the cluster's token."""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from tests.kube.cluster import Cluster
from tests.kube.rayjob import JobInfo
from tests.kube.raynode import HeadPorts
from tests.kube.raypods import auth_secret_name
from tests.kube.schema import Object

INTERVAL = 0.5


class Dashboard:
    """Asks at most twice a second; in between the last answer holds."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._answers: dict[tuple[int, str], tuple[float, JobInfo | OSError | None]] = {}

    def job(self, ray_cluster: Object, ports: HeadPorts, job_id: str) -> JobInfo | None:
        """A job, or None if the dashboard does not know it; OSError if it does not answer."""
        asked, answer = self._answers.get((ports.dashboard, job_id), (0.0, None))
        if time.monotonic() - asked > INTERVAL:
            try:
                answer = self._ask(ray_cluster, ports, job_id)
            except OSError as error:
                answer = error
            self._answers[ports.dashboard, job_id] = (time.monotonic(), answer)
        if isinstance(answer, OSError):
            raise answer
        return answer

    def stop(self, ray_cluster: Object, ports: HeadPorts, job_id: str) -> None:
        """Asks for a job to stop."""
        self._request(ray_cluster, ports, f"/api/jobs/{job_id}/stop", "POST")

    def _ask(self, ray_cluster: Object, ports: HeadPorts, job_id: str) -> JobInfo | None:
        try:
            found = self._request(ray_cluster, ports, f"/api/jobs/{job_id}", "GET")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        return JobInfo(
            found["status"], found.get("message") or "", found.get("start_time") or 0, found.get("end_time") or 0
        )

    def _request(self, ray_cluster: Object, ports: HeadPorts, path: str, method: str) -> Any:
        headers = {}
        secret = auth_secret_name(ray_cluster)
        if secret:
            thing = self._cluster.get("secrets", ray_cluster["metadata"]["namespace"], secret) or {}
            token = base64.b64decode((thing.get("data") or {}).get("auth_token", "")).decode()
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(f"http://127.0.0.1:{ports.dashboard}{path}", method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            error.close()
            raise
        except (http.client.HTTPException, ValueError) as error:
            raise ConnectionError(f"the dashboard broke off in the middle of its answer: {error!r}") from error
