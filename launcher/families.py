"""The search space of a sweep that names none: the few fields that matter, for each family of models. Pure.

Four to seven fields are searched, each with a reason. What the user set is not, and the settings that `launch` would
use lie in the space: the first trial has them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from launcher.errors import UserError
from launcher.space import Domain
from launcher.spec import Spec
from launcher.sweeping import mutable

MOST_FIELDS = 7
"""Sixteen trials cannot tell more fields apart."""


@dataclass(frozen=True)
class Family:
    """What the models whose names begin so have in common.

    `early` is the stem and first stage by timm's names of modules, `drop_path` the most stochastic depth that is
    worth a trial (0: timm's models of the family take none).
    """

    names: tuple[str, ...]
    early: tuple[str, ...]
    drop_path: float = 0.0
    batch_norm: bool = True


FAMILIES = (
    Family(("convnext",), ("stem", "stages.0"), 0.3, batch_norm=False),
    Family(("nf_", "nfnet", "dm_nfnet", "eca_nfnet"), ("stem", "stages.0"), 0.2, batch_norm=False),
    Family(("resnetv2", "repvgg", "cspresnet", "ese_vovnet"), ("stem", "stages.0"), 0.1),
    Family(("regnet",), ("stem", "s1"), 0.1),
    Family(
        ("efficientnet", "tf_efficientnet", "mobilenet", "tf_mobilenet", "mnasnet", "semnasnet", "fbnet", "mixnet",
         "tf_mixnet", "hardcorenas", "tinynet", "lcnet"),
        ("conv_stem", "bn1", "blocks.0"), 0.2,
    ),
    Family(("ghostnet_",), ("conv_stem", "bn1", "blocks.0")),
    Family(
        ("resnet", "resnext", "seresnet", "seresnext", "wide_resnet", "ecaresnet", "skresnet", "res2net"),
        ("conv1", "bn1", "layer1"), 0.1,
    ),
)  # fmt: skip
OTHERS = Family((), ())
"""Of models we know nothing about, only what every model has is searched."""

SAMPLE_CROPS = {"sample://digits": ([0.7, 1.0], [0.85, 1.0], [1.0, 1.0])}
"""Crops that leave the image of a sample what it is; policies, which bend and invert, would not."""

_Searched = tuple[str, Domain, str]


def family(model: str) -> Family:
    """The family of a timm model, by its name."""
    return next((known for known in FAMILIES if model.startswith(known.names)), OTHERS)


def default_space(spec: Spec, given: Collection[str] = ()) -> tuple[dict[str, Domain], dict[str, str]]:
    """The space for a spec that is resolved but for it, and why each field is in it; `given` fields are left out."""
    sweep = spec.sweep
    assert sweep is not None
    candidates = _grid(spec) if sweep.search == "grid" else _space(spec)
    fit = [item for item in candidates if item[0] not in given and (sweep.scheduler != "pbt" or mutable(item[0]))]
    chosen = fit[:MOST_FIELDS]
    if not chosen:
        raise UserError("you have set every field that a sweep would search", where="sweep.space",
                        hint="name some, as in --set sweep.space='{optim.lr: {loguniform: [0.001, 0.1]}}'")  # fmt: skip
    names = {key for key, _, _ in chosen}
    chosen = [item for item in chosen if set(item[1].when or {}) <= names]
    return {key: domain for key, domain, _ in chosen}, {key: why for key, _, why in chosen}


def _space(spec: Spec) -> Iterator[_Searched]:
    """All that is worth a search, what matters most first."""
    kind, tuned = family(spec.model.name or ""), spec.model.pretrained != "none"
    lr, decay = spec.optim.lr or 0.0, spec.optim.weight_decay or 0.0
    yield "optim.lr", _around(lr), f"matters most; a factor of 10 down and up from the plan's {lr:g}"
    if decay:
        yield "optim.weight_decay", _around(decay), f"goes with the learning rate; a factor of 10 around {decay:g}"
    yield "optim.label_smoothing", Domain(uniform=(0.0, 0.2)), "0 suits clean labels, more suits wrong ones"
    photos = spec.data.uri not in SAMPLE_CROPS
    if photos:
        yield ("augment.policy", Domain(choice=("none", "randaugment", "trivialaugment")),
               "how much the images may change depends on what they show")  # fmt: skip
        yield ("augment.magnitude", Domain(randint=(3, 15), when={"augment.policy": "randaugment"}),
               "strength of RandAugment; 9 is Cubuk's")  # fmt: skip
    if kind.drop_path and _deep(spec.model.name or ""):
        yield ("model.drop_path_rate", Domain(uniform=(0.0, kind.drop_path)),
               f"the recipes of such models use up to {kind.drop_path:g}")  # fmt: skip
    if tuned and kind.early:
        yield ("model.freeze", Domain(choice=([], list(kind.early))),
               "edges and colours are learned already: keeping the first stage helps with few images")  # fmt: skip
    if not kind.batch_norm:
        yield "optim.clip_norm", Domain(choice=(0.0, 1.0, 5.0)), "no batch norm keeps this model in bounds"
    yield "augment.crop_scale", _crops(spec), "how small a part of the image still shows its class"


def _grid(spec: Spec) -> Iterator[_Searched]:
    """The same for a grid, which grows with every value: about twelve trials."""
    lr, decay = spec.optim.lr or 0.0, spec.optim.weight_decay or 0.0
    yield ("optim.lr", Domain(grid=(_round(lr / 3), lr, _round(lr * 3))),
           f"matters most; a factor of 3 down and up from the plan's {lr:g}")  # fmt: skip
    if decay:
        yield "optim.weight_decay", Domain(grid=(decay, _round(decay * 10))), "goes with the learning rate"
    if spec.data.uri in SAMPLE_CROPS:
        yield "augment.crop_scale", _crops(spec), "how small a part of the image still shows its class"
    else:
        yield ("augment.policy", Domain(grid=("none", "trivialaugment")),
               "how much the images may change depends on what they show")  # fmt: skip


def _crops(spec: Spec) -> Domain:
    plan = list(spec.augment.crop_scale or (0.08, 1.0))
    usual = SAMPLE_CROPS.get(spec.data.uri, ([0.08, 1.0], [0.35, 1.0], [0.7, 1.0]))
    return Domain(choice=(plan, *(crop for crop in usual if crop != plan)))


def _deep(model: str) -> bool:
    """Whether a model has enough blocks to drop some: ResNets of 50 layers and more, and all of other families."""
    layers = re.match(r"[a-z_]*?(?:res2?net|resnext)(?:v2)?_?(\d+)", model)
    return layers is None or int(layers[1]) >= 50


def _around(value: float) -> Domain:
    return Domain(loguniform=(_round(value / 10), _round(value * 10)))


def _round(value: float) -> float:
    """Two digits, as a person would write it."""
    return float(f"{value:.2g}")
