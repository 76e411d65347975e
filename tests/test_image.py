"""The image is made of what is pinned and committed, runs as nobody special, and does what a pod asks of it.

Built and tried where a Docker daemon is: on a base of that machine's own making, since none can be counted on to
be there, or on the one that `RAYLAUNCH_TEST_BASE_IMAGE` names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import __version__
from launcher.doctor import RAY_VERSION
from launcher.site import Site
from tests.rendered import K8S, ROOT

DOCKERFILE = K8S / "image" / "Dockerfile"
BASE = "raylaunch-test-base:local"
PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def steps(keyword: str) -> list[str]:
    """What stands behind a keyword, over all of its lines."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [line.partition(" ")[2].strip() for line in joined.splitlines() if line.startswith(f"{keyword} ")]


# -- what it is made of


def test_the_base_is_pinned_by_its_digest_and_nothing_else_is_pulled() -> None:
    (base,) = (item for item in steps("ARG") if item.startswith("BASE_IMAGE="))
    assert re.fullmatch(r"BASE_IMAGE=[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", base)
    assert {item.split()[0] for item in steps("FROM")} == {"${BASE_IMAGE}", "run"}
    assert steps("ADD") == []
    assert "latest" not in DOCKERFILE.read_text()
    assert not re.search(r"\b(curl|wget|apt-get|git clone|sudo)\b", " ".join(steps("RUN")))


def test_every_package_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["train"]]
    constraints = (ROOT / "constraints.txt").read_text()
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", constraints, re.MULTILINE)}
    assert {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~! ]", item)[0]).lower() for item in wanted} <= pinned
    assert f"\nray=={RAY_VERSION}\n" in constraints, "the version that doctor asks of a pool"
    for step in steps("RUN"):
        for command in re.findall(r"pip install[^&]*", step):
            assert (
                "--constraint constraints.txt" in command or "--no-deps" in command or re.search('==\\$\\w+"', command)
            )


def test_it_runs_as_the_user_that_pods_run_as_by_default() -> None:
    assert steps("USER")[-1] == f"{Site.model_fields['run_as_user'].default}:1000"


def test_no_secret_and_no_key_can_get_in() -> None:
    copied = {word for item in steps("COPY") for word in item.split()[:-1] if not word.startswith("--")}
    assert copied == {"pyproject.toml", "constraints.txt", "README.md", "launcher", "trainers", "/sbom.cdx.json"}
    assert not [item for item in [*steps("ARG"), *steps("ENV")] if re.search("KEY|TOKEN|SECRET|PASSWORD", item)]


def test_what_is_copied_is_what_git_has() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("this is no git checkout")
    tops = {name.partition("/")[0] for name in listed}
    assert {"pyproject.toml", "constraints.txt", "README.md", "launcher", "trainers"} <= tops
    assert {"k8s/image/Dockerfile", "k8s/image/build.sh", "k8s/image/smoke.sh"} <= set(listed)


# -- what it does


def _docker(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *words], capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image with Python 3.11: one that is given, or a Debian that is put together here."""
    if shutil.which("docker") is None or _docker("info").returncode:
        pytest.skip("no Docker daemon answers")
    if given := os.environ.get("RAYLAUNCH_TEST_BASE_IMAGE"):
        yield given
        return
    if shutil.which("debootstrap") is None or os.geteuid():
        pytest.skip("there is no RAYLAUNCH_TEST_BASE_IMAGE, and a base is made by root with debootstrap only")
    folder = tmp_path_factory.mktemp("base")
    root, archive = folder / "root", folder / "root.tar"
    subprocess.run(["debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv", "bookworm",
                    str(root)], check=True, capture_output=True, timeout=900)  # fmt: skip
    if CERTIFICATES.exists():  # whom this machine trusts, should a proxy of its own be between it and PyPI
        shutil.copy(CERTIFICATES, root / "etc" / "ssl" / "certs")
    with tarfile.open(archive, "w") as tar:
        tar.add(root, ".")
    shutil.rmtree(root)
    settings = (f"PATH={PATHS}", f"PIP_CERT={CERTIFICATES}", f"SSL_CERT_FILE={CERTIFICATES}")
    changes = [word for setting in settings for word in ("--change", f"ENV {setting}")]
    assert _docker("import", *changes, str(archive), BASE).returncode == 0
    archive.unlink()
    yield BASE
    _docker("rmi", BASE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_is_built_and_trains(base: str) -> None:
    """The committed code: what is not committed yet is not in it."""
    built = subprocess.run(
        [K8S / "image" / "build.sh", "raylaunch-test", "--build-arg", f"BASE_IMAGE={base}"],
        capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    image = built.stdout.splitlines()[-1]
    assert image.startswith("raylaunch-test:")
    assert image.endswith(f":{__version__}")
    try:
        done = subprocess.run(
            [K8S / "image" / "smoke.sh", image], capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "result    top-1" in done.stderr
    finally:
        _docker("rmi", image)
