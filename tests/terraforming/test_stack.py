"""The stack is well-formed, passes its own tests, and says what is wrong with what it is given."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest

import launcher
from tests.terraforming.policy import RULES, resources
from tests.terraforming.stack import ROOT, SOURCE, Stack, settings


def test_every_file_is_written_as_terraform_writes_it() -> None:
    terraform = shutil.which("terraform")
    if terraform is None:
        pytest.skip("terraform is not installed")
    command = [terraform, "fmt", "-check", "-recursive", "-diff", str(SOURCE)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_it_is_valid_and_passes_its_own_tests(stack: Stack) -> None:
    assert "The configuration is valid." in stack.run("validate")
    said = stack.run("test")
    assert "Success!" in said, said
    assert "0 failed" in said, said


# One value is wrong in each; together they break every rule of every variable once, or twice.
WRONG: list[dict[str, Any]] = [
    {
        "region": "Ireland", "admin_principal_arns": [], "endpoint_cidrs": ["0.0.0.0/0"], "name": "-pool",
        "budget": {"monthly_usd": 0, "emails": []}, "zone_count": 1, "cache_gib": 5, "vpc_cidr": "10.0.0.0/20",
        "undelete_days": 0, "image_tag": "latest", "kubernetes_version": "1.29", "confirm_above": -1,
        "queue": "Team A", "system_nodes": {"count": 0}, "head_nodes": {"max_nodes": 0, "price_per_hour": -1},
        "run_limits": {"max_gpus": 1.5, "max_hours": 0}, "tags": {"Project": "mine"}, "gpu_types": [],
        "launcher_principal_arns": ["anna"], "data_locations": ["https://bucket/data"],
    },
    {
        "admin_principal_arns": ["arn:aws:iam::123456789012:role/*"], "endpoint_cidrs": ["::/0", "here"],
        "gpu_types": [
            {"name": "head", "instance_type": "a big one", "max_nodes": 0, "spot": {"price_per_hour": -1}},
            {"name": "head", "instance_type": "g5.xlarge", "max_nodes": 1},
        ],
    },
]  # fmt: skip
SENTENCES = {
    sentence
    for sentence in re.findall(r'error_message = "((?:[^"\\]|\\.)*)"', (SOURCE / "aws" / "variables.tf").read_text())
}


@pytest.mark.slow
def test_every_mistake_in_the_settings_is_told_in_its_own_sentence(stack: Stack) -> None:
    said = " ".join(
        " ".join(stack.run("plan", "-input=false", *settings("minimal", **wrong), code=1).replace("│", " ").split())
        for wrong in WRONG
    )
    assert len(SENTENCES) > 25
    assert [sentence for sentence in sorted(SENTENCES) if sentence not in said] == []


@pytest.mark.slow
def test_machines_that_cannot_train_are_refused_by_name(stack: Stack) -> None:
    wrong: list[dict[str, Any]] = [
        {"name": kind.replace(".", "-"), "instance_type": kind, "max_nodes": 1, "spot": {}}
        for kind in ("t3.medium", "g5g.xlarge", "g4dn.xlarge", "g5.xlarge")
    ]
    said = stack.run("plan", "-input=false", *settings("minimal", gpu_types=wrong, zone_count=6), code=1)
    for sentence in (
        "t3.medium has no NVIDIA GPU.",
        "g5g.xlarge is not an x86_64 machine; the image of the nodes is.",
        "The own disks of g4dn.xlarge do not hold a cache of 100 GiB beside 60 GiB of images.",
        "The region has 5 availability zones that EKS takes; lower zone_count.",
    ):
        assert sentence in " ".join(said.replace("│", " ").split())
    assert said.count("Error: ") == 4, "g5.xlarge can"


def test_the_stack_speaks_of_the_versions_there_are() -> None:
    ray = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert ray is not None
    assert f'ray_version     = "{ray[1]}"' in (SOURCE / "aws" / "outputs.tf").read_text()
    assert f'default     = "{launcher.__version__}"' in (SOURCE / "aws" / "variables.tf").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("example", ["spot", "team"])
def test_every_example_can_be_planned_and_keeps_the_rules(stack: Stack, example: str) -> None:
    planned = resources(stack.plan(example))
    assert {name: wrong for name, rule in RULES.items() if (wrong := list(rule(planned)))} == {}
