"""What a container runtime does for one container: its command as init process, and nothing left when that ends.

    python shim.py COMMAND [ARGUMENT...]

SIGTERM goes on to the command. A byte on stdin, or its end (whoever started this is gone), kills everything at once.
Every process the command leaves behind becomes a child of this one and is killed with it. Exit code as the command's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

import psutil

_PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    """Runs a command as the only container of this process tree."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    null = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    try:
        child = os.posix_spawnp(command[0], command, os.environ, file_actions=null, setsid=True)
    except OSError as error:
        print(f"failed to create containerd task: exec: {command[0]!r}: {error}", flush=True)
        return 128

    def pass_on(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch_stdin, daemon=True).start()
    code = _wait_for(child)
    _kill_descendants()
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return code


def _wait_for(child: int) -> int:
    """Reaps whatever ends, until the command does."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code


def _watch_stdin() -> None:
    os.read(0, 1)
    _kill_descendants()


def _kill_descendants() -> None:
    """Runs in either thread, while the other may reap: any process may vanish, and none is waited for by its number."""
    while left := [one for one in psutil.Process().children(recursive=True) if _alive(one)]:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(main(sys.argv[1:]))
