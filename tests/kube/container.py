"""One container as a process tree: its lives, its log, its readiness. Knows nothing of pods beyond its own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.kube.cluster import Cluster, ContainerLog
from tests.kube.podstatus import container_status, running, terminated, waiting
from tests.kube.schema import Object

SHIM = Path(__file__).with_name("shim.py")
PROBE_INTERVAL = 0.3
LONGEST_DELAY = 300.0
# SIGKILL waits for nothing, but a machine may have much else to do.
LONGEST_END = 60.0


class Container:
    """Starts a command, restarts it as its pod's policy says, and says what became of it."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        pod: str,
        spec: Object,
        words: list[str],
        env: dict[str, str],
        folder: Path,
        probe: Callable[[], bool] | None,
        ready_text: str = "",
    ) -> None:
        """Ready when `probe` says so, and not before `ready_text` is in the log; without a probe at once."""
        self.exit_code = 0
        self.restarts = 0
        self._cluster, self._namespace, self._pod = cluster, namespace, pod
        self._spec, self._words, self._env, self._folder = spec, words, env, folder
        self._probe, self._ready_text = probe, ready_text
        self._log: ContainerLog | None = None
        self._shim: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._ready = False
        self._began = 0.0
        self._probe_at = 0.0
        self._restart_at: float | None = None
        self._state: Object = waiting("ContainerCreating")
        self._last: Object = {}

    def start(self) -> None:
        """Begins a life."""
        self._log = log = self._cluster.open_log(self._namespace, self._pod, self._spec["name"])
        self._shim = subprocess.Popen(
            [sys.executable, "-P", str(SHIM), *self._words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self._folder,
            env=self._env,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=_copy_output, args=(self._shim, log), daemon=True)
        self._reader.start()
        self._began, self._ready, self._restart_at = time.monotonic(), self._probe is None, None
        self._state = running()

    def alive(self) -> bool:
        """Whether it runs now."""
        return self._shim is not None and self._shim.poll() is None

    def starting(self, timeout: float) -> bool:
        """Whether it runs but is not ready yet, and has not had too much time for it."""
        return self.alive() and not self._ready and time.monotonic() - self._began < timeout

    def will_restart(self, policy: str) -> bool:
        """Whether a container that has ended will come again."""
        return policy == "Always" or (policy == "OnFailure" and self.exit_code != 0)

    def look(self, policy: str, delay: float) -> None:
        """Notices an end, restarts when it is time, probes for readiness."""
        if self.alive():
            if not self._ready and self._probe is not None and time.monotonic() >= self._probe_at:
                self._ready = self._has_said_so() and self._probe()
                self._probe_at = time.monotonic() + PROBE_INTERVAL
        elif self._shim is not None:
            self._note_end()
            if self.will_restart(policy):
                pause = 0.0 if self.restarts == 0 else min(LONGEST_DELAY, delay * 2 ** (self.restarts - 1))
                self._restart_at = time.monotonic() + pause
                if pause:
                    text = f"back-off {pause:.0f}s restarting failed container={self._spec['name']} pod={self._pod}"
                    self._last, self._state = self._state, waiting("CrashLoopBackOff", text)
        elif self._restart_at is not None and time.monotonic() >= self._restart_at:
            self._last = self._state if "terminated" in self._state else self._last
            self.restarts += 1
            self.start()

    def terminate(self) -> None:
        """SIGTERM to the main process; no restart."""
        self._restart_at = None
        if self._shim is not None and self.alive():
            self._shim.terminate()

    def kill(self) -> None:
        """SIGKILL to everything in it."""
        if self._shim is not None and self._shim.stdin is not None and not self._shim.stdin.closed:
            self._shim.stdin.close()

    def close(self) -> None:
        """Kills, and waits until nothing is left."""
        self._restart_at = None
        self.kill()
        if self._shim is not None:
            self._shim.wait(LONGEST_END)
            self._note_end()

    def processes(self) -> list[psutil.Process]:
        """What runs in it, the main process first."""
        shim = self._shim
        if shim is None or shim.poll() is not None:
            return []
        try:
            found: list[psutil.Process] = psutil.Process(shim.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return found

    def status(self) -> Object:
        """Its entry in `containerStatuses`."""
        ready = self._ready and self.alive()
        return container_status(self._spec, self._state, ready=ready, restarts=self.restarts, last=self._last)

    def _has_said_so(self) -> bool:
        lines = self._log.lines if self._log else []
        return any(self._ready_text in line for _, line in lines)

    def _note_end(self) -> None:
        if self._shim is None:
            return
        self.kill()
        self.exit_code = self._shim.wait()
        if self._reader is not None:
            self._reader.join(5)
        self._shim, self._ready = None, False
        began = self._state.get("running", {}).get("startedAt")
        self._state = terminated(self.exit_code, "" if self.exit_code != 128 else "StartError")
        if began:
            self._state["terminated"]["startedAt"] = began


def _copy_output(shim: subprocess.Popen[bytes], log: ContainerLog) -> None:
    """Container output becomes log lines, until the last process that holds the pipe is gone."""
    assert shim.stdout is not None
    # Closed by its reader: whoever closes it from another thread waits for the end of a read that may never end.
    with shim.stdout:
        for line in shim.stdout:
            log.write(line.decode(errors="replace"))
    log.close()
