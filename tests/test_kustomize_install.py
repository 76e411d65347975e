"""What is rendered can be applied, and k8s/install.sh does so in the order that works, and waits for each part."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import main
from launcher.s3 import s3_client
from tests.kube.apiserver import ApiServer
from tests.rendered import K8S, OVERLAYS, SITE, objects, text

KUBERAY = [
    "apply --server-side -k operators/kuberay",
    "wait --for=condition=Established --timeout=2m crd/rayjobs.ray.io crd/rayclusters.ray.io",
    "--namespace kuberay-system rollout status deployment/kuberay-operator --timeout=10m",
]
KUEUE = [
    "apply --server-side -k operators/kueue",
    "wait --for=condition=Established --timeout=2m crd/clusterqueues.kueue.x-k8s.io crd/localqueues.kueue.x-k8s.io",
    "--namespace kueue-system rollout status deployment/kueue-controller-manager --timeout=10m",
]
EKS = ["apply --server-side -k overlays/eks",
       "--namespace kube-system rollout status deployment/cluster-autoscaler --timeout=10m"]  # fmt: skip


def _apply(api: ApiServer, folder: Path, overlay: str) -> subprocess.CompletedProcess[str]:
    """As the real kubectl does it, to an emulated API server."""
    file, kubeconfig = folder / "objects.yaml", api.kubeconfig(folder, namespace="default")
    file.write_text(text(overlay))
    words = ["kubectl", "--kubeconfig", str(kubeconfig), "apply", "--server-side", "-f", str(file)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_applied_in_one_go_and_again_without_harm(overlay: str, api: ApiServer, tmp_path: Path) -> None:
    api.kueue_installed = True
    for _ in range(2):
        done = _apply(api, tmp_path, overlay)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == len(objects(overlay))


def test_a_queue_before_kueue_is_refused(api: ApiServer, tmp_path: Path) -> None:
    """Why operators come first."""
    done = _apply(api, tmp_path, "eks")
    assert done.returncode != 0
    assert "could not find the requested resource" in done.stderr


@pytest.mark.usefixtures("s3")
def test_doctor_finds_all_that_was_applied(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.kueue_installed = True
    assert _apply(api, tmp_path, "eks").returncode == 0
    s3_client().create_bucket(Bucket="gpu-pool-runs-123456789012")
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path, namespace="raylaunch")))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    said = CliRunner().invoke(main, ["doctor", "--cluster", "gpu-pool", "-o", "json"])
    checks = json.loads(said.stdout)
    assert [check for check in checks if not check["ok"]] == []
    assert [check["name"] for check in checks] == [
        "cluster", "permissions", "kuberay", "image", "service account", "queue", "storage", "gpus", "autoscaler",
        "device plugin", "network", "pod security",
    ]  # fmt: skip


class Place:
    """A copy of k8s/, and a kubectl that renders as the real one does, asks no cluster, and notes what it was asked."""

    def __init__(self, folder: Path) -> None:
        real = shutil.which("kubectl")
        if real is None:
            pytest.skip("kubectl is not on this machine")
        self.k8s, self.log = folder / "k8s", folder / "asked"
        shutil.copytree(K8S, self.k8s)
        (self.k8s / "overlays" / "eks" / "site.yaml").write_text(SITE.read_text())
        stub = folder / "bin" / "kubectl"
        stub.parent.mkdir()
        stub.write_text(f"""#!/bin/bash
if [ "$1" = kustomize ]; then exec {real} "$@"; fi
echo "$*" >> {self.log}
if [[ "$*" = *"$REFUSES"* ]]; then exit 1; fi
""")
        stub.chmod(0o755)

    def install(self, *words: str, refuses: str = "nothing") -> tuple[subprocess.CompletedProcess[str], list[str]]:
        environment = {"PATH": f"{self.k8s.parent}/bin:{os.environ['PATH']}", "REFUSES": refuses,
                       "HOME": str(self.k8s.parent)}  # fmt: skip
        done = subprocess.run([self.k8s / "install.sh", *words], env=environment, capture_output=True, text=True,
                              timeout=60, check=False)  # fmt: skip
        return done, self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_operators_come_first_and_each_is_waited_for(place: Place) -> None:
    done, asked = place.install("eks")
    assert (done.returncode, asked) == (0, [*KUBERAY, *KUEUE, *EKS])
    assert "launch doctor --cluster gpu-pool --namespace raylaunch" in done.stdout


def test_a_pool_without_a_queue_gets_no_kueue(place: Place) -> None:
    done, asked = place.install("kind")
    assert (done.returncode, asked) == (0, [*KUBERAY, "apply --server-side -k overlays/kind"])
    assert "launch doctor --cluster cpu-pool" in done.stdout


def test_without_the_values_of_terraform_nothing_is_applied_and_the_command_is_said(place: Place) -> None:
    (place.k8s / "overlays" / "eks" / "site.yaml").write_text("")
    done, asked = place.install("eks")
    assert (done.returncode, asked) == (2, [])
    assert "terraform -chdir=terraform/aws output -raw overlay > k8s/overlays/eks/site.yaml" in done.stderr


def test_without_an_overlay_the_overlays_are_named(place: Place) -> None:
    done, asked = place.install()
    assert done.returncode != 0
    assert asked == []
    assert "eks kind" in done.stderr


@pytest.mark.parametrize("last", [KUBERAY[0], KUBERAY[2], KUEUE[1], EKS[0]])
def test_what_fails_ends_it_there(place: Place, last: str) -> None:
    done, asked = place.install("eks", refuses=last)
    assert done.returncode != 0
    assert asked[-1] == last
    assert "launch doctor" not in done.stdout
