"""spec + pool + what is known of the data -> Plan: every choice made, and why. Pure: no I/O, no clock, no chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launcher.errors import UserError
from launcher.layout import Layout, lay_out
from launcher.pools import Pool
from launcher.spec import Spec, fields

DEPTHWISE = ("mobilenet", "efficientnet", "tf_efficientnet", "mnasnet", "convnext", "ghostnet", "fbnet", "mixnet")
"""Families that compute faster in NHWC on a CPU; measured 1.4 times for EfficientNet-Lite0, and none for ResNet-18."""

CLUSTER_FIELDS = ("resources.node_type", "resources.spot", "resources.priority", "limits.max_hours", "limits.max_cost",
                  "limits.start_minutes", "limits.idle_minutes")  # fmt: skip
"""What only a run on a cluster has."""

SAMPLE_CHOICES: dict[str, dict[str, tuple[Any, str]]] = {
    "sample://digits": {
        "model.name": ("resnet10t", "ample for digits, and quick on a CPU"),
        "model.pretrained": ("none", "digits are not photos, and nothing is downloaded for a sample"),
        "data.image_size": (32, "the digits have 8 pixels a side"),
        "train.epochs": (12, "it has converged by then"),
        "augment.flip": (False, "a mirrored digit is another digit"),
        "augment.crop_scale": ((0.7, 1.0), "a digit must stay whole"),
    }
}
"""What suits a built-in sample better than the rules for photos."""


@dataclass(frozen=True)
class Choice:
    """The value of one field. `source` is `you`, `chosen` (by a rule, from data and machine) or `default`."""

    key: str
    value: Any
    source: str
    why: str


@dataclass(frozen=True)
class Plan:
    """What will be done. `spec` has no open choice left; `facts` is `Index.facts()`, or empty if unknown.

    `layout` is how a Kubernetes pool carries it out, None on this machine.
    """

    spec: Spec
    pool: Pool
    choices: tuple[Choice, ...]
    facts: dict[str, Any]
    warnings: tuple[str, ...]
    layout: Layout | None = None

    @property
    def workers(self) -> int:
        return self.spec.resources.workers or 1

    @property
    def steps_per_epoch(self) -> int | None:
        train = self.facts.get("train")
        return math.ceil(train / (self.spec.train.batch_size or 1)) if train else None

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "pool": self.pool.name,
            "machine": {key: value for key, value in vars(self.pool).items() if key != "site"},
            "layout": self.layout.to_json() if self.layout else None,
            "workers": self.workers,
            "steps_per_epoch": self.steps_per_epoch,
            "facts": self.facts,
            "warnings": list(self.warnings),
            "choices": [asdict(choice) for choice in self.choices],
        }


def resolve(
    spec: Spec,
    pool: Pool,
    *,
    facts: dict[str, Any],
    given: Mapping[str, str],
    defaults: Mapping[str, str],
    model_facts: Any,
    spent: float = 0.0,
) -> Plan:
    """Fills every open field of `spec`.

    Args:
        spec: what the user asked for.
        pool: where it will run.
        facts: `Index.facts()`; may be empty.
        given: origin of each field the user set, by dotted name.
        defaults: the `name` and `storage` to take where the user gave none.
        model_facts: `catalog.model_facts`, called with the model's name.
        spent: what earlier attempts of the run have cost.
    """
    if pool.site is not None:
        pool = Pool.of(pool.name, pool.site, spec.resources.node_type)
    rules = _Rules(spec, pool, facts, model_facts)
    for key in ("name", "storage"):
        rules.choose(key, defaults[key], fields()[key].json_schema_extra["why"])
    rules.cluster()
    rules.model()
    rules.resources()
    rules.training()
    resolved = spec.updated(rules.values)
    return Plan(
        resolved, pool, _choices(resolved, rules.reasons, given), facts, tuple(_warnings(resolved, pool, facts)),
        lay_out(resolved, pool.site, spent) if pool.site else None,
    )  # fmt: skip


class _Rules:
    """The rules for open fields, in an order in which each may use what was chosen before."""

    def __init__(self, spec: Spec, pool: Pool, facts: dict[str, Any], model_facts: Any) -> None:
        self.asked = spec.flat()
        self.pool = pool
        self.facts = facts
        self.model_facts = model_facts
        self.values: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}
        self.sample = SAMPLE_CHOICES.get(spec.data.uri, {})

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key, self.asked[key])

    def choose(self, key: str, value: Any, why: str) -> None:
        """Takes the value, or that of the sample, unless the user has one."""
        if self.asked[key] is None:
            self.values[key], self.reasons[key] = self.sample.get(key, (value, why))

    def cluster(self) -> None:
        """Where on a Kubernetes pool, and for how long; this machine has no such choices."""
        site = self.pool.site
        if site is None:
            foreign = [key for key, value in self.asked.items() if value is not None and key in CLUSTER_FIELDS]
            if foreign:
                raise UserError("only runs on a cluster have this", where=", ".join(foreign),
                                hint="add --cluster POOL, or leave it out")  # fmt: skip
            return
        kind = site.node_type(self.asked["resources.node_type"])
        self.choose("resources.node_type", kind.name, f"the first node type of {self.pool.name}")
        spot = kind.on_demand is None
        self.choose("resources.spot", spot, f"{kind.name} is offered {'as spot only' if spot else 'on demand'}")
        for clock in ("max_hours", "start_minutes", "idle_minutes"):
            limit, key = getattr(site.limits, clock), f"limits.{clock}"
            if (self.asked[key] or 0) > limit:
                raise UserError(f"{self.pool.name} allows {limit:g} at most", where=key, hint="ask for less")
            self.choose(key, limit, f"the limit of {self.pool.name}")

    def model(self) -> None:
        if self.pool.gpus:
            self.choose("model.name", "resnet50", "strong and fast on every GPU; most published recipes use it")
        else:
            self.choose("model.name", "resnet18", "there is no GPU here, and larger models are slow on a CPU")
        known = self.model_facts(self["model.name"])
        if known and not known["weights"]:
            self.choose("model.pretrained", "none", "timm has no weights for this model")
        else:
            self.choose("model.pretrained", "hub", "fine-tuning beats training anew; downloaded once from the timm hub")
        size = known.get("size", 224)
        made = f"{self['model.name']} was made for {size} pixels"
        self.choose("data.image_size", size, made if known else "most models were made for it")
        if known.get("fixed") and self["data.image_size"] != size:
            raise UserError(f"{self['model.name']} takes images of {size} pixels only", where="data.image_size",
                            hint=f"--image-size {size}, or another --model")  # fmt: skip

    def resources(self) -> None:
        pool = self.pool
        where = f"a node of {self['resources.node_type']}" if pool.site else pool.name
        self.choose("resources.gpus_per_worker", min(pool.gpus, 1), f"{where} has {count(pool.gpus, 'GPU')}")
        on_gpu = self["resources.gpus_per_worker"] > 0
        batch = self["train.batch_size"]
        allowed = pool.site.limits.max_gpus if pool.site else None
        usual = min(pool.gpus, allowed or pool.gpus)
        busy = max(1, batch // self["train.accumulate"]) if batch else usual
        if not on_gpu:
            self.choose("resources.workers", 1, "one process uses all cores best")
        elif busy < usual:
            self.choose("resources.workers", busy, f"a batch of {batch} has no work for more")
        else:
            of_node = " of a node" if pool.nodes > 1 else ""
            why = (
                f"one for each GPU{of_node}"
                if usual == pool.gpus
                else f"{pool.name} allows {count(usual, 'GPU')} a run"
            )
            self.choose("resources.workers", max(1, usual), why)
        workers, gpus = self["resources.workers"], pool.gpus * pool.nodes
        if on_gpu and workers > min(gpus, allowed or gpus):
            fewer = f"--workers {min(gpus, allowed or gpus)}, or " if gpus else ""
            has = f"allows {count(allowed, 'GPU')} a run" if allowed and allowed < gpus else f"has {count(gpus, 'GPU')}"
            raise UserError(
                f"{count(workers, 'worker')} on {count(workers, 'GPU')}, but {pool.name} {has}",
                where="resources", hint=f"{fewer}--set resources.gpus_per_worker=0 to train on the CPU",
            )  # fmt: skip
        sharing = workers if pool.site is None else pool.gpus if on_gpu else 1
        self.choose("resources.cpus_per_worker", max(1, pool.cpus // sharing),
                    f"{count(pool.cpus, 'core')} for {count(sharing, 'worker')}")  # fmt: skip
        if on_gpu:
            self.choose("train.precision", "bf16" if pool.bf16 else "fp16", f"faster than fp32 on {pool.gpu_type}")
            self.choose("train.channels_last", True, "the layout of tensor cores")
        else:
            self.choose("train.precision", "fp32", "CPUs without AMX compute bf16 many times slower")
            depthwise = self["model.name"].startswith(DEPTHWISE)
            self.choose("train.channels_last", depthwise, "faster on a CPU for depthwise networks only")

    def training(self) -> None:
        images = self.facts.get("train", 10_000)
        workers, parts = self["resources.workers"], self["train.accumulate"]
        batch = 64 * workers if self["resources.gpus_per_worker"] else 32
        while batch > 16 and images / batch < 20:
            batch //= 2
        least = 2 * workers * parts
        if batch < least:
            self.choose("train.batch_size", least, f"at least two images for each of {workers} workers x {parts} parts")
        elif images / batch < 20:
            self.choose("train.batch_size", batch, f"{images:,} images are few: a small batch makes more steps of them")
        else:
            self.choose(
                "train.batch_size", batch, f"makes {math.ceil(images / batch):,} steps an epoch of {images:,} images"
            )
        batch = self["train.batch_size"]
        steps = math.ceil(images / batch)
        anew = self["model.pretrained"] == "none"
        wanted = 6000 if anew else 2000
        epochs = min(max(math.ceil(wanted / steps), 10), 30)
        self.choose("train.epochs", epochs, f"about {wanted:,} steps train it, within 10 to 30 epochs")
        epochs = self["train.epochs"]
        self.choose("optim.warmup_epochs", round(min(5.0, epochs * 0.05), 2), "5 % of the run, at most 5 epochs")
        if anew:
            self.choose(
                "optim.lr", round(0.1 * batch / 256, 6), "0.1 for each 256 images of a batch (Goyal et al. 2017)"
            )
            self.choose("optim.weight_decay", 5e-4, "usual when training anew with SGD")
            self.choose("augment.crop_scale", (0.08, 1.0), "the ImageNet recipe (Szegedy et al. 2015)")
        else:
            self.choose(
                "optim.lr", round(0.01 * batch / 64, 6), "0.01 for each 64 images: pretrained weights move gently"
            )
            self.choose("optim.weight_decay", 1e-4, "light: pretrained weights are good already")
            self.choose("augment.crop_scale", (0.35, 1.0), "milder than training anew: the object stays in view")
        self.choose("augment.flip", True, fields()["augment.flip"].json_schema_extra["why"])


def count(number: int, thing: str) -> str:
    """`no GPU`, `1 GPU`, `2 GPUs`."""
    return f"{number or 'no'} {thing}{'s' * (number > 1)}"


def _choices(spec: Spec, reasons: Mapping[str, str], given: Mapping[str, str]) -> tuple[Choice, ...]:
    made = []
    for key, value in spec.flat().items():
        extra = fields()[key].json_schema_extra or {}
        if key in reasons:
            made.append(Choice(key, value, "chosen", reasons[key]))
        elif key in given:
            made.append(Choice(key, value, "you", given[key]))
        else:
            made.append(Choice(key, value, "default", str(extra.get("why", ""))))
    return tuple(made)


def _warnings(spec: Spec, pool: Pool, facts: dict[str, Any]) -> list[str]:
    found = []
    workers, cpus = spec.resources.workers or 1, spec.resources.cpus_per_worker or 1
    if pool.site is None and workers * cpus > pool.cpus:
        found.append(f"{workers} workers x {cpus} cores share the {pool.cpus} cores of {pool.name}")
    if facts and facts["smallest_class"][1] * 10 <= facts["largest_class"][1]:
        (least, few), (most, many) = facts["smallest_class"], facts["largest_class"]
        found.append(f"classes are uneven: {most} has {many:,} images, {least} {few:,}; read macro F1 beside top-1")
    if facts.get("ignored"):
        found.append(f"{facts['ignored']:,} files are not images and are left out")
    if (spec.augment.mixup or spec.augment.cutmix) and spec.optim.label_smoothing:
        found.append("mixup and cutmix smooth the labels already; optim.label_smoothing comes on top")
    if (spec.optim.warmup_epochs or 0) >= (spec.train.epochs or 1):
        found.append(f"the warm-up lasts all {spec.train.epochs} epochs: the learning rate never reaches its peak")
    if spec.train.precision != "fp32" and not spec.resources.gpus_per_worker:
        found.append(f"most CPUs compute {spec.train.precision} many times slower than fp32")
    return found
