"""A copy of terraform/ in which to plan and to build. Finds what Terraform needs on this machine; downloads nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "terraform"
MIRRORS = ("/usr/local/share/terraform/plugins", "~/.terraform.d/plugins", *map(str, Path("/opt").glob("*")))
"""Where Terraform's provider may lie; the first is what RAYLAUNCH_TEST_TERRAFORM_MIRROR says, if it is set."""

# What the provider has to know to find one machine instead of a cloud.
OVERRIDE = """
provider "aws" {
  s3_use_path_style       = true
  skip_metadata_api_check = true
  max_retries             = 2
}
"""
CONFIG = """
provider_installation {
  filesystem_mirror {
    path = "%s"
  }
}
disable_checkpoint = true
"""


class Stack:
    """A copy of terraform/, initialized; `address` is the account it is for, if it is for any."""

    def __init__(self, folder: Path, address: str = "", *backend: str) -> None:
        """Without `backend` the state is in a file; otherwise backend.tf.example says where, with these changes."""
        self._folder, self._terraform, mirror = folder, *needed()
        not_ours = shutil.ignore_patterns(".terraform", "*.tfstate*", "terraform.tfvars", "*.auto.tfvars", "backend.tf")
        shutil.copytree(SOURCE, folder / "terraform", ignore=not_ours)
        self.root = folder / "terraform" / "aws"
        (self.root / "test_override.tf").write_text(OVERRIDE)
        if backend:
            shutil.copy(self.root / "backend.tf.example", self.root / "backend.tf")
        (folder / "terraformrc").write_text(CONFIG % mirror)
        self._env = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "TF_CLI_ARGS": "-no-color", "TF_IN_AUTOMATION": "1",
            "TF_CLI_CONFIG_FILE": str(folder / "terraformrc"), "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_ENDPOINT_URL": address,
        }  # fmt: skip
        self.run("init", "-input=false", "-lockfile=readonly", *(f"-backend-config={each}" for each in backend))

    def run(self, *words: str, code: int = 0) -> str:
        """What a command prints, which must end with `code`."""
        done = subprocess.run(
            [self._terraform, *words], check=False, cwd=self.root, env=self._env, capture_output=True, text=True
        )
        said = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == code, f"terraform {' '.join(words)} ended with {done.returncode}:\n{said[-8000:]}"
        return said

    def plan(self, example: str, **variables: Any) -> dict[str, Any]:
        """The plan of an example with other variables, as `terraform show -json` has it."""
        file = self._folder / "plan"
        self.run("plan", "-input=false", f"-out={file}", *settings(example, **variables))
        plan: dict[str, Any] = json.loads(self.run("show", "-json", str(file)))
        return plan


def settings(example: str, **variables: Any) -> list[str]:
    """The arguments that choose an example, with other variables."""
    return [f"-var-file=examples/{example}.tfvars", *(f"-var={key}={json.dumps(it)}" for key, it in variables.items())]


def needed() -> tuple[str, Path]:
    """Terraform and the folder that mirrors its provider; the test is skipped where one of them is not there."""
    terraform = shutil.which("terraform")
    if terraform is None:
        pytest.skip("terraform is not installed")
    places = [Path(each).expanduser() for each in (os.environ.get("RAYLAUNCH_TEST_TERRAFORM_MIRROR"), *MIRRORS) if each]
    for place in places:
        if (place / "registry.terraform.io" / "hashicorp" / "aws").is_dir():
            return terraform, place
    pytest.skip(f"Terraform's provider for AWS is in none of {', '.join(map(str, places))}")


@contextmanager
def account() -> Iterator[str]:
    """The address of an AWS account that is empty and ends with the block."""
    command = [sys.executable, "-m", "tests.terraforming.aws"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        try:
            address = server.stdout.readline().strip()
            assert address, "the account does not start"
            yield address
        finally:
            server.stdin.close()
