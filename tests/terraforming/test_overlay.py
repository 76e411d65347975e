"""The file that carries Terraform's values to kubectl is the one that k8s/overlays/eks is tested with."""

from __future__ import annotations

import os

from tests.rendered import SITE, Object
from tests.terraforming.test_pool import outputs


def test_the_overlay_is_tested_with_what_terraform_says(plan: Object) -> None:
    """`RAYLAUNCH_GOLDEN=write` writes it anew; then tests/test_kustomize.py has to render the overlays anew too."""
    said = outputs(plan)["overlay"]
    if os.environ.get("RAYLAUNCH_GOLDEN") == "write":
        SITE.write_text(said)
    assert SITE.read_text() == said
