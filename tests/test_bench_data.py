"""`launch bench-data` measures the engine that training uses, says what limits it, and leaves nothing behind."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from launcher.cli import main
from launcher.storage import open_store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RAYLAUNCH_CACHE", str(folder))
    return folder


def fill(place: str, count: int = 30) -> str:
    store = open_store(place)
    for number in range(count):
        out = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(out, "JPEG")
        store.write(f"class-{number % 2}/{number:02d}.jpg", out.getvalue())
    return place


def measured(uri: str, *options: str) -> dict[str, Any]:
    result = launch(uri, "-o", "json", *options)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def launch(uri: str, *options: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["bench-data", uri, "--seconds", "0.1", "--image-size", "32", *options])
    assert result.exit_code == code, result.output
    return result


def test_every_stage_is_measured_and_the_slower_one_limits(place: str, cache: Path) -> None:
    found = measured(fill(place), "--images", "20")
    assert (found["images"], found["images_in_all"]) == (20, 30)
    assert all(found[stage] > 0 for stage in ("fetch", "decode", "crop", "megabytes", "pixel_bytes"))
    assert found["first_epoch"] == min(found["fetch"], found["decode"])
    assert found["limit"][0] == ("fetching" if found["fetch"] < found["decode"] else "decoding")
    assert found["pixel_bytes"] >= 40 * 50 * 3
    assert list(cache.iterdir()) == []


def test_without_room_for_pixels_later_epochs_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = fill(str(tmp_path / "data"))
    monkeypatch.setenv("RAYLAUNCH_CACHE_BYTES", "0")
    found = measured(uri)
    assert found["held"] == 0
    assert found["later_epochs"] == pytest.approx(found["decode"])
    assert found["limit"][1] == "decoding what is not kept"


def test_a_need_is_compared_with_what_there_is(tmp_path: Path) -> None:
    uri = fill(str(tmp_path / "data"))
    assert measured(uri)["waits"] is None
    assert measured(uri, "--need", "0.001")["waits"] == {"first_epoch": 0, "later_epochs": 0}
    found = measured(uri, "--need", "1e9")
    assert found["waits"]["first_epoch"] == pytest.approx(1 - found["first_epoch"] / 1e9)
    assert "waits for data 100% of the time in the first epoch" in launch(uri, "--need", "1e9").stdout


def test_a_models_own_speed_is_measured_here(tmp_path: Path) -> None:
    uri = fill(str(tmp_path / "data"))
    assert "test_resnet trains on" in launch(uri, "--model", "test_resnet", "--batch-size", "4").stdout
    assert "timm has no model resnot" in launch(uri, "--model", "resnot", code=2).output


def test_unreadable_images_are_counted(tmp_path: Path) -> None:
    uri = fill(str(tmp_path / "data"))
    for path in sorted((tmp_path / "data").rglob("*.jpg"))[:4]:
        path.write_bytes(b"nothing")
    assert measured(uri)["unreadable"] == 4


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "absent") in launch(str(tmp_path / "absent"), code=100).output
