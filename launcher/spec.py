"""What the user wants: one frozen, strictly validated model, and the only thing that travels to a cluster.

A field that is `None` is chosen by the plan from the data and the machine; `plan.resolve` fills it and says why.
Each field carries its meaning (`description`) and the reason for its default (`why`). Nothing here does I/O.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_serializer, model_validator

from launcher.errors import closest
from launcher.section import Fraction, Section, field
from launcher.space import Sweep

NAME_PATTERN = r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$"
"""Names are used as Kubernetes objects and S3 prefixes: a letter, then at most 39 of a-z, 0-9 and -."""

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]


class Data(Section):
    """Where the labelled images are, and how they are split."""

    uri: str = Field(
        min_length=1, description="Folder, s3:// prefix, manifest (.csv .jsonl .parquet) or sample://digits."
    )
    val_fraction: Fraction = field(
        0.2, "Share of each class held out, where the data has no validation split.", "80/20 is the usual split", gt=0
    )
    val_split: str | None = field(
        None, "Name of the split to validate on.", "val, valid or validation, whichever there is; else val_fraction"
    )
    classes: tuple[str, ...] | None = field(None, "Train on these classes only.", "all classes found")
    image_size: int | None = field(
        None, "Side of the square the model sees, in pixels.", "what the model was made for", ge=8, le=2048
    )
    max_bad_fraction: Fraction = field(
        0.01,
        "Stop when more than this share of the images cannot be read.",
        "a few broken files are normal, 1 % is not",
    )

    sampling: Literal["uniform", "balanced", "weighted"] = field(
        "uniform",
        "How often training images are drawn: each once an epoch, each class as often, or by the data's weights.",
        "each image once",
    )
    cache_gb: float | None = field(
        None, "Disk of a node, in GB, for files from S3; 0 is off.", "half of what is free", ge=0
    )
    pixels_gb: float | None = field(
        None,
        "Disk of a node, in GB, for decoded images; 0 is off.",
        "a quarter of the disk, at most half the memory",
        ge=0,
    )

    @field_validator("classes")
    @classmethod
    def _several_classes(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) < 2:
            raise ValueError("name at least two different classes, or leave it out for all")
        return value


class Model(Section):
    """Which network, and what it starts from."""

    name: str | None = field(None, "Any timm CNN by name.", "by the device: as large as trains in reasonable time")
    pretrained: str | None = field(
        None, "hub, none, or a weights file (.safetensors .pth; a path or s3://).", "fine-tuning beats training anew"
    )
    drop_rate: Fraction = field(0.0, "Dropout before the classifier.", "off: label smoothing regularises enough")
    drop_path_rate: Fraction = field(0.0, "Stochastic depth.", "off: it pays for large models and long runs")
    freeze: tuple[str, ...] = field(
        (),
        "Modules that keep their weights (timm names), or `backbone` for all but the classifier.",
        "train everything",
    )


class Optim(Section):
    """SGD, its schedule and the loss."""

    lr: float | None = field(None, "Peak learning rate.", "scaled with the batch size", gt=0)
    momentum: Fraction = field(0.9, "Momentum of SGD.", "the value of every ResNet recipe")
    nesterov: bool = field(True, "Nesterov's momentum.", "a little better at the same cost")
    weight_decay: float | None = field(
        None, "L2 decay of weights; never of norms and biases.", "lighter when fine-tuning", ge=0
    )
    schedule: Literal["cosine", "step", "constant"] = field(
        "cosine", "How the learning rate falls.", "no milestones to tune"
    )
    step_epochs: float = field(30.0, "Epochs between drops of the step schedule.", "He et al. 2015", gt=0)
    step_gamma: float = field(0.1, "Factor of each drop of the step schedule.", "He et al. 2015", gt=0, lt=1)
    warmup_epochs: float | None = field(None, "Epochs of linear warm-up.", "5 % of the run, at most 5", ge=0)
    clip_norm: float = field(
        0.0, "Clip the gradient's norm to this; 0 is off.", "batch norm keeps CNNs in bounds", ge=0
    )
    label_smoothing: Fraction = field(0.1, "Label smoothing.", "Szegedy et al. 2016; helps against wrong labels too")
    ema_decay: Fraction = field(0.0, "Decay of the moving average of weights; 0 is off.", "short runs gain little")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Optim:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; set optim.nesterov=false for plain SGD")
        return self


class Train(Section):
    """The length and the arithmetic of the run."""

    epochs: int | None = field(None, "Passes over the training images.", "enough steps to converge", ge=1, le=10_000)
    batch_size: int | None = field(
        None, "Images per step, over all workers.", "fits the accelerator and gives enough steps an epoch", ge=2
    )
    accumulate: int = field(1, "Parts that a worker's share of the batch is computed in.", "memory suffices", ge=1)
    precision: Literal["fp32", "bf16", "fp16"] | None = field(None, "Arithmetic of the forward pass.", "by the device")
    channels_last: bool | None = field(None, "Memory layout NHWC.", "by the device")
    compile: bool = field(False, "torch.compile the model.", "minutes of compiling pay only for long runs")
    seed: int = field(0, "Seed of every random choice.", "the same command gives the same run", ge=0, lt=2**32)
    deterministic: bool = field(
        False, "Only deterministic kernels on the GPU.", "slower; a CPU is deterministic anyway"
    )
    early_stop: int = field(
        0,
        "Stop after this many epochs without a better one (top-1, then loss); 0 is off.",
        "cosine gains most at its end",
        ge=0,
    )


class Augment(Section):
    """Random changes to training images."""

    crop_scale: tuple[float, float] | None = field(
        None, "Share of the image's area a random resized crop takes (least, most).", "milder when fine-tuning"
    )
    crop_ratio: tuple[float, float] = field(
        (3 / 4, 4 / 3), "Aspect ratio of the crop (least, most).", "Szegedy et al. 2015"
    )
    flip: bool | None = field(None, "Mirror half of the images.", "photos have no left and right")
    policy: Literal["none", "randaugment", "trivialaugment"] = field(
        "none", "Random photometric and geometric changes.", "pays on long runs; costs CPU"
    )
    magnitude: int = field(9, "Strength of RandAugment, 0 to 30.", "Cubuk et al. 2019", ge=0, le=30)
    operations: int = field(2, "Operations per image of RandAugment.", "Cubuk et al. 2019", ge=1, le=8)
    mixup: float = field(0.0, "Alpha of mixup; 0 is off.", "pays on long runs", ge=0)
    cutmix: float = field(0.0, "Alpha of cutmix; 0 is off.", "pays on long runs", ge=0)
    erasing: Fraction = field(0.0, "Chance that a rectangle is erased.", "pays on long runs")

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError("give two positive numbers, the smaller first")
        return value

    @field_validator("crop_scale")
    @classmethod
    def _area(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[1] > 1:
            raise ValueError("a crop cannot take more than the whole image (1.0)")
        return value


class Resources(Section):
    """What each worker gets. A worker is one process on one GPU, or on some CPUs."""

    workers: int | None = field(None, "Number of workers.", "one for each GPU; one without GPUs", ge=1, le=512)
    cpus_per_worker: int | None = field(None, "CPU cores per worker.", "an equal share of the machine", ge=1)
    gpus_per_worker: int | None = field(None, "GPUs per worker, 0 or 1.", "a GPU where there is one", ge=0, le=1)
    node_type: str | None = field(None, "Kind of node, as `launch pools` names it.", "the pool's first")
    spot: bool | None = field(
        None,
        "Spot nodes: cheaper, and taken away at times; the run goes on from its last checkpoint.",
        "as the pool says",
    )
    priority: str | None = field(None, "Priority class of the run on its cluster.", "the cluster's default")


class Limits(Section):
    """The clocks of a run on a cluster: each ends it and gives its GPUs back."""

    max_hours: float | None = field(
        None, "Hours an attempt may hold its nodes, from the moment it gets them.", "the pool's limit", gt=0
    )
    max_cost: float | None = field(
        None, "What the run may cost in all its attempts, in the currency of the pool's prices.", "no cap", gt=0
    )
    start_minutes: float | None = field(
        None, "Minutes a run may wait for its nodes and images; time in a queue is free.", "the pool's limit", gt=0
    )
    idle_minutes: float | None = field(
        None, "Minutes without any sign of progress after which a run is ended.", "the pool's limit", gt=0
    )


class Checkpoint(Section):
    """How often the run is saved, and how much is kept."""

    every_minutes: float = field(2.0, "Minutes between checkpoints; 0 is off.", "a kill costs at most 2 minutes", ge=0)
    every_epochs: int = field(1, "Epochs between checkpoints.", "each epoch's end is saved", ge=1)
    keep: int = field(2, "Newest checkpoints kept, beside the best.", "a spare, should the newest be damaged", ge=1)


class Spec(Section):
    """One run: a training, or with `sweep` a search over trainings."""

    name: Name | None = field(None, "Name of the run; unique in its storage.", "made from the data's name and the time")
    data: Data
    model: Model = Model()
    optim: Optim = Optim()
    train: Train = Train()
    augment: Augment = Augment()
    resources: Resources = Resources()
    limits: Limits = Limits()
    checkpoint: Checkpoint = Checkpoint()
    sweep: Sweep | None = Field(default=None, description="Search over fields of this spec: a run of many trials.")
    storage: str | None = field(
        None, "Folder or s3:// prefix that holds the run directories.", "$RAYLAUNCH_STORAGE, else ~/raylaunch"
    )

    @model_validator(mode="after")
    def _batch_fits(self) -> Spec:
        batch, parts, workers = self.train.batch_size, self.train.accumulate, self.resources.workers or 1
        if batch is not None and batch < parts * workers:
            raise ValueError(
                f"train.batch_size: {batch} is less than one image for each of {workers} workers x {parts} parts"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_nothing(self, serialize: Any) -> dict[str, Any]:
        """A run that is no sweep does not speak of one."""
        document: dict[str, Any] = serialize(self)
        if self.sweep is None:
            del document["sweep"]
        return document

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, every field."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def flat(self) -> dict[str, Any]:
        """Every field by its dotted name, in the order of the model."""
        return dict(_flatten(self.model_dump(mode="json")))

    def fingerprint(self) -> str:
        """sha256 over all that decides the trained weights: what `RESUMABLE` names is left out."""
        kept = {key: value for key, value in self.flat().items() if not resumable(key)}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def updated(self, changes: dict[str, Any]) -> Spec:
        """This spec with other values at some dotted names, validated again."""
        document = self.model_dump(mode="json")
        for key, value in changes.items():
            *sections, field = key.split(".")
            node = document
            for section in sections:
                node = node.setdefault(section, {})
            node[field] = value
        return Spec.model_validate_json(json.dumps(document))


def _flatten(document: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in document.items():
        section = not prefix and isinstance(value, dict)
        pairs += _flatten(value, f"{key}.") if section else [(prefix + key, value)]
    return pairs


RESUMABLE = (
    "train.epochs",
    "train.early_stop",
    "resources.",
    "limits.",
    "checkpoint.",
    "storage",
    "data.max_bad_fraction",
    "data.cache_gb",
    "data.pixels_gb",
    "sweep.trials",
    "sweep.concurrent",
    "sweep.trials_per_gpu",
    "sweep.time_limit",
    "sweep.refit",
)
"""What `launch resume` may change: none of it alters a step that was already made."""


def resumable(key: str) -> bool:
    """Whether a resumed run may differ in the field of this dotted name."""
    return any(key == allowed or (allowed.endswith(".") and key.startswith(allowed)) for allowed in RESUMABLE)


def fields() -> dict[str, Any]:
    """Every field of the spec by its dotted name, with pydantic's `FieldInfo`."""
    found: dict[str, Any] = {}
    for key, info in Spec.model_fields.items():
        section = Sweep if key == "sweep" else info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found.update({f"{key}.{inner}": inner_info for inner, inner_info in section.model_fields.items()})
        else:
            found[key] = info
    return found


SECTIONS = tuple(dict.fromkeys(key.partition(".")[0] for key in fields() if "." in key))


def unknown(key: str) -> str:
    """What to say of a name that is no field's, with the nearest one."""
    if key in SECTIONS:
        return f"this is a section; name a field of it, as in {next(name for name in fields() if name.startswith(key))}"
    wanted = key.lower().replace("-", "_")
    short = {name.rpartition(".")[2]: name for name in reversed(fields())}
    # `lr`, and `train.lr`, are more likely the lr of another section than something that looks like the whole.
    close = short.get(wanted.rpartition(".")[2]) or closest(wanted, fields()) or short.get(closest(wanted, short))
    return "no such field" + (f"; did you mean {close}?" if close else "")


def valid_name(name: str) -> bool:
    """Whether a run can have this name."""
    return re.fullmatch(NAME_PATTERN, name) is not None
