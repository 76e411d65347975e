"""Example pools as their owners would write them, and plans for runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from launcher.plan import Plan, resolve
from launcher.pools import Pool
from launcher.site import Site, read_site
from launcher.spec import Data, Spec

FACTS: dict[str, Any] = {
    "images": 100_000, "bytes": 10**10, "classes": 10, "train": 80_000, "val": 20_000, "test": 0, "ignored": 0,
    "smallest_class": ["daisy", 900], "largest_class": ["tulip", 1_100],
}  # fmt: skip


def config_map(name: str) -> dict[str, Any]:
    """The ConfigMap that describes the pool."""
    document: dict[str, Any] = yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text())
    return document


def site(name: str = "gpu-pool", **changes: Any) -> Site:
    """What the pool says of itself, with other values for some fields."""
    text = config_map(name)["data"]["pool.yaml"]
    return read_site(yaml.safe_dump({**yaml.safe_load(text), **changes}), name)


def pool(name: str = "gpu-pool", **changes: Any) -> Pool:
    """The pool, seen as nodes of its first type."""
    return Pool.of(name, site(name, **changes))


def plan(where: Pool, uri: str = "s3://data/flowers", spent: float = 0.0, **asked: Any) -> Plan:
    """The plan of a run there; `asked` are spec fields with `__` for the dot."""
    spec = Spec(data=Data(uri=uri)).updated({key.replace("__", "."): value for key, value in asked.items()})
    assert where.site is not None
    return resolve(
        spec, where, facts=FACTS, given={"data.uri": "--data"}, spent=spent,
        defaults={"name": "flowers-1123", "storage": where.site.storage},
        model_facts=lambda _: {"size": 224, "fixed": False, "weights": True},
    )  # fmt: skip
