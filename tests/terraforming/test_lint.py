"""A security linter has nothing against the stack but what is excused beside it, each time with a reason."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from tests.terraforming.stack import ROOT, SOURCE


@pytest.mark.slow
def test_a_security_linter_finds_nothing_that_is_not_excused() -> None:
    checkov = shutil.which("checkov", path=str(ROOT / ".venv" / "checkov" / "bin")) or shutil.which("checkov")
    if checkov is None:
        pytest.skip("checkov is not installed; make lint-terraform does it")
    command = [checkov, "--directory", str(SOURCE), "--framework", "terraform", "--skip-download", "--output", "json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert [(each["check_id"], each["resource"]) for each in found["results"]["failed_checks"]] == []
    assert found["summary"]["passed"] > 90, "it has looked"
    excused = {each["check_id"] for each in found["results"]["skipped_checks"]}
    assert excused == {check for check, _ in _excuses()}, "no excuse outlives what it was for"


def test_every_excuse_has_a_reason() -> None:
    assert all(len(reason.split()) > 3 for _, reason in _excuses())


def _excuses() -> list[tuple[str, str]]:
    """Check and reason of every comment that excuses something."""
    text = "\n".join(path.read_text() for path in sorted(SOURCE.rglob("*.tf")))
    return re.findall(r"#checkov:skip=(\w+):?(.*)", text)
