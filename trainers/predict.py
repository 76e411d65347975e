"""Classifies images with a model folder alone: the same decoding and preprocessing as in the evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from launcher.spec import Model
from launcher.storage import Store
from trainers.data.images import BadImage, Reduction, pixels
from trainers.data.recipes import EvalRecipe
from trainers.model import Preprocess, build

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


class Predictor:
    """The model in a folder; a folder without one raises `FileNotFoundError`."""

    def __init__(self, store: Store) -> None:
        config = json.loads(store.read("config.json"))
        self.labels: list[str] = json.loads(store.read("labels.json"))
        self.preprocess = Preprocess(**json.loads(store.read("preprocess.json")))
        self.model = build(Model(name=config["architecture"]), len(self.labels))
        self.model.load_state_dict(load_tensors(store.read("weights.safetensors")))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device).eval()
        settings = self.preprocess
        self._recipe = EvalRecipe(settings.image_size, settings.crop_pct, settings.interpolation)
        self._reduction = Reduction(**settings.reduction)

    def predict(self, paths: Iterable[Path], top: int = 1) -> Iterator[dict[str, Any]]:
        """For each image, `{"image", "classes": [{"label", "probability"}]}`, or `{"image", "error"}`.

        A folder stands for the images in it.
        """
        for path in _files(paths):
            try:
                image = self._recipe.one(pixels(path.read_bytes(), self._reduction))
            except BadImage as error:
                yield {"image": str(path), "error": str(error)}
            except OSError as error:
                yield {"image": str(path), "error": error.strerror or str(error)}
            else:
                yield {"image": str(path), "classes": self._classes(torch.from_numpy(image), top)}

    @torch.inference_mode()
    def _classes(self, image: torch.Tensor, top: int) -> list[dict[str, Any]]:
        mean, std = (torch.tensor(values) * 255 for values in (self.preprocess.mean, self.preprocess.std))
        batch = ((image.float() - mean) / std).permute(2, 0, 1)[None].to(self.device)
        probabilities, numbers = self.model(batch).float().softmax(1)[0].topk(min(top, len(self.labels)))
        pairs = zip(numbers.tolist(), probabilities.tolist(), strict=True)
        return [{"label": self.labels[number], "probability": probability} for number, probability in pairs]


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(item for item in path.rglob("*") if item.suffix.lower() in SUFFIXES)
        else:
            yield path
