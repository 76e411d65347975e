"""spec + pool + what is known of the data -> Plan: every choice made, and why. Pure: no I/O, no clock, no chance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launcher.errors import UserError
from launcher.families import default_space
from launcher.layout import Layout, lay_out
from launcher.pools import Pool
from launcher.schedule import Schedule, concurrency, schedule
from launcher.space import Domain, own
from launcher.spec import Spec, fields
from launcher.sweeping import check, grid_size

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

    `layout` is how a Kubernetes pool carries it out, None on this machine. A sweep has a `schedule`, and `searched`
    says why each field of its space is there.
    """

    spec: Spec
    pool: Pool
    choices: tuple[Choice, ...]
    facts: dict[str, Any]
    warnings: tuple[str, ...]
    layout: Layout | None = None
    schedule: Schedule | None = None
    searched: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def workers(self) -> int:
        return self.spec.resources.workers or 1

    @property
    def steps_per_epoch(self) -> int | None:
        train = self.facts.get("train")
        return math.ceil(train / (self.spec.train.batch_size or 1)) if train else None

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        made = {
            "pool": self.pool.name,
            "machine": {key: value for key, value in vars(self.pool).items() if key != "site"},
            "layout": self.layout.to_json() if self.layout else None,
            "workers": self.workers,
            "steps_per_epoch": self.steps_per_epoch,
            "facts": self.facts,
            "warnings": list(self.warnings),
            "choices": [asdict(choice) for choice in self.choices],
        }
        if self.schedule is not None:
            made |= {"searched": dict(self.searched), "schedule": self.schedule.to_json()}
        return made


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
    rules = _Rules(spec, pool, facts, model_facts, given)
    for key in ("name", "storage"):
        rules.choose(key, defaults[key], fields()[key].json_schema_extra["why"])
    rules.cluster()
    rules.model()
    rules.resources()
    rules.training()
    rules.sweep()
    rules.cores()
    resolved = spec.updated(rules.values)
    check(resolved)
    layout = lay_out(resolved, pool.site, spent) if pool.site else None
    return Plan(
        resolved, pool, _choices(resolved, rules.reasons, given), facts,
        tuple(_warnings(resolved, pool, facts) + _sweep_warnings(resolved, layout)), layout,
        schedule(resolved, layout, facts.get("train")) if resolved.sweep else None, rules.searched,
    )  # fmt: skip


class _Rules:
    """The rules for open fields, in an order in which each may use what was chosen before."""

    def __init__(
        self, spec: Spec, pool: Pool, facts: dict[str, Any], model_facts: Any, given: Mapping[str, str]
    ) -> None:
        self.spec = spec
        self.given = given
        self.asked = spec.flat()
        self.searched = dict.fromkeys((spec.sweep.space if spec.sweep else None) or {}, "you")
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
        space = (self.spec.sweep.space if self.spec.sweep else None) or {}
        if "model.name" in space:
            self.choose("model.name", space["model.name"].values[0], "the first of those that are searched")
        elif self.pool.gpus:
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
        if self.spec.sweep:
            self.choose("resources.workers", 1, "trials side by side use a pool better than larger trials do")
        elif not on_gpu:
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
        if on_gpu:
            self.choose("train.precision", "bf16" if pool.bf16 else "fp16", f"faster than fp32 on {pool.gpu_type}")
            self.choose("train.channels_last", True, "the layout of tensor cores")
        else:
            self.choose("train.precision", "fp32", "CPUs without AMX compute bf16 many times slower")
            depthwise = self["model.name"].startswith(DEPTHWISE)
            self.choose("train.channels_last", depthwise, "faster on a CPU for depthwise networks only")

    def cores(self) -> None:
        """Cores for each worker, which depend on how many there are at once."""
        pool, workers, on_gpu = self.pool, self["resources.workers"], self["resources.gpus_per_worker"] > 0
        sweep = self.spec.sweep
        if sweep is not None:
            workers *= self["sweep.concurrent"]
        if on_gpu and pool.site:
            sharing = pool.gpus * (sweep.trials_per_gpu if sweep else 1)
        elif pool.site and sweep:
            sharing = math.ceil(workers / pool.nodes) if "sweep.concurrent" in self.given else workers
        else:
            sharing = 1 if pool.site else workers
        self.choose("resources.cpus_per_worker", max(1, pool.cpus // sharing),
                    f"{count(pool.cpus, 'core')} for {count(sharing, 'worker')}")  # fmt: skip

    def sweep(self) -> None:
        """What a sweep searches, for how long, and how many trials there are at once."""
        sweep = self.spec.sweep
        if sweep is None:
            return
        if self.pool.site and (sweep.time_limit or 0) > self["limits.max_hours"]:
            raise UserError(f"{sweep.time_limit:g} h, but limits.max_hours ends the sweep after "
                            f"{self['limits.max_hours']:g} h, without a best model", where="sweep.time_limit",
                            hint="a shorter --time-limit, or a longer --max-hours")  # fmt: skip
        epochs = self["train.epochs"]
        all_of = count(epochs, "epoch")
        if sweep.scheduler == "pbt":
            self.choose("sweep.grace_epochs", math.ceil(epochs / 6),
                        f"a sixth of {all_of}: so often a trial may take over from another")  # fmt: skip
        else:
            self.choose("sweep.grace_epochs", max(epochs // 4, 1),
                        f"a quarter of {all_of}: sooner, what starts slowly looks bad")  # fmt: skip
        if sweep.space is None:
            space, self.searched = default_space(self.spec.updated(self.values), self.given)
            document = {key: domain.model_dump(mode="json") for key, domain in space.items()}
            self.choose("sweep.space", document, f"what matters most for {self['model.name']}")
        else:
            space = sweep.space
        if sweep.search == "grid":
            self._grid(space)
        at_once, why = concurrency(self.spec.updated(self.values), self.pool)
        self.choose("sweep.concurrent", at_once, why)

    def _grid(self, space: Mapping[str, Domain]) -> None:
        if not all(domain.finite for domain in space.values()):
            return  # `check` says so
        size = grid_size(space)
        if "sweep.trials" not in self.given or self["sweep.trials"] > size:
            self.values["sweep.trials"] = size
            self.reasons["sweep.trials"] = "all combinations of the grid"

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


def _sweep_warnings(spec: Spec, layout: Layout | None) -> list[str]:
    sweep = spec.sweep
    if sweep is None or sweep.space is None:
        return []
    found, flat = [], spec.flat()
    if sweep.search != "grid" and sweep.trials < 2 * len(sweep.space):
        found.append(f"{count(sweep.trials, 'trial')} are few for {count(len(sweep.space), 'field')}: more trials, or "
                     "a smaller sweep.space, find more")  # fmt: skip
    if sweep.scheduler == "asha" and not sweep.rungs(spec.train.epochs or 1):
        found.append(f"trials of {count(spec.train.epochs or 1, 'epoch')} cannot be compared on the way: none is "
                     "stopped early")  # fmt: skip
    for key, value in own(sweep.space, flat).items() if sweep.search != "grid" else ():
        if not sweep.space[key].holds(value):
            found.append(f"the first trial has {key} {value}, as `launch` would, which is not in the space")
    if layout is not None and sweep.time_limit and sweep.time_limit * 3600 > layout.max_seconds:
        found.append(f"limits.max_cost ends it after {layout.max_seconds / 3600:.3g} h, before sweep.time_limit does; "
                     "launch resume goes on")  # fmt: skip
    return found


def _warnings(spec: Spec, pool: Pool, facts: dict[str, Any]) -> list[str]:
    found = []
    workers, cpus = spec.resources.workers or 1, spec.resources.cpus_per_worker or 1
    if pool.site is None and workers * cpus > pool.cpus and spec.sweep is None:
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
