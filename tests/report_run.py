"""Builds run directories as the worker leaves them, for the tests of the report."""

from __future__ import annotations

import base64
import io
import math
import random
from pathlib import Path
from typing import Any

from launcher.runs import Run, State, Status
from launcher.spec import Data, Spec, Train

FLOWERS = ("bluebell", "buttercup", "crocus", "daffodil", "daisy", "iris", "lily valley", "pansy", "sunflower", "tulip")
BEGAN = 1795460000.0


def build(
    storage: Path,
    status: Status = Status.SUCCEEDED,
    *,
    name: str = "flowers-1123",
    labels: tuple[str, ...] = FLOWERS,
    epochs: int = 20,
    done: int | None = None,
    support: int = 80,
    split: str = "val",
    error: dict[str, str] | None = None,
    uri: str = "s3://bucket/flowers",
    keys: str = "val/{label}/img_{number:04d}.jpg",
) -> Run:
    """A run of `epochs` epochs of which `done` have ended (all of them if it succeeded, none if it is pending)."""
    chance = random.Random(0)
    run = Run(str(storage), name)
    run.create(Spec(data=Data(uri=uri), train=Train(epochs=epochs)), _plan(labels, support, uri, epochs))
    done = done if done is not None else {Status.SUCCEEDED: epochs, Status.PENDING: 0}.get(status, epochs // 2)
    ended = BEGAN + 1000 if status.final else None
    run.set_state(State(status, attempt=2, created=BEGAN - 60, started=BEGAN, ended=ended, error=error))
    if status is Status.PENDING:
        return run
    lost = "InfrastructureError: a worker was lost"
    first = {"began": BEGAN, "ended": BEGAN + 401, "outcome": lost, "from_step": 0, "host": "gpu-pool-a1"}
    last = {"began": BEGAN + 410, "ended": ended, "outcome": ended and status, "from_step": 180, "host": "gpu-pool-b7"}
    run.write_json("attempts/0001.json", first)
    run.write_json("attempts/0002.json", last)
    bad = {"key": "train/daisy/broken.jpg", "reason": "cannot identify image file"}
    run.write_json("data_report.json", {"images": 4_012, "bad": [bad]})
    if done:
        metrics = _metrics(done, chance)
        if status is Status.SUCCEEDED:
            metrics["final"] = _final(labels, support, split, chance)
            metrics["timing"] = {
                "total_seconds": 1000.0, "train_seconds": 780.0, "eval_seconds": 120.0, "checkpoint_seconds": 31.0,
                "start_seconds": 42.0, "data_wait": 0.06,
            }  # fmt: skip
            run.write_json("mistakes.json", [_mistake(labels, keys, number, chance) for number in range(24)])
        run.write_json("metrics.json", metrics)
    return run


def _plan(labels: tuple[str, ...], support: int, uri: str, epochs: int) -> dict[str, Any]:
    choices = [
        ("data.uri", uri, "", "you"),
        ("model.name", "resnet50", "strong and fast on every GPU; most published recipes use it", "default"),
        ("data.image_size", 224, "what the model was made for", "chosen"),
        ("train.epochs", epochs, "", "you"),
        ("train.batch_size", 128, "fits the accelerator and gives 25 steps an epoch", "chosen"),
        ("train.precision", "bf16", "an H100 computes in bf16", "chosen"),
        ("optim.lr", 0.02, "0.04 for 256 images, scaled with the batch size", "chosen"),
        ("optim.nesterov", True, "a little better at the same cost", "default"),
        ("augment.crop_scale", [0.35, 1.0], "milder when fine-tuning", "default"),
        ("train.seed", 0, "the same command gives the same run", "default"),
    ]
    return {
        "choices": [dict(zip(("key", "value", "why", "source"), choice, strict=True)) for choice in choices],
        "facts": {
            "images": 4_012, "bytes": 812_345_678, "classes": len(labels), "train": 3_211, "val": support * len(labels),
            "test": 0, "ignored": 3, "smallest_class": [labels[0], 96], "largest_class": [labels[-1], 1_204],
        },
        "pool": "local",
        "workers": 2,
        "warnings": ["the largest class has 12.5 times the images of the smallest: consider macro scores"],
    }  # fmt: skip


def _metrics(done: int, chance: random.Random) -> dict[str, Any]:
    epochs = []
    for epoch in range(1, done + 1):
        share = 1 - math.exp(-epoch / 4)
        top1 = 0.12 + 0.81 * share + chance.uniform(-0.01, 0.01)
        epochs.append({
            "epoch": epoch, "step": 25 * epoch, "lr": 0.02 * (1 + math.cos(math.pi * epoch / 20)) / 2,
            "train_loss": 2.3 - 1.75 * share + chance.uniform(-0.03, 0.03), "train_top1": 0.1 + 0.87 * share,
            "val": {"loss": 2.3 - 1.62 * share + chance.uniform(-0.05, 0.05), "top1": top1,
                    "top5": min(1.0, top1 + 0.06), "macro_precision": top1, "macro_recall": top1, "macro_f1": top1},
            "seconds": 39.0 + chance.random(), "eval_seconds": 6.0, "images_per_second": 1620 + chance.uniform(-60, 60),
            "data_wait": 0.3 * math.exp(-epoch) + chance.uniform(0.02, 0.04), "best": epoch == done,
            "data": {"images": 62_000, "pixels_held": 62_000 * (epoch > 1), "decoded": 62_000 * (epoch == 1),
                     "decode_seconds": 99.0 * (epoch == 1), "crop_seconds": 11.2, "files_held": 0,
                     "requests": 62_000 * (epoch == 1), "repeated": 31 * (epoch == 1),
                     "bytes": 6.1e9 * (epoch == 1), "fetch_seconds": 0.0},
        })  # fmt: skip
    versions = {"raylaunch": "0.1.0", "torch": "2.10.0", "timm": "1.0.20", "ray": "2.60.0", "python": "3.11.9"}
    return {"schema": 1, "epochs": epochs, "best_epoch": done, "versions": versions, "device": "NVIDIA H100"}


def _final(labels: tuple[str, ...], support: int, split: str, chance: random.Random) -> dict[str, Any]:
    n = len(labels)
    confusion = [[0] * n for _ in labels]
    for i, row in enumerate(confusion):
        wrong = min(support, int(chance.expovariate(1 / (0.07 * support))))
        for _ in range(wrong):
            row[(i + chance.choice((1, 1, 1, 2, 3))) % n] += 1
        row[i] += support - sum(row)
    columns = [sum(row[j] for row in confusion) for j in range(n)]
    per_class: list[dict[str, Any]] = []
    for i, label in enumerate(labels):
        recall, precision = confusion[i][i] / support, confusion[i][i] / max(columns[i], 1)
        f1 = 2 * precision * recall / max(precision + recall, 1e-9)
        per_class.append({"label": label, "support": support, "precision": precision, "recall": recall, "f1": f1})
    top1 = sum(confusion[i][i] for i in range(n)) / (support * n)
    return {
        "split": split, "epoch": 20, "count": support * n, "loss": 0.7012, "top1": top1, "top5": 0.991,
        "macro_precision": sum(row["precision"] for row in per_class) / n,
        "macro_recall": sum(row["recall"] for row in per_class) / n,
        "macro_f1": sum(row["f1"] for row in per_class) / n,
        "classes": list(labels), "per_class": per_class, "confusion": confusion,
    }  # fmt: skip


def _mistake(labels: tuple[str, ...], keys: str, number: int, chance: random.Random) -> dict[str, Any]:
    true, predicted = number % len(labels), (number + 1 + number % 3) % len(labels)
    return {
        "key": keys.format(label=labels[true], number=number * 37), "label": labels[true],
        "predicted": labels[predicted], "probability": 0.99 - 0.018 * number, "loss": 6.2 - 0.17 * number,
        "thumbnail": "data:image/jpeg;base64," + base64.b64encode(_flower(true, chance)).decode(),
    }  # fmt: skip


def _flower(kind: int, chance: random.Random) -> bytes:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (96, 96), (40 + chance.randrange(40), 90 + chance.randrange(50), 50))
    draw = ImageDraw.Draw(image)
    petal = tuple(int(127 + 120 * math.sin(kind * 2.4 + shift)) for shift in (0, 2, 4))
    x, y, petals = 48 + chance.randrange(-9, 9), 48 + chance.randrange(-9, 9), 5 + kind % 4
    for number in range(petals):
        angle = 2 * math.pi * number / petals + chance.random() / 3
        cx, cy = x + 22 * math.cos(angle), y + 22 * math.sin(angle)
        draw.ellipse((cx - 15, cy - 15, cx + 15, cy + 15), fill=petal)
    draw.ellipse((x - 10, y - 10, x + 10, y + 10), fill=(235, 200, 60))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()
