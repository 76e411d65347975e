"""What a Kubernetes pool says of itself: where it keeps runs, its image, its kinds of nodes, prices and limits.

It is written once by whoever owns the cluster, as YAML in a ConfigMap or in a pool file, and read strictly: every
mistake in it is told at once. Nothing here asks a cluster for anything.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from launcher.errors import SiteError, UserError, nearest

_SUFFIXES = {name: Decimal(1000) ** power for power, name in enumerate(["n", "u", "m", "", *"kMGTPE"], -3)}
_SUFFIXES |= {f"{name}i": Decimal(1024) ** power for power, name in enumerate("KMGTPE", 1)}


def quantity(text: str | int | float) -> float:
    """The number that a Kubernetes quantity (`28Gi`, `500m`, `7`) means; `ValueError` if it is none."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][-+]?[0-9]{1,2})?)([a-zA-Z]*)", str(text))
    try:
        if found is None or found[2] not in _SUFFIXES:
            raise ValueError
        return float(Decimal(found[1]) * _SUFFIXES[found[2]])
    except (ValueError, InvalidOperation):
        raise ValueError(f"{text!r} is not a quantity such as 28Gi or 500m") from None


def _some_quantity(text: str) -> str:
    if not quantity(text):
        raise ValueError(f"{text!r} is nothing")
    return text


Quantity = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value),
                     AfterValidator(_some_quantity)]  # fmt: skip
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Toleration(_Part):
    """A taint that pods may live with, as Kubernetes has it."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Offer(_Part):
    """One way to buy a node: its price, and what leads a pod to it beside the selector of the node type."""

    price_per_hour: float | None = Field(default=None, ge=0)
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()


class NodeType(_Part):
    """A kind of node. `cpus` and `memory` are what pods can use of one node, after the system's share."""

    name: Label
    gpus: int = Field(default=0, ge=0, le=64)
    gpu_name: str = ""
    bf16: bool = False
    cpus: float = Field(gt=0)
    memory: Quantity
    max_nodes: int = Field(ge=1)
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    on_demand: Offer | None = None
    spot: Offer | None = None

    @model_validator(mode="after")
    def _an_offer(self) -> NodeType:
        if self.on_demand is None and self.spot is None:
            raise ValueError("needs on_demand, spot, or both")
        return self

    def offer(self, spot: bool) -> Offer:
        """The offer; `UserError` if nodes of this type are not offered so."""
        found = self.spot if spot else self.on_demand
        if found is None:
            kinds = ("spot", "on demand") if spot else ("on demand", "spot")
            raise UserError(f"{self.name} is not offered {kinds[0]}, only {kinds[1]}", where="resources.spot",
                            hint="--no-spot" if spot else "--spot")  # fmt: skip
        return found


def _not_empty(kinds: tuple[NodeType, ...]) -> tuple[NodeType, ...]:
    if not kinds:
        raise ValueError("needs one node type or more")
    return kinds


class Head(_Part):
    """The pod that holds Ray's head and the driver. It has no GPU and must not be on spot."""

    cpus: Quantity = "2"
    memory: Quantity = "8Gi"
    price_per_hour: float = Field(default=0.0, ge=0)
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()


class Clocks(_Part):
    """The limits of every run on the pool; a spec may ask for less."""

    max_gpus: int | None = Field(default=None, ge=1)
    max_hours: float = Field(default=24.0, gt=0, le=24 * 365)
    start_minutes: float = Field(default=30.0, gt=0)
    idle_minutes: float = Field(default=30.0, gt=0)


class Site(_Part):
    """A Kubernetes pool. `env` is for settings, never for secrets; those are in the Secret named by `env_secret`."""

    image: str = Field(min_length=1)
    ray_version: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    storage: str = Field(pattern=r"^s3://.+")
    # With `min_length`, a type with a mistake in it would count as absent, and that as a mistake of its own.
    node_types: Annotated[tuple[NodeType, ...], AfterValidator(_not_empty)]
    service_account: Label = "default"
    gpu_resource: str = "nvidia.com/gpu"
    head: Head = Head()
    limits: Clocks = Clocks()
    queue: Label | None = None
    confirm_above: float = Field(default=25.0, ge=0)
    currency: str = "USD"
    cache_size: Quantity = "50Gi"
    cache_path: str | None = Field(default=None, pattern=r"^/.+")
    run_as_user: int = Field(default=1000, ge=1)
    env: dict[str, str] = {}
    env_secret: Label | None = None
    context: str | None = None
    namespace: Label | None = None

    @model_validator(mode="after")
    def _names_are_unique(self) -> Site:
        names = [kind.name for kind in self.node_types]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"node_types: {', '.join(twice)} stands twice")
        return self

    def node_type(self, name: str | None) -> NodeType:
        """The type of that name, or the first; `UserError` lists them."""
        names = [kind.name for kind in self.node_types]
        if name is not None and name not in names:
            close = nearest(name, names)
            raise UserError(f"the pool has no node type {name}" + (f"; {close}" if close else ""), where="--gpu",
                            hint=f"it has {', '.join(names)}")  # fmt: skip
        return self.node_types[names.index(name) if name else 0]


def read_site(text: str, where: str) -> Site:
    """The site that a YAML text describes; `SiteError` lists every mistake. `where` names the text for the user."""
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise SiteError(f"the pool is not valid YAML: {line}{problem or str(error).splitlines()[0]}", where=where,
                        hint="the owner of the cluster mends it") from None  # fmt: skip
    return site_from(document, where)


def site_from(document: Any, where: str) -> Site:
    """`read_site` for what YAML has been read from already."""
    try:
        # Through JSON's eyes, so that a list is a tuple.
        return Site.model_validate(_tuples(document))
    except ValidationError as error:
        problems = [f"  {_place(item['loc'])}{item['msg'].removeprefix('Value error, ')}"
                    for item in error.errors(include_url=False)]  # fmt: skip
        raise SiteError(
            "mistakes in the description of the pool:\n" + "\n".join(problems), where=where,
            hint="docs/cluster.md lists the fields; the owner of the cluster mends it",
        ) from None  # fmt: skip


def _place(location: tuple[Any, ...]) -> str:
    return f"{'.'.join(str(part) for part in location)}: " if location else ""


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value
