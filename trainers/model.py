"""The network: built by timm, started from weights that are checked tensor by tensor. Trains nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import load_state_dict
from torch import nn

from launcher.errors import LaunchError, SiteError, UserError, nearest
from launcher.spec import Model, Spec
from launcher.storage import open_store
from trainers.data.images import NO_REDUCTION

MAX_WEIGHTS_BYTES = 8 * 1024**3


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the model's input: decoded, resized, cropped to the centre, normalised (mean, std: 0..1).

    `reduction` has the fields of the `images.Reduction` by which it is decoded.
    """

    image_size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    reduction: dict[str, Any] = field(default_factory=lambda: asdict(NO_REDUCTION))

    @classmethod
    def of(cls, model: nn.Module, image_size: int) -> Preprocess:
        """timm's own settings for the model, at another image size."""
        config = resolve_model_data_config(model)
        return cls(image_size, config["crop_pct"], config["interpolation"], tuple(config["mean"]), tuple(config["std"]))


def build(model: Model, classes: int) -> nn.Module:
    """The network with random weights and a classifier for `classes` classes.

    Raises `UserError` for a name timm does not have, or an option the model does not take.
    """
    options: dict[str, float] = {}
    if model.drop_rate:
        options["drop_rate"] = model.drop_rate
    if model.drop_path_rate:
        options["drop_path_rate"] = model.drop_path_rate
    try:
        return timm.create_model(model.name or "", pretrained=False, num_classes=classes, **options)  # type: ignore[no-any-return]
    except TypeError as error:
        raise UserError(f"{model.name} does not take one of {', '.join(options)}", where="model",
                        hint="leave it out, or choose another model") from error  # fmt: skip
    except RuntimeError as error:
        close = nearest(model.name or "", timm.list_models())
        raise UserError(f"timm has no model {model.name}" + (f"; {close}" if close else ""), where="model.name",
                        hint="see timm.list_models()") from error  # fmt: skip


def initial(spec: Spec, classes: int) -> nn.Module:
    """The network a run begins with: a seeded classifier on pretrained or seeded weights."""
    torch.manual_seed(spec.train.seed)
    model = build(spec.model, classes)
    source = spec.model.pretrained or "none"
    if source == "hub":
        _fill(model, _from_hub(spec.model), f"the hub's weights of {spec.model.name}")
    elif source != "none":
        _fill(model, _from_file(source), source)
    return model


def freeze(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Stops the named modules from learning; returns their batch norms, which must be kept in `eval` mode.

    `backbone` names everything but the classifier. An unknown name raises `UserError` with the nearest one.
    """
    frozen: list[nn.Module] = []
    classifier = classifier_name(model)
    for name in names:
        if name == "backbone":
            kept = set(model.get_submodule(classifier).parameters())
            for parameter in model.parameters():
                parameter.requires_grad_(parameter in kept)
            frozen += [module for key, module in model.named_modules() if not key.startswith(classifier)]
        else:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                close = nearest(name, (key for key, _ in model.named_modules()))
                parts = ", ".join(key for key, _ in model.named_children())
                raise UserError(f"the model has no module {name}" + (f"; {close}" if close else ""),
                                where="model.freeze", hint=f"its parts: {parts}") from None  # fmt: skip
            module.requires_grad_(False)
            frozen += list(module.modules())
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("nothing is left to train", where="model.freeze", hint="freeze fewer modules")
    return [module for module in frozen if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def classifier_name(model: nn.Module) -> str:
    """Name of the module that maps features to classes."""
    config: Any = model.default_cfg
    name = config["classifier"]
    return str(name if isinstance(name, str) else name[0])


def _from_hub(model: Model) -> dict[str, torch.Tensor]:
    try:
        source = timm.create_model(model.name or "", pretrained=True)
    except Exception as error:  # whatever the hub's client raises, it has failed to give the weights
        raise SiteError(
            f"the weights of {model.name} cannot be had from the timm hub ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no reason given'})",
            where="model.pretrained", hint="--pretrained FILE with weights you have, or none to train anew",
        ) from error  # fmt: skip
    weights: dict[str, torch.Tensor] = source.state_dict()
    return weights


def _from_file(source: str) -> dict[str, torch.Tensor]:
    folder, _, name = source.rpartition("/")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(source).expanduser()
        if source.startswith("s3://"):
            path = Path(scratch) / name
            try:
                open_store(folder).download(name, path)
            except FileNotFoundError:
                raise _no_weights(source) from None
        elif not path.is_file():
            raise _no_weights(source)
        if path.stat().st_size > MAX_WEIGHTS_BYTES:
            raise UserError("the weights file is larger than 8 GiB", where=source, hint="is it the right file?")
        try:
            weights: dict[str, torch.Tensor] = load_state_dict(str(path), weights_only=True)
        except LaunchError:
            raise
        except Exception as error:  # torch, pickle and safetensors each have their own errors for a foreign file
            raise UserError(f"this is not a file of weights ({type(error).__name__})", where=source,
                            hint="give a .safetensors, or a .pth with nothing but tensors") from error  # fmt: skip
    return weights


def _no_weights(source: str) -> UserError:
    return UserError("there is no such weights file", where=source, hint="--pretrained hub, none, or an existing file")


def _fill(model: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Loads everything but the classifier, and that too if it fits; refuses a file that belongs to another model."""
    wanted = model.state_dict()
    prefix = classifier_name(model) + "."
    head = {key for key in wanted if key.startswith(prefix)}
    head_fits = all(key in weights and weights[key].shape == wanted[key].shape for key in head)
    taken = {key: value for key, value in weights.items() if head_fits or not key.startswith(prefix)}
    needed = {key for key in wanted if (head_fits or key not in head) and not key.endswith("num_batches_tracked")}
    absent = sorted(needed - taken.keys())
    foreign = sorted(taken.keys() - wanted.keys())
    unlike = sorted(key for key in needed & taken.keys() if taken[key].shape != wanted[key].shape)
    if absent or foreign or unlike:
        first = (absent or foreign or unlike)[0]
        raise UserError(
            f"the weights do not fit the model: {len(absent)} of {len(needed)} tensors are absent, {len(unlike)} have "
            f"another shape, {len(foreign)} are unknown (first: {first})",
            where=source, hint="choose the --model that the file was made for",
        )  # fmt: skip
    model.load_state_dict(taken, strict=False)
