"""`make demo-cluster`: an emulated Kubernetes cluster on this machine, and the commands that use it.

API server, KubeRay, scheduler and kubelet are imitated; S3 is moto's server; Ray, the submitter, the driver and the
training are real. With `--keep` the cluster stays until Ctrl-C, for trying commands in another terminal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from moto.server import ThreadedMotoServer

from tests.kube.site import POOL, Site, processes

COMMANDS = (
    ("pools",),
    ("doctor", "--cluster", POOL),
    ("--cluster", POOL, "--data", "sample://digits", "--workers", "2", "--name", "first", "--epochs", "4"),
    ("list", "--cluster", POOL),
    ("gc", "--cluster", POOL),
)


def main() -> int:
    """Runs the commands, or keeps the cluster; the exit code of the first command that failed."""
    import logging

    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    os.environ.update(settings)
    boto3.client("s3").create_bucket(Bucket="demo")
    with tempfile.TemporaryDirectory() as folder, Site(Path(folder), "s3://demo/runs", processes) as site:
        settings["KUBECONFIG"] = str(site.kubeconfig)
        if "--keep" in sys.argv:
            print("\n".join(f"export {name}={value}" for name, value in settings.items()), flush=True)
            threading.Event().wait()
        for words in COMMANDS:
            print(f"\n$ launch {' '.join(words)}", flush=True)
            code = subprocess.run([sys.executable, "-m", "launcher", *words], env=os.environ | settings, check=False)
            if code.returncode:
                return code.returncode
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # However it is ended, the processes of its pods end too.
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
