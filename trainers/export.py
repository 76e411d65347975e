"""The end of a run: the best weights evaluated once more, and `model/`, the folder that predicts without the run."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import logging
import platform
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as save_tensors

import launcher
from launcher.errors import SiteError
from launcher.runs import Run
from trainers import card, checkpoint
from trainers.data.images import decode

if TYPE_CHECKING:
    from trainers.worker import Trainer

log = logging.getLogger(__name__)

MISTAKES = 24
THUMBNAIL = 96
"""How many of the samples with the highest loss the report shows, and the side of their pictures in pixels."""


def finish(trainer: Trainer) -> None:
    """Evaluates the best epoch's weights on the test split (else the validation split) and writes all outputs."""
    best = take_best(trainer)
    split = "test" if len(trainer.index.rows("test")) else "val"
    rows: list[dict[str, torch.Tensor]] = []

    def keep(batch: Any, logits: torch.Tensor, losses: torch.Tensor) -> None:
        probability, predicted = logits.softmax(1).max(1)
        rows.append({"row": batch.rows, "predicted": predicted.cpu(), "probability": probability.cpu(),
                     "loss": losses.float().cpu()})  # fmt: skip

    began = time.monotonic()
    tally = trainer.evaluate(split, keep)
    trainer.seconds["eval"] += time.monotonic() - began
    mine = {key: torch.cat([part[key] for part in rows]) for key in rows[0]} if rows else {}
    gathered = [part for part in trainer.team.gather(mine) if part]
    bad = trainer.bad_images()
    if trainer.progress is None:
        return
    classes = trainer.index.classes
    final = {"split": split, "epoch": best["epoch"], "bad": len(bad), **tally.details(classes)}
    predictions = {key: torch.cat([part[key] for part in gathered]) for key in gathered[0]} if gathered else {}
    _write_predictions(trainer, predictions)
    _write_model(trainer, final)
    document = {"epochs": trainer.epochs, "best_epoch": best["epoch"], "final": final, "timing": trainer.timing(),
                "versions": versions(), "device": _device_name(trainer.device)}  # fmt: skip
    trainer.progress.metrics(document)


def take_best(trainer: Trainer) -> dict[str, Any]:
    """Loads the weights of the best epoch into the model that is evaluated; returns that epoch's record.

    Should that checkpoint be lost, the last epoch's weights stay, and its record is returned.
    """
    if trainer.saver is not None:
        trainer.saver.finish()
    trainer.team.gather(None)  # the other ranks read what rank 0 has just written
    best = [past for past in trainer.epochs if past["best"]][-1]
    if best["step"] != trainer.step:
        try:
            tensors = checkpoint.load(trainer.run.store, best["step"]).tensors
        except SiteError as error:
            log.warning("the best epoch's checkpoint is lost, the last epoch's weights are used: %s", error)
            return trainer.epochs[-1]
        trainer.evaluated().load_state_dict(tensors["ema" if trainer.ema is not None else "weights"])
    return best


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "timm", "ray")}
    return {"raylaunch": launcher.__version__, **found, "python": platform.python_version()}


def _write_predictions(trainer: Trainer, columns: dict[str, torch.Tensor]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    if not columns:
        return
    order = columns["row"].argsort()
    rows = columns["row"][order].numpy()
    classes = trainer.index.classes
    table = pa.table({
        "key": trainer.index.table["key"].take(rows),
        "label": trainer.index.table["label"].take(rows),
        "predicted": [classes[number] for number in columns["predicted"][order].tolist()],
        "probability": columns["probability"][order].numpy(),
        "loss": columns["loss"][order].numpy(),
    })  # fmt: skip
    out = io.BytesIO()
    parquet.write_table(table, out)
    trainer.run.store.write("predictions.parquet", out.getvalue())
    worst = columns["loss"][order].argsort(descending=True, stable=True)[:MISTAKES].tolist()
    shown = [
        {**table.slice(place, 1).to_pylist()[0], "thumbnail": _thumbnail(trainer, int(rows[place]))} for place in worst
    ]
    trainer.run.write_json("mistakes.json", shown)


def _thumbnail(trainer: Trainer, row: int) -> str:
    image = decode(trainer.feed.source.read(row))
    scale = THUMBNAIL / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _write_model(trainer: Trainer, final: dict[str, Any]) -> None:
    run: Run = trainer.run
    weights = {key: value.detach().cpu().contiguous() for key, value in trainer.evaluated().state_dict().items()}
    run.store.write("model/weights.safetensors", save_tensors(weights))
    run.write_json("model/labels.json", list(trainer.index.classes))
    preprocess = replace(trainer.preprocess, reduction=asdict(trainer.feed.reduction))
    run.write_json("model/preprocess.json", asdict(preprocess))
    run.write_json("model/config.json", {"schema": 1, "architecture": trainer.spec.model.name,
                                         "classes": len(trainer.index.classes)})  # fmt: skip
    text = card.model_card(run.name, trainer.spec, trainer.index.classes, final, versions())
    run.store.write("model/README.md", text.encode())


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads a worker)"
