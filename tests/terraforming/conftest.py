"""One copy of the stack, one account and one plan for all tests that only look."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.terraforming.stack import Stack, account, needed


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack, with an account in which nothing is built."""
    needed()  # or skip, before an account is started in vain
    with account() as address:
        yield Stack(tmp_path_factory.mktemp("terraform"), address)


@pytest.fixture(scope="session")
def plan(stack: Stack) -> dict[str, Any]:
    """What the smallest example would build for a team that has data of its own."""
    return stack.plan("minimal", data_locations=["s3://team-images/flowers"])
