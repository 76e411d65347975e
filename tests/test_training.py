"""What a run leaves, how it goes on, and how it fails: whole runs in this process, on local files and on S3."""

from __future__ import annotations

import csv
import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from launcher.journal import Lines
from launcher.runs import Run, Status
from launcher.spec import Spec
from launcher.storage import open_store
from tests.tiny import drive, new_run, weights
from trainers import checkpoint


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = new_run(tmp_path_factory.mktemp("undisturbed"))
    assert drive(run) == 0
    return run


def stop_after(run: Run, step: int) -> threading.Thread:
    """Asks the run to stop once its progress has passed a step."""

    def watch() -> None:
        progress = Lines(run.store, "progress.jsonl")
        pause = threading.Event()
        while not any(event["event"] == "step" and event["step"] >= step for event in progress.events()):
            pause.wait(0.02)
        run.request_cancel()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_run_leaves_everything_a_user_was_promised(undisturbed: Run) -> None:
    keys = {entry.key for entry in undisturbed.store.list()}
    promised = {
        "spec.json", "plan.json", "index.parquet", "state.json", "events.jsonl", "progress.jsonl",
        "metrics.json", "metrics.csv", "predictions.parquet", "data_report.json", "report.html",
        "logs/rank-0.log", "attempts/0001.json",
        "model/weights.safetensors", "model/labels.json", "model/preprocess.json", "model/config.json",
        "model/README.md",
    }  # fmt: skip
    assert promised <= keys
    assert not [key for key in keys if key.startswith("failures/") or key in ("cancel.json", "lease.json")]
    state = undisturbed.state()
    assert state.status is Status.SUCCEEDED
    assert state.result["top1"] == undisturbed.metrics()["final"]["top1"] > 0.5
    assert Spec.model_validate_json(undisturbed.store.read("spec.json")) == undisturbed.spec()


def test_the_final_figures_are_those_of_the_predictions(undisturbed: Run) -> None:
    final = undisturbed.metrics()["final"]
    table = pq.read_table(Path(undisturbed.uri) / "predictions.parquet").to_pydict()
    assert len(set(table["key"])) == len(table["key"]) == final["count"] == 359
    right = sum(label == guess for label, guess in zip(table["label"], table["predicted"], strict=True))
    assert right / 359 == pytest.approx(final["top1"])
    assert np.mean(table["loss"]) == pytest.approx(final["loss"], rel=1e-5)
    assert np.array(final["confusion"]).sum() == 359


def test_the_exported_model_is_that_of_the_best_epoch(undisturbed: Run) -> None:
    metrics = undisturbed.metrics()
    best = next(epoch for epoch in metrics["epochs"] if epoch["epoch"] == metrics["best_epoch"])
    assert best["val"]["top1"] == max(epoch["val"]["top1"] for epoch in metrics["epochs"])
    assert metrics["final"]["top1"] == pytest.approx(best["val"]["top1"])


def test_the_same_spec_gives_the_same_weights(undisturbed: Run, tmp_path: Path) -> None:
    again = new_run(tmp_path)
    assert drive(again) == 0
    assert weights(again) == weights(undisturbed)


def test_a_run_on_s3_equals_the_run_on_disk(undisturbed: Run, bucket: str) -> None:
    run = new_run(bucket)
    assert drive(run) == 0
    assert weights(run) == weights(undisturbed)
    local = {entry.key for entry in undisturbed.store.list()}
    remote = {entry.key.removesuffix(".000001") for entry in run.store.list()}
    assert remote == local


def test_the_metrics_tell_what_each_epoch_asked_of_s3_and_decoded(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLAUNCH_CACHE", str(tmp_path / "cache"))
    store, size = open_store(f"{bucket}/data"), 0
    for number in range(40):
        file = io.BytesIO()
        Image.effect_noise((40, 32), 10 + number).save(file, "PNG")
        store.write(f"{'even' if number % 2 == 0 else 'odd'}/{number:02}.png", file.getvalue())
        size += len(file.getvalue())
    run = new_run(tmp_path, data__uri=f"{bucket}/data", train__batch_size=8)
    assert drive(run) == 0

    first, second = (epoch["data"] for epoch in run.metrics()["epochs"])
    amounts = ["images", "requests", "bytes", "decoded", "files_held", "pixels_held"]
    assert [first[name] for name in amounts] == [40, 40, size, 40, 0, 0]
    assert [second[name] for name in amounts] == [40, 0, 0, 0, 0, 40]
    rows = list(csv.DictReader(io.StringIO(run.store.read("metrics.csv").decode())))
    assert [[row[f"data_{name}"] for name in amounts] for row in rows] == [
        ["40", "40", str(size), "40", "0", "0"], ["40", "0", "0", "0", "0", "40"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim__ema_decay": 0.9, "train__accumulate": 2, "train__channels_last": True},
        {"model__drop_rate": 0.3, "augment__mixup": 0.2, "augment__cutmix": 1.0, "augment__policy": "randaugment",
         "augment__erasing": 0.25, "train__deterministic": True, "model__freeze": ["conv1"]},
    ],
    ids=["plain", "ema-accumulate-nhwc", "everything-random"],
)  # fmt: skip
def test_a_run_stopped_within_an_epoch_and_resumed_ends_bit_for_bit_as_if_nothing_had_happened(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {"train__epochs": 3, "train__batch_size": 32, "checkpoint__every_minutes": 0.0} | settings
    whole, broken = new_run(tmp_path, "whole", **settings), new_run(tmp_path, "broken", **settings)
    assert drive(whole) == 0
    watcher = stop_after(broken, 1)
    assert drive(broken) == 103
    watcher.join()
    step = broken.latest_step()
    assert broken.state().status is Status.CANCELLED
    assert 0 < step < 3 * 45
    assert step % 45, "the stop should fall within an epoch"
    assert drive(broken) == 0
    assert weights(broken) == weights(whole)
    ours, theirs = broken.metrics(), whole.metrics()
    assert ours["final"] == theirs["final"]
    for one, other in zip(ours["epochs"], theirs["epochs"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-12)
        assert one["val"] == other["val"]


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    run = new_run(tmp_path, train__epochs=1)
    assert drive(run) == 0
    run.set_spec(run.spec().updated({"train.epochs": 2}), run.plan())
    assert drive(run) == 0
    assert [epoch["epoch"] for epoch in run.metrics()["epochs"]] == [1, 2]
    assert [entry.key for entry in run.store.list("attempts/")] == ["attempts/0001.json", "attempts/0002.json"]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, undisturbed: Run) -> None:
    run = new_run(tmp_path, train__epochs=1)
    assert drive(run) == 0
    run.set_spec(run.spec().updated({"train.epochs": 2}), run.plan())
    newest = Path(run.uri) / checkpoint.folder(run.latest_step()) / "weights.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    assert drive(run) == 0
    assert "is damaged" in (Path(run.uri) / "logs/rank-0.log").read_text()
    assert run.metrics()["final"]["top1"] == pytest.approx(undisturbed.metrics()["final"]["top1"], abs=0.2)


def test_early_stop_ends_the_run_once_no_epoch_is_better(tmp_path: Path) -> None:
    run = new_run(tmp_path, train__epochs=6, train__early_stop=1, optim__lr=1e-9, optim__momentum=0.0,
                  optim__nesterov=False, optim__warmup_epochs=0.0)  # fmt: skip
    assert drive(run) == 0
    epochs = run.metrics()["epochs"]
    assert len(epochs) < 6
    assert not epochs[-1]["best"]


def images(folder: Path, classes: int = 2, each: int = 20, side: int = 16) -> Path:
    """A folder of noise, one colour for each class."""
    noise = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            pixels = noise.integers(0, 80, (side, side, 3), dtype=np.uint8)
            pixels[..., label % 3] += 150
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number:03d}.png")
    return folder


def test_non_finite_loss_stops_before_the_step_and_names_the_samples(tmp_path: Path) -> None:
    run = new_run(tmp_path, optim__lr=1e30, optim__warmup_epochs=0.0)
    assert drive(run) == 100
    state = run.state()
    assert state.status is Status.FAILED
    assert state.error is not None
    assert state.error["kind"] == "NonFiniteLossError"
    assert ".png" in state.error["what"]
    assert "step" in state.error["what"]
    assert run.latest_step() == 0, "no step with a non-finite loss may be saved"


def test_too_many_unreadable_images_stop_the_run_and_all_are_listed(tmp_path: Path) -> None:
    data = images(tmp_path / "data")
    for name in ("class0/003.png", "class1/007.png", "class1/008.png"):
        (data / name).write_bytes(b"<html>not an image</html>")
    run = new_run(tmp_path, data__uri=str(data), data__image_size=32, train__batch_size=8)
    assert drive(run) == 100
    state = run.state()
    assert state.error is not None
    assert state.error["kind"] == "BadImagesError"
    assert "3 of 40" in state.error["what"]
    report = json.loads(run.store.read("data_report.json"))
    assert {item["key"] for item in report["bad"]} == {"class0/003.png", "class1/007.png", "class1/008.png"}


def test_a_few_unreadable_images_are_left_out_and_listed(tmp_path: Path) -> None:
    data = images(tmp_path / "data")
    (data / "class0/003.png").write_bytes((data / "class0/003.png").read_bytes()[:80])
    run = new_run(tmp_path, data__uri=str(data), data__image_size=32, train__batch_size=8, data__max_bad_fraction=0.05)
    assert drive(run) == 0
    report = json.loads(run.store.read("data_report.json"))
    assert [item["key"] for item in report["bad"]] == ["class0/003.png"]


def test_an_image_that_changed_after_planning_is_told_not_mixed_in(tmp_path: Path) -> None:
    data = images(tmp_path / "data")
    run = new_run(tmp_path, data__uri=str(data), data__image_size=32, train__batch_size=8)
    Image.new("RGB", (20, 20)).save(data / "class0/000.png")
    assert drive(run) == 100
    error = run.state().error
    assert error is not None
    assert "changed" in error["what"]
    assert "class0/000.png" in error["where"]


def test_a_weights_file_of_another_model_is_refused_before_training(tmp_path: Path, undisturbed: Run) -> None:
    run = new_run(tmp_path, model__name="test_efficientnet",
                  model__pretrained=f"{undisturbed.uri}/model/weights.safetensors")  # fmt: skip
    assert drive(run) == 2
    error = run.state().error
    assert error is not None
    assert "do not fit" in error["what"]


def test_a_run_starts_from_its_own_kind_of_weights(tmp_path: Path, undisturbed: Run) -> None:
    run = new_run(tmp_path, model__pretrained=f"{undisturbed.uri}/model/weights.safetensors", optim__lr=1e-9)
    assert drive(run) == 0
    assert run.metrics()["final"]["top1"] == pytest.approx(undisturbed.metrics()["final"]["top1"], abs=0.02)


def test_the_report_of_a_run_is_made_anew_from_its_directory(undisturbed: Run) -> None:
    from trainers import report

    html = report.render(undisturbed)
    assert f"{undisturbed.metrics()['final']['top1']:.1%}" in html.replace(" %", "%")
    assert open_store(undisturbed.uri).read("report.html").decode() == html
