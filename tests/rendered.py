"""The overlays of k8s/ as `kubectl kustomize` renders them, for tests of what is applied. Asks no cluster."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

Object = dict[str, Any]

ROOT = Path(__file__).parent.parent
K8S = ROOT / "k8s"
SITE = ROOT / "tests" / "golden" / "k8s_site.yaml"
"""What `terraform output -raw overlay` says of examples/minimal.tfvars; `tests/terraforming` holds it to that."""
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
PODS = {"Deployment": ("spec", "template"), "DaemonSet": ("spec", "template")}
"""Where kinds of object keep their pods; a test refuses kinds that are not here."""


def kustomize(folder: Path) -> str:
    """What kubectl makes of the folder; skips the test where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on this machine")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@cache
def text(overlay: str, site: str | None = None) -> str:
    """The overlay with the values of `site`, in the notation that all versions of kubectl have in common."""
    with TemporaryDirectory() as folder:
        shutil.copytree(K8S, folder, dirs_exist_ok=True)
        if overlay == "eks":
            (Path(folder) / "overlays" / overlay / "site.yaml").write_text(site or SITE.read_text())
        documents = yaml.safe_load_all(kustomize(Path(folder) / "overlays" / overlay))
        return yaml.safe_dump_all(documents, width=200)


def objects(overlay: str, site: str | None = None) -> list[Object]:
    """Its objects, in the order in which they are applied."""
    return list(yaml.load_all(text(overlay, site), LOADER))


def one(found: list[Object], kind: str, name: str) -> Object:
    """The object of that kind and name."""
    (match,) = (item for item in found if (item["kind"], item["metadata"]["name"]) == (kind, name))
    return match


def templates(found: list[Object]) -> Iterator[tuple[str, Object]]:
    """The pod templates among objects, by the name of what makes the pods."""
    for item in found:
        if item["kind"] in PODS:
            place: Any = item
            for key in PODS[item["kind"]]:
                place = place[key]
            yield item["metadata"]["name"], place
